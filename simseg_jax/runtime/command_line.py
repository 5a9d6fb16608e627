"""What the commands have in common: parsers, shared options, progress bars, compilation cache."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from simseg_jax.runtime.errors import UserError
from simseg_jax.runtime.files import cache_folder, make_writable
from simseg_jax.runtime.ranges import Accepts, shown, whole
from simseg_jax.runtime.settings import field_of


def make_parser(module: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of `simseg_jax.MODULE`; the epilog is printed without reformatting."""
    return argparse.ArgumentParser(
        prog=spelled(module),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=re.sub(r"python -m simseg_jax\.([\w.]*\w)", lambda m: spelled(m[1]), epilog),
        allow_abbrev=False,
    )


def spelled(module: str) -> str:
    """The command line that starts `simseg_jax.MODULE`, in the way this process was started."""
    if not sys.argv[0].startswith("simseg "):  # See simseg_jax/__main__.py.
        return f"python -m simseg_jax.{module}"
    name = module.rpartition(".")[2]
    return f"simseg {'train' if name == 'main' else name}"


def results_folder(checkpoint: str) -> Path:
    """Default folder for results: the checkpoint's; if it is remote, a local one of its name."""
    folder = Path(checkpoint)
    return folder if folder.is_dir() else Path(checkpoint.rstrip("/").rpartition("/")[2])


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint and --step."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's --workdir or converted folder: path, URL or hub id",
    )
    parser.add_argument(
        "--step", type=accepted(whole(0)), help="which checkpoint; default: the newest"
    )


def accepted(accepts: Accepts, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """A `type` for argparse: converts with `kind` and rejects values that are not accepted."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts.allows(value):
            raise argparse.ArgumentTypeError(f"{shown(text)} must be {accepts.text}")
        return value

    return convert


def add_setting(parser, kind: type, name: str, text: str = "", default: Any = None) -> None:
    """Adds the option --NAME for the setting `name` of class `kind`, with the same valid values.

    text: the help, by default the setting's meaning. default: the option's default.
    """
    field = field_of(kind, name)
    parser.add_argument(
        f"--{name}",
        type=accepted(field.metadata["accepts"], type(field.default)),
        default=default,
        help=text or field.metadata["meaning"].replace("%", "%%"),
    )


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Adds --config."""
    parser.add_argument(
        "--config",
        required=True,
        help="configuration file, or the name of a packaged one, such as shapes",
    )


def add_evals_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config and --test_set."""
    parser.add_argument(
        "--config",
        help="take evals from this file or packaged configuration, not from the checkpoint",
    )
    parser.add_argument("--test_set", help="comma-separated names in evals; default: all")


def image_bar(name: str) -> Callable[[Iterable], Iterable]:
    """A function that wraps an iterable of images in a progress bar, shown by process 0 only."""

    def bar(images: Iterable) -> Iterable:
        return tqdm(images, desc=name, unit="image", disable=jax.process_index() > 0)

    return bar


def cache_programs() -> None:
    """Keeps compiled programs in the cache folder, so that the next start is faster.

    JAX's own JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=0
    switches the cache off. If the folder cannot be written to, a message says so and every start
    compiles again.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        folder = make_writable(cache_folder() / "programs")
    except (UserError, RuntimeError) as error:  # RuntimeError: there is no home folder.
        print(f"Compiled programs are not kept for the next start: {error}", file=sys.stderr)
    else:
        jax.config.update("jax_compilation_cache_dir", str(folder))
