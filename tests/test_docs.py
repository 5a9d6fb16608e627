"""The documentation: its commands run, its Python runs, and what it names exists."""

import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from simseg_jax.config import RunConfig
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.runtime.settings import declared

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A block of commands; a comment before it says why it is not run.
SHELL = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```sh\n(?P<commands>.*?)```", re.DOTALL
)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
# .ci/run makes a virtual environment, installs the package and runs the tests.
SET_UP = ("python3 -m venv", "source ", "pip install", "pytest")
STEPS = 8
# What makes the embedded run and what follows it short, and nothing else.
RUN = (
    *(f"--config.steps={STEPS}", "--config.batch_size=16", "--config.pictures=1"),
    *("--config.model.image.depth=1", "--config.evals.seg.shapes.resolution=64"),
    *("--config.data.train.shapes.size=64", "--config.evals.seg.shapes.size=4"),
    *("--config.evals.retrieval.shapes.size=16", "--config.evals.classification.shapes.size=16"),
)
PROBE = (
    "--config.size=64",
    "--config.val_size=16",
    "--config.epochs=2",
    "--config.warmup_epochs=1",
)
SHORTER = {"main": RUN, "ablate": RUN, "linear_probe": PROBE, "data.inspect": ("--seconds=0",)}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks():
    """(page, number of the block, commands) of every block that is run."""
    for page in PAGES:
        for number, found in enumerate(SHELL.finditer(page.read_text())):
            if not found["reason"]:
                yield pytest.param(found["commands"], id=f"{name_of(page)}-{number}")


def run_command(command, monkeypatch):
    """One command line, in this process; with a shorter training."""
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "-m"], f"{command!r} is no command that this test can run"
    name = words[2].removeprefix("simseg_jax.")
    monkeypatch.setattr(sys, "argv", [name, *words[3:], *SHORTER.get(name, ())])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(words[2]).main()
    else:
        importlib.import_module(words[2]).main()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder like a clone, with the embedded run in a short form."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("configs", "assets"):
        (home / folder).symlink_to(ROOT / folder)
    command = "python -m simseg_jax.main --config=configs/shapes.py --workdir=runs/shapes"
    assert command in (ROOT / "README.md").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run_command(command, patch)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("commands", list(blocks()))
def test_commands_run(commands, home, monkeypatch):
    monkeypatch.chdir(home)
    for written in ("models", "programs", "shapes.pth", "out"):  # `convert` overwrites nothing.
        path = home / written
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    # Folders are named after the step of the checkpoint, of which the pages know the real one.
    text = commands.replace("\\\n", " ").replace("evaluation-700", f"evaluation-{STEPS}")
    for line in filter(None, (part.strip() for part in re.split(r"\n|&&", text))):
        if not line.startswith(SET_UP):
            run_command(line, monkeypatch)


@pytest.mark.slow
def test_python_runs(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    snippets = [code for page in PAGES for code in PYTHON.findall(page.read_text())]
    assert len(snippets) >= 2
    for code in snippets:
        (tmp_path / "snippet.py").write_text(code)
        runpy.run_path(str(tmp_path / "snippet.py"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    keys = {name for name, _ in declared(RunConfig)}
    probe = {name for name, _ in declared(ProbeConfig)}
    groups = {key.split(".")[0] for key in keys if "." in key}

    def known(name):
        # A key, or a group of keys.
        parents = {".".join(key.split(".")[:i]) for key in keys for i in range(1, 9)}
        patterns = (re.escape(key).replace("<name>", r"\w+") for key in keys | parents)
        return any(re.fullmatch(pattern, name) for pattern in patterns)

    for name in re.findall(r"--config\.([\w.]+)=", text):
        assert known(name) or name in (*probe, "KEY"), f"there is no key {name}"
    for name in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:=[^`]*)?`", text):
        if name.split(".")[0] in groups and not re.search(r"\.(py|png|json|jsonl)$", name):
            module = ROOT / "simseg_jax" / f"{name.replace('.', '/')}"
            assert known(name) or module.with_suffix(".py").is_file() or module.is_dir(), name
    rooms = "assets|benchmarks|configs|docs|launch|simseg_jax|tests"
    for path in re.findall(rf"[`(\s]((?:{rooms})/[\w./-]+)", text):
        below = page.parent / path if path.startswith(("assets/", "docs/")) else ROOT / path
        found = below.exists() or (ROOT / path).exists() or "NAME" in path
        assert found, f"there is no {path}"
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), f"{link} leads nowhere"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
