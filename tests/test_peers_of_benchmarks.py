"""Benchmarks explain themselves without the packages that they compare with."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PACKAGES = runpy.run_path(str(FOLDER / "peers.py"))["PACKAGES"]
# Hides the packages in sys.argv[1] and runs the script behind it.
WITHOUT = """
import importlib.abc, importlib.util, runpy, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

hidden = sys.argv[1].split(",")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
sys.meta_path.insert(0, Hidden())
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script, *arguments, **environment):
    command = [sys.executable, "-c", WITHOUT, ",".join(PACKAGES)]
    command += [FOLDER / f"{script}.py", *arguments]
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def imported(path):
    """The modules of other packages that a script imports, anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_the_extra_has_every_package_that_benchmarks_import():
    setup = (FOLDER.parent / "setup.py").read_text()
    required = setup.partition("install_requires=[")[2].partition("\n    ]")[0]
    known = {name.lower().replace("-", "_") for name in re.findall(r'^ +"([\w-]+)', required, re.M)}
    known |= {"PIL", "simseg_jax", "pyarrow", *sys.stdlib_module_names}  # pyarrow: has its extra.
    scripts = list(FOLDER.glob("*.py"))
    known |= {path.stem for path in scripts}
    assert len(scripts) > 15
    foreign = {name for path in scripts for name in imported(path)} - known
    assert foreign == PACKAGES.keys()
    extra = setup.partition('"bench": [')[2].partition("]")[0]
    assert set(re.findall(r'"([\w-]+)>=[\d.]+,<\d+"', extra)) == set(PACKAGES.values())


def test_every_benchmark_reports_errors_as_commands_do():
    mains = [path for path in FOLDER.glob("*.py") if "\ndef main()" in path.read_text()]
    assert len(mains) > 12
    for path in mains:
        assert "\n@report_user_errors\ndef main()" in path.read_text(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("densecrf", "pydensecrf2"),
        ("input", "torch"),
        ("loader_memory", "psutil"),
        ("segmentation", "torch, opencv-python-headless, pydensecrf2"),
        ("train_step", "torch"),
    ],
)
def test_a_missing_peer_is_one_sentence(script, missing):
    done = run(script)
    assert done.returncode == 2
    assert done.stderr == (
        f'error: This benchmark needs {missing}: pip install -e ".[bench]" (or '
        '"simseg-jax[bench]").\n'
    )
    assert run(script, "--help").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("autoaugment", "--root=/none", "There are no JPEG files in /none."),
        ("autoaugment", "--batch=0", "must be a whole number from 1"),
        ("drills", "--only=x", "--only takes"),
        ("gradient_sums", "--steps=1,x", "'x' must be a whole number from 0"),
        ("pooling", "--m=6 --tokens=5", "--m=6 must not exceed --tokens=5"),
        ("programs", "--rounds=x", "must be a whole number from 1"),
        (
            "retrieval",
            "--images=20 --texts=10",
            "--images must be from 10 to the number of --texts",
        ),
        ("shapes_limit", "/none", "/none"),
        ("startup", "--batch=-1", "must be a whole number from 1"),
        ("train_step", "--peer= --models=x", "--models takes vits16, vitb16, tiny"),
        ("train_step", "--peer= --models=tiny --options=x=1", "--options: x=1 must be none, or"),
        ("train_step", "--peer= --batches=1,", "'' must be a whole number from 1"),
    ],
)
def test_a_mistake_is_one_sentence(script, arguments, message):
    done = run(script, *arguments.split())
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_device_that_does_not_exist_is_one_sentence():
    done = run("pooling", JAX_PLATFORMS="nonsense")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: Unable to initialize backend 'nonsense'")
    assert "JAX_PLATFORMS" in done.stderr
    assert "Traceback" not in done.stderr
