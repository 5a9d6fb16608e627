"""Benchmarks explain themselves without the packages that they compare with."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
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


def run(script, *arguments):
    command = [sys.executable, "-c", WITHOUT, "torch,cv2,pydensecrf,psutil,timm"]
    command += [FOLDER / f"{script}.py", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("densecrf", "pydensecrf2"),
        ("input", "torch"),
        ("loader_memory", "psutil"),
        ("segmentation", "torch opencv-python-headless pydensecrf2"),
        ("train_step", "torch"),
    ],
)
def test_a_missing_peer_is_one_sentence(script, missing):
    done = run(script)
    assert done.returncode == 1
    assert done.stderr == f"This benchmark needs more packages: pip install {missing}\n"
    assert run(script, "--help").returncode == 0
