"""Files by path or address: search, positional reads with retries, copies in the cache folder.

Addresses (gs://, s3://, hf://, https://, memory://) go through fsspec and its drivers. All of these
functions raise `OSError` for what cannot be read and `UserError` for a missing driver. Where the
network fails for good that is a `ConnectionError`: it says nothing about the data, so an index must
stop there rather than leave something out.
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from tqdm import tqdm

from simseg_jax.data.pairs.example import Problems
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.files import sha256, write_json

VERSION = 3  # Of the files in the cache folder: to be raised with any change of their content.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WAITS = (0.5, 1, 2)  # Seconds before a second, third and fourth attempt.
BUFFER = 8 << 20  # Bytes fetched at once where a remote file is read from start to end.
# What drivers call the version of a file, in their own words.
STAMPS = ("etag", "ETag", "mtime", "LastModified", "generation", "updated", "blob_id", "created")


class File(NamedTuple):
    """A file and what tells its versions apart."""

    path: str
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Whether `path` is an address."""
    return "://" in path


def local_path(path: str) -> str:
    """`path` with ~ and file:// resolved."""
    bare = path.removeprefix("file://")
    return bare if is_remote(bare) else os.path.expanduser(bare)


def is_hidden(name: str) -> bool:
    """Whether a name is that of system files: .DS_Store, ._x.jpg, .ipynb_checkpoints, __MACOSX."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def join(folder: str, name: str) -> str:
    """`name` below `folder`; as with paths, '' is the folder itself and '..' leads upwards."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    protocol, rest = folder.split("://", 1)
    return f"{protocol}://{posixpath.normpath(posixpath.join(rest, name))}"


def read(path: str, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes from `offset` on; -1: all up to the end."""
    if is_remote(path):
        system, name = _connect(path)
        # Drivers that open a file for each read would fetch several megabytes ahead.
        options = {} if system.async_impl else {"cache_type": "none"}
        end = None if size < 0 else offset + size
        data = _retry(path, lambda: system.cat_file(name, start=offset, end=end, **options))
    else:
        # Opened anew: cheap, safe in threads, and data sets have more shards than a process may
        # keep open.
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except (ValueError, OverflowError) as error:  # A name with NUL, a senseless place.
            raise OSError(f"{path!r}: {error}") from error
    if 0 <= size != len(data):
        raise OSError(f"{path} ends before byte {offset + size}")
    return data


def open_file(path: str) -> BinaryIO:
    """The file opened for reading and seeking, with retries if it is remote."""
    return io.BufferedReader(_Ranges(path), BUFFER) if is_remote(path) else open(path, "rb")


def exists(path: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    system, name = _connect(path)
    return _retry(path, lambda: system.isfile(name))


def find(pattern: str) -> list[File]:
    """The files of a path, folder (those directly in it), glob or range {000..123}, sorted.

    Hidden ones only if they are named: systems keep ._00000.tar beside 00000.tar.
    """
    found = []
    for path in _expand(pattern):
        matches = [
            file
            for file in _matches(path) or listing(path)[0]
            if file.path == path or not is_hidden(file.path.rpartition("/")[2])
        ]
        if not matches:
            raise UserError(f"No file matches {path}.")
        found += matches
    return sorted(found)


def listing(folder: str) -> tuple[list[File], list[str]]:
    """(files, subfolders) directly in a folder, sorted; both empty if it is no folder."""
    if is_remote(folder):
        system, name = _connect(folder)
        if not _retry(folder, lambda: system.isdir(name)):
            return [], []
        infos = _retry(folder, lambda: system.ls(name, detail=True))
        files = [_remote_file(system, info) for info in infos if info["type"] == "file"]
        folders = [system.unstrip_protocol(i["name"]) for i in infos if i["type"] == "directory"]
    else:
        names = [e.path for e in os.scandir(folder)] if os.path.isdir(folder) else []
        files = [_local_file(name) for name in names if _is_file(name)]
        folders = [name for name in names if os.path.isdir(name)]
    return sorted(files), sorted(folders)


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


def local_copy(file: File, cache: Path) -> str:
    """The path of `file`, copied into the cache folder once if it is remote."""
    if not is_remote(file.path):
        return file.path

    def copy(path: Path) -> Problems:
        with open_file(file.path) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, BUFFER)
        return Problems()

    return str(cached(cache, ("copy", *file), ".copy", copy)[0])


def is_damage(error: Exception) -> bool:
    """Whether an error is about the content of a file, not the network or the operating system.

    Those of the operating system, such as a full disk, carry a number.
    """
    others = ConnectionError | UserError
    return not isinstance(error, others) and getattr(error, "errno", None) is None


def progress(items, total: int, what: str):
    """`items` under a progress bar on terminals."""
    return tqdm(items, total=total, desc=what, unit="file", leave=False, disable=None)


class _Ranges(io.RawIOBase):
    """A remote file made of positional reads, so that every one of them is retried."""

    def __init__(self, path: str):
        system, name = _connect(path)
        self.path, self.position = path, 0
        self.size = _retry(path, lambda: system.info(name))["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self.size - self.position))
        if size:
            buffer[:size] = read(self.path, self.position, size)
            self.position += size
        return size


def _connect(path: str):
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"Cannot open {path}: {error}.") from error


def _retry(path: str, call: Callable) -> Any:
    """The result of `call`, after retries; drivers raise errors of any type."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (FileNotFoundError, PermissionError) as error:
            raise OSError(f"{path}: {type(error).__name__}") from error
        except Exception as error:
            if wait is None:
                message = f"{path} failed {len(WAITS) + 1} times: {error!r}"
                raise ConnectionError(message) from error
            time.sleep(wait)


def _expand(pattern: str) -> list[str]:
    """Every path of a range such as shard-{0000..0123}.tar; of several ranges, all of them."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    paths = [pattern[: match.start()] + n + pattern[match.end() :] for n in numbers]
    return [path for part in paths for path in _expand(part)]


def _matches(path: str) -> list[File]:
    if is_remote(path):
        system, name = _connect(path)
        infos = _retry(path, lambda: system.glob(name, detail=True)).values()
        return [_remote_file(system, info) for info in infos if info["type"] == "file"]
    names = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    return [_local_file(name) for name in names if _is_file(name)]


def _is_file(path: str) -> bool:
    """Whether it is a file, or a link to nowhere: reading it will say so."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _local_file(path: str) -> File:
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _remote_file(system, info: dict) -> File:
    stamp = " ".join(str(info[key]) for key in STAMPS if key in info)
    return File(system.unstrip_protocol(info["name"]), info["size"], stamp)
