"""The command `simseg`: `simseg segment ...` is `python -m simseg_jax.segment ...`.

It reads what it says of the commands from their source, since importing them takes seconds.
"""

import ast
import difflib
import importlib
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import simseg_jax
from simseg_jax.runtime.errors import UserError, report_user_errors

MODULES = {
    "train": "main",
    "segment": "segment",
    "segment_dataset": "segment_dataset",
    "demo": "demo",
    "evaluate": "evaluate",
    "convert": "convert",
    "sweep": "sweep",
    "ablate": "ablate",
    "linear_probe": "linear_probe",
    "figures": "figures",
    "plan": "plan",
    "prepare": "data.prepare.__main__",
    "inspect": "data.inspect",
}


def main() -> None:
    """Runs the command that the first argument names."""
    # As in simseg_jax/__init__.py: Ctrl-C ends the imports without a traceback.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    name = chosen(sys.argv[1:])
    sys.argv = [f"simseg {name}", *sys.argv[2:]]
    importlib.import_module(f"simseg_jax.{MODULES[name]}").main()


@report_user_errors
def chosen(arguments: list[str]) -> str:
    """The name of the command; --help and --version are answered here and end the process."""
    first = arguments[0] if arguments else ""
    if first in ("--help", "-h"):
        print("\n".join(overview()))
        sys.exit(0)
    if first == "--version":
        print(f"simseg_jax {simseg_jax.__version__}")
        sys.exit(0)
    name = first.replace("-", "_")
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, 1)
        what = f"There is no command {first}" if first else "Name a command"
        nearest = f"the nearest is {near[0]}; " if near else ""
        raise UserError(f"{what}; {nearest}simseg --help lists all.")
    return name


def overview() -> Iterator[str]:
    """The lines of the help."""
    yield from ("usage: simseg COMMAND ...", "", str(simseg_jax.__doc__), "")
    for name, module in MODULES.items():
        lines = textwrap.wrap(description(module), 60)
        yield f"  {name:17}{lines[0]}"
        yield from (f"{'':19}{line}" for line in lines[1:])
    yield ""
    yield "`simseg COMMAND --help` shows options and examples, `simseg --version` the version."


def description(module: str) -> str:
    """What a command's parser says of it: the second argument of `make_parser`."""
    path = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(ast.Name("make_parser"), [_, ast.Constant(str(text)), *_]):
                return text
    raise ValueError(f"{module} makes no parser")


if __name__ == "__main__":
    main()
