"""Indexes and copies of data sets in the cache folder, each beside a JSON of its problems."""

import errno
import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from simseg_jax.data.pairs.example import Problems
from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import writing
from simseg_jax.runtime.files import appearing, sha256, write_json

VERSION = 3  # Raise it whenever the content of the cached files changes.
ADVICE = "Set data.cache to a folder that can be written and has room."
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached(
    folder: Path, identity: tuple, suffix: str, build: Callable[[Path], Problems]
) -> tuple[Path, Problems]:
    """The cached file and its problems, from an earlier run or written by `build` now.

    identity: everything that the content depends on, except `VERSION`. Several processes may build
    the same file at once: it gets its name only when it is complete. A damaged file is built again.
    A `UserError` says that the folder has no room or cannot be written.
    """
    key = hashlib.sha256(repr((VERSION, *identity)).encode(errors="backslashreplace")).hexdigest()
    path = folder / (key[:24] + suffix)
    notes = path.with_suffix(".json")
    if (problems := _noted(path, notes)) is not None:
        return path, problems
    storing = functools.partial(writing, f"to the cache folder {folder}", lambda: ADVICE)
    with storing():
        folder.mkdir(parents=True, exist_ok=True)
    with appearing(path) as partial:
        with storing():
            partial.touch()
        try:
            problems = build(partial)
        except OSError as error:
            if error.errno not in FULL:  # The error is about the data that `build` reads.
                raise
            with storing():
                raise
        with storing():
            status, digest = partial.stat(), sha256(partial)
            known = {"size": status.st_size, "mtime": status.st_mtime_ns, "digest": digest}
            write_json(notes, {"problems": asdict(problems), **known})
    return path, problems


def _noted(path: Path, notes: Path) -> Problems | None:
    """The problems of a cached file; None if it is missing or not as it was written."""
    try:
        known, status = json.loads(notes.read_bytes()), path.stat()
        problems = Problems(**known["problems"])
        if status.st_size != known["size"]:
            return None
        # Copying the folder changes the time but not the content.
        if status.st_mtime_ns != known["mtime"] and sha256(path) != known["digest"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return problems


def local_copy(file: remote.File, cache: Path) -> str:
    """The local path of `file`; a remote one is copied into the cache folder once."""
    if not remote.is_remote(file.path):
        return file.path

    def copy(path: Path) -> Problems:
        with remote.open_file(file.path) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, remote.BUFFER)
        return Problems()

    return str(cached(cache, ("copy", *file), ".copy", copy)[0])
