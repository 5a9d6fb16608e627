"""The documentation: its commands run, its Python runs, and what it names exists."""

import ast
import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from simseg_jax.__main__ import MODULES
from simseg_jax.config import RunConfig
from simseg_jax.data import shapes
from simseg_jax.evaluators.probe import ProbeConfig
from simseg_jax.runtime.settings import declared

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "launch/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
COMMANDS = (
    *("main", "segment", "evaluate", "convert", "sweep", "ablate", "linear_probe", "plan", "demo"),
    *("segment_dataset", "data.inspect", "data.prepare"),
    *(f"figures {kind}" for kind in ("responses", "gallery", "classes", "scores", "retrieved")),
)
SETTINGS = [*declared(RunConfig), *declared(ProbeConfig)]
# A block of commands; a comment before it says why it is not run.
SHELL = re.compile(
    r"(?:^<!-- not run: (?P<reason>\S.*?) -->\n)?^```sh\n(?P<commands>.*?)^```$", re.M | re.S
)
PYTHON = re.compile(
    r"(?:^<!-- not run: (?P<reason>\S.*?) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S
)
CODE = re.compile(r"`([^`\n]+)`")
# .ci/run makes a virtual environment, installs the package, runs the tests and builds the pages.
SET_UP = ("python3 -m venv", "source ", "pip install", "pytest", "mkdocs build")
# Commands within sentences and tables, none of which is run here, and why.
MENTIONED = {
    "minutes, or at full size": (
        *("python benchmarks/retrieval.py", "python benchmarks/programs.py"),
        *("python benchmarks/shapes_limit.py runs/shapes", ".ci/run", "PYTHON=python3.12 .ci/run"),
    ),
    ".ci/run does": (
        *("pytest", "pytest -m slow", "pytest -m slow tests/test_docs.py"),
        'pip install -e ".[launch]" && pytest tests/test_launch.py',
        *("pytest tests/runtime/test_processes.py", "pip install build", "python -m build"),
        "ruff format --check . && ruff check . && pyright",
    ),
    "servers that do not end": ("mkdocs serve",),
    "named only, or run by a block": (
        *("python -m simseg_jax.main --help", "python -m simseg_jax.linear_probe"),
        "python -m simseg_jax.main --config=... --workdir=...",
        *("python -m simseg_jax.main", "simseg", "simseg train", "simseg --help"),
    ),
}
STEPS = 8
# What makes the embedded run and what follows it short, and nothing else.
RUN = (
    *(f"--config.steps={STEPS}", "--config.batch_size=16", "--config.pictures=1"),
    *("--config.model.image.depth=1", "--config.evals.seg.shapes.resolution=64"),
    *("--config.data.train.shapes.size=64", "--config.evals.seg.shapes.size=4"),
    *("--config.evals.retrieval.shapes.size=16", "--config.evals.classification.shapes.size=16"),
)
PROBE = (
    *("--config.size=64", "--config.val_size=16"),
    *("--config.epochs=2", "--config.warmup_epochs=1"),
)
# Photographs are few, their vocabulary is not downloaded, and the model is small.
PHOTOS = (
    *("--config.batch_size=8", "--config.data.vocab=shapes", "--config.model.text.depth=1"),
    *("--config.model.image.depth=1", "--config.model.image.image_size=32"),
    *("--config.model.m_image=2",),
)
# (command, configuration; '' for any) -> overrides.
SHORTER = {
    ("main", "shapes"): RUN,
    ("main", "flickr8k"): (*PHOTOS, "--config.epochs=0", "--config.steps=2"),
    ("ablate", "shapes"): RUN,
    ("plan", "shapes"): RUN,
    ("linear_probe", "linear_probe"): PROBE,
    ("data.inspect", "shapes"): ("--seconds=0",),
    ("data.inspect", "flickr8k"): (*PHOTOS, "--seconds=0"),
}


def name_of(page):
    return str(page.relative_to(ROOT))


def joined(commands):
    """The single commands of a block, each in one line."""
    lines = (part.strip() for part in re.split(r"\n|&&", commands.replace("\\\n", " ")))
    return [line for line in lines if line]


def blocks():
    """Every block that is run, once, and where it stands first."""
    found = {}
    for page in PAGES:
        for number, block in enumerate(SHELL.finditer(page.read_text())):
            if not block["reason"]:
                found.setdefault(block["commands"], f"{name_of(page)}-{number}")
    return [pytest.param(commands, id=place) for commands, place in found.items()]


def words_of(command):
    """The words of a command line; `simseg NAME` as the module that it starts."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "simseg":
        module = MODULES[words[1].replace("-", "_")].removesuffix(".__main__")
        words[:2] = ["python", "-m", f"simseg_jax.{module}"]
    return words


def run_command(command, monkeypatch):
    """One command line, in this process; with a shorter training."""
    words = words_of(command)
    assert words[:2] == ["python", "-m"], f"{command!r} is no command that this test can run"
    name = words[2].removeprefix("simseg_jax.")
    config = next((Path(word[9:]).stem for word in words if word.startswith("--config=")), "")
    monkeypatch.setattr(sys, "argv", [name, *words[3:], *SHORTER.get((name, config), ())])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            importlib.import_module(words[2]).main()
    else:
        importlib.import_module(words[2]).main()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder like a clone, with data of one's own and the embedded run in a short form."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("configs", "assets"):
        (home / folder).symlink_to(ROOT / folder)
    (home / "DATA" / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for index in range(8):
        image, _, caption = shapes.scene(index, "train")
        Image.fromarray(image).save(home / f"DATA/Images/{index}.png")
        lines.append(f"{index}.png,{caption}")
    (home / "DATA/captions.csv").write_text("\n".join(lines))
    command = "python -m simseg_jax.main --config=shapes --workdir=runs/shapes"
    assert command in (ROOT / "README.md").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run_command(command, patch)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("commands", blocks())
def test_commands_run(commands, home, monkeypatch):
    monkeypatch.chdir(home)
    for written in ("models", "programs", "shapes.pth", "out"):  # `convert` overwrites nothing.
        path = home / written
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    # Folders are named after the step of the checkpoint, of which the pages know the real one.
    for line in joined(commands.replace("evaluation-700", f"evaluation-{STEPS}")):
        if not line.startswith(SET_UP):
            run_command(line, monkeypatch)


@pytest.mark.slow
def test_python_runs(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    snippets = [block for page in PAGES for block in PYTHON.finditer(page.read_text())]
    run = [block["code"] for block in snippets if not block["reason"]]
    assert len(run) >= 3
    for code in run:
        (tmp_path / "snippet.py").write_text(code)
        names = runpy.run_path(str(tmp_path / "snippet.py"))
        if "get_config" in names:
            command = f"python -m simseg_jax.data.inspect --config={tmp_path / 'snippet.py'}"
            run_command(" ".join((command, "--seconds=0", *PHOTOS)), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_command_hides_from_these_tests(page):
    """In a block of another form, or within a sentence."""
    rest = PYTHON.sub("", SHELL.sub("", page.read_text()))
    assert not re.search(r"```|~~~|^(    |\t) *(\$|python|pip|simseg) ", rest, re.M)
    start = r"([A-Z_]+=\S+ )?(python3?|pip|pytest|mkdocs|ruff|pyright|\.ci/|simseg(?= |$))(?!\w)"
    known = {command for commands in MENTIONED.values() for command in commands}
    for code in CODE.findall(rest):
        assert code in known or not re.match(start, code) or code == "pyright", code


@pytest.fixture(scope="module")
def helps():
    """The help of every command by its name."""
    texts = {}
    for command in COMMANDS:
        name, *kind = command.split()
        with pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr(sys, "argv", [name, *kind, "--help"])
            patch.setattr(sys.stdout, "write", lines.append)
            with pytest.raises(SystemExit, match="0"):
                importlib.import_module(
                    f"simseg_jax.{name}{'.__main__' * (name == 'data.prepare')}"
                ).main()
        texts[command] = "".join(lines)
    return texts


def takes(text, option):
    """Whether the help of a command has an option, with a value that is among its choices."""
    flag, _, value = option.partition("=")
    if flag.startswith("--config."):
        return True  # Checked as a key.
    if not re.search(rf"^  (-h, )?{flag}\b(?!-)", text, re.M):
        return False
    choices = re.search(rf"^  {flag} {{([^}}]*)}}", text, re.M)
    return not (choices and value) or value in choices[1].split(",")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page, helps):
    """Those of all commands, run or not, and those within sentences."""
    text = page.read_text()
    for block in SHELL.finditer(text):
        for line in joined(block["commands"]):
            words = words_of(line)
            if words[:2] != ["python", "-m"]:
                continue
            name = words[2].removeprefix("simseg_jax.")
            name = f"{name} {words[3]}" if name == "figures" else name
            for word in (word for word in words if word.startswith("--")):
                assert takes(helps[name], word), f"{name} has no {word}"
    for code in CODE.findall(PYTHON.sub("", SHELL.sub("", text))):
        words = code.split()
        own = [name for name in COMMANDS if words[0] in (name, f"simseg_jax.{name}")] or COMMANDS
        if words[0].startswith("--") or own != COMMANDS:
            for word in (word for word in words if word.startswith("--")):
                assert any(takes(helps[name], word) for name in own), code


def pattern(key):
    return re.escape(key).replace("<name>", r"\w+")


def fields(name):
    """The declarations of a key, of which the groups may be left out."""
    return [
        field
        for key, field in SETTINGS
        if re.fullmatch(pattern(key), name) or key.endswith(f".{name}")
    ]


def is_group(name):
    parents = {key.rsplit(".", i)[0] for key, _ in SETTINGS for i in range(1, key.count(".") + 1)}
    return any(re.fullmatch(pattern(parent), name) for parent in parents)


def accepts(field, text):
    value = text if isinstance(field.default, str) else ast.literal_eval(text)
    value = float(value) if isinstance(field.default, float) else value
    return type(value) is type(field.default) and field.metadata["accepts"].allows(value)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_values_exist(page):
    text = page.read_text()
    pairs = re.findall(r"--config\.([\w.]+)=([\w.:/-]*)", text)
    pairs += re.findall(r"`([a-z_]+(?:\.\w+)*)=([^`\s]*)`", text)
    for name, value in pairs:
        if name == "KEY":
            continue
        assert fields(name), f"there is no key {name}"
        if value and not value.isupper():  # Words in capitals stand for other words.
            assert any(accepts(field, value) for field in fields(name)), f"{name}={value}"
    groups = {part for key, _ in SETTINGS for part in key.split(".")[:-1]}
    for name in re.findall(r"`([a-z_]+(?:\.[\w*]+)+)`", text):
        if name.split(".")[0] in groups and not re.search(r"\.(py|png|txt|json|jsonl)$", name):
            module = ROOT / "simseg_jax" / name.replace(".", "/")
            known = fields(name) or is_group(name.removesuffix(".*"))
            assert known or module.with_suffix(".py").is_file() or module.is_dir(), name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_links_and_extras_exist(page):
    text = page.read_text()
    rooms = "assets|benchmarks|configs|docs|launch|simseg_jax|tests"
    for path in re.findall(rf"[`(\s]((?:{rooms})/[\w./-]+)", text):
        below = page.parent / path if path.startswith(("assets/", "docs/")) else ROOT / path
        found = below.exists() or (ROOT / path).exists() or "NAME" in path
        assert found, f"there is no {path}"
    for path in re.findall(r"`([\w/]+\.py)`", text):
        assert any(ROOT.glob(f"**/{path}")), f"there is no {path}"
    for link, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link} has no section {anchor}"
    extras = re.findall(r'^ +"(\w+)": \[', (ROOT / "setup.py").read_text(), re.M)
    named = re.findall(r"extra `(\w+)`", text)
    named += ",".join(re.findall(r"\.\[([\w,]+)\]", text)).split(",")
    assert not set(filter(None, named)) - set(extras)


def anchors(page):
    """What GitHub and MkDocs make of the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", sorted((ROOT / "docs/howto").glob("*.md")), ids=name_of)
def test_names_in_the_code_exist(page):
    """Functions, classes and constants that the pages on how to add something send people to."""
    code = "\n".join(file.read_text() for file in ROOT.glob("simseg_jax/**/*.py"))
    for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]\w+)`", page.read_text()):
        assert re.search(rf"\b{name}\b", code), f"the code has no {name}"


def test_the_tables_of_settings_are_complete():
    """Every declared key has its row, with default, values and meaning."""
    on_page_markdown = runpy.run_path(str(ROOT / "docs/hooks.py"))["on_page_markdown"]
    text = on_page_markdown((ROOT / "docs/reference/settings.md").read_text())
    assert "<!-- settings" not in text
    for kind in (RunConfig, ProbeConfig):
        for name, field in declared(kind):
            group, _, key = name.replace("<name>", "NAME").rpartition(".")
            table = text.partition(f"## `{group}`\n" if group else "# Settings\n")[2]
            row = next(line for line in table.splitlines() if line.startswith(f"| `{key}` |"))
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            assert len(cells) == 4, row
            if kind is RunConfig:
                assert cells[1] == f"`{field.default!r}`".replace("|", "\\|")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
