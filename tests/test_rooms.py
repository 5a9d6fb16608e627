"""The rooms of the package: each imports from those below it only."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "simseg_jax"
# From below to above. Rooms of one line do not import each other.
FLOORS = (
    {"runtime"},
    {"models"},
    {"masks"},
    {"data"},
    {"training", "zeroshot"},
    {"evaluators"},
    {"config"},
    {"weights"},
    {"reports"},
    {"train", "segmenter"},
    {"bulk"},
    {"main", "evaluate", "segment", "convert", "linear_probe", "ablate", "plan", "demo"},
    # They share what evaluate does with one test set, and what segment does with folders.
    {"sweep", "figures", "segment_dataset"},
)
# The command that starts all others, and commands that lie with what they are about.
COMMANDS = {"__main__.py", "data/inspect.py", "data/prepare/__main__.py"}


def floor_of(room):
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def imported(path):
    """The rooms that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simseg_jax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            yield from (
                n.name.split(".")[1] for n in node.names if n.name.startswith("simseg_jax.")
            )


def test_imports_only_point_down():
    wrong, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        if (path.name == "__init__.py" and len(name.parts) == 1) or str(name) in COMMANDS:
            continue
        own = name.parts[0].removesuffix(".py")
        for room in imported(path):
            seen += 1
            if room != own and floor_of(room) >= floor_of(own):
                wrong.append(f"{name} imports {room}")
    assert seen > 300
    assert wrong == []


def test_files_at_the_top_are_few():
    assert len(list(PACKAGE.glob("*.py"))) <= 16
