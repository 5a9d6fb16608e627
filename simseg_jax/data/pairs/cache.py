"""Indexes and copies of data sets in the cache folder, each beside a note of what was left out."""

import contextlib
import errno
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from simseg_jax.data.pairs.example import Problems
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.files import sha256, write_json

VERSION = 3  # Of the cached files: to be raised with any change of their content.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached(
    folder: Path, identity: tuple, suffix: str, build: Callable[[Path], Problems]
) -> tuple[Path, Problems]:
    """The cached file and its problems, from an earlier run or written by `build` now.

    identity: all that the content depends on besides `VERSION`. Several processes may build the
    same file at once: it appears under its name only when it is complete. A damaged file is built
    again. A `UserError` says that the folder has no room or cannot be written.
    """
    key = hashlib.sha256(repr((VERSION, *identity)).encode(errors="backslashreplace")).hexdigest()
    path = folder / (key[:24] + suffix)
    notes = path.with_suffix(".json")
    if (problems := _noted(path, notes)) is not None:
        return path, problems
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial.touch()
    try:
        with _writing(folder, *FULL):
            problems = build(partial)
        with _writing(folder):
            status, digest = partial.stat(), sha256(partial)
            told = {"size": status.st_size, "mtime": status.st_mtime_ns, "digest": digest}
            write_json(notes, {"problems": asdict(problems), **told})
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path, problems


def _noted(path: Path, notes: Path) -> Problems | None:
    """The problems of a cached file; None if it is missing or not as it was written."""
    try:
        told, status = json.loads(notes.read_bytes()), path.stat()
        problems = Problems(**told["problems"])
        if status.st_size != told["size"]:
            return None
        # Another time alone may be that of a copy of the folder.
        if status.st_mtime_ns != told["mtime"] and sha256(path) != told["digest"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return problems


@contextlib.contextmanager
def _writing(folder: Path, *numbers: int) -> Iterator[None]:
    """Turns errors of the system, or only some, into a `UserError` about the cache folder."""
    try:
        yield
    except OSError as error:
        if numbers and error.errno not in numbers:
            raise
        reason = error.strerror or one_line(error)
        raise UserError(
            f"Cannot write to the cache folder {folder}: {reason}. Set data.cache to a folder that "
            "can be written and has room."
        ) from error


def local_copy(file: remote.File, cache: Path) -> str:
    """The path of `file`, copied into the cache folder once if it is remote."""
    if not remote.is_remote(file.path):
        return file.path

    def copy(path: Path) -> Problems:
        with remote.open_file(file.path) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, remote.BUFFER)
        return Problems()

    return str(cached(cache, ("copy", *file), ".copy", copy)[0])
