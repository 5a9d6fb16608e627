"""Local and remote files: search, and positional reads with retries.

URLs (gs://, s3://, hf://, https://, memory://) go through fsspec and its drivers. All functions
raise `OSError` for files that cannot be read and `UserError` for a missing driver. If the network
keeps failing, the `OSError` is a `ConnectionError`: it says nothing about the data, so building an
index must stop rather than leave a file out.
"""

import contextlib
import glob
import io
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from tqdm import tqdm

from simseg_jax.runtime import files
from simseg_jax.runtime.errors import UserError

WAITS = (0.5, 1, 2)  # Seconds before the second, third and fourth attempt.
BUFFER = 8 << 20  # Bytes fetched at once when a remote file is read from start to end.
# The names under which drivers report the version of a file.
STAMPS = ("etag", "ETag", "mtime", "LastModified", "generation", "updated", "blob_id", "created")


class File(NamedTuple):
    """A file with the size and stamp that identify its version."""

    path: str
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return "://" in path


def local_path(path: str) -> str:
    """`path` with ~ and file:// resolved."""
    bare = path.removeprefix("file://")
    return bare if is_remote(bare) else os.path.expanduser(bare)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden: .DS_Store, ._x.jpg, .ipynb_checkpoints, __MACOSX."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def join(folder: str, name: str) -> str:
    """`name` below `folder`; as with paths, '' is the folder itself and '..' its parent."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    protocol, rest = folder.split("://", 1)
    return f"{protocol}://{posixpath.normpath(posixpath.join(rest, name))}"


def read(path: str, offset: int = 0, size: int = -1) -> bytes:
    """`size` bytes from `offset` on; -1: everything up to the end."""
    if is_remote(path):
        system, name = _connect(path)
        # Drivers that open a file for each read would fetch several megabytes ahead.
        options = {} if system.async_impl else {"cache_type": "none"}
        end = None if size < 0 else offset + size
        data = _retry(path, lambda: system.cat_file(name, start=offset, end=end, **options))
    else:
        # Opened for every read: that is cheap and thread-safe, and data sets have more shards than
        # a process may keep open.
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except (ValueError, OverflowError) as error:  # A name with NUL, an impossible offset.
            raise OSError(f"{path!r}: {error}") from error
    if 0 <= size != len(data):
        raise OSError(f"{path} ends before byte {offset + size}")
    return data


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading and seeking, with retries if it is remote."""
    return io.BufferedReader(_Ranges(path), BUFFER) if is_remote(path) else open(path, "rb")


def exists(path: str) -> bool:
    """Whether `path` is a file."""
    if not is_remote(path):
        return os.path.isfile(path)
    system, name = _connect(path)
    return _retry(path, lambda: system.isfile(name))


def find(pattern: str) -> list[File]:
    """The files that a path, folder (not its subfolders), glob or range {000..123} names, sorted.

    Hidden files are found only by their exact name: macOS puts ._00000.tar beside 00000.tar.
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
    """(files, subfolders) directly in a folder, sorted; both are empty if it is not a folder."""
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


def below(folder: str) -> dict[str, File]:
    """Path below a remote folder -> file, of the folder and its subfolders; hidden are left out."""
    system, name = _connect(folder)
    infos = _retry(folder, lambda: system.find(name, detail=True)).values()
    root = system.unstrip_protocol(name).rstrip("/") + "/"
    found = (_remote_file(system, info) for info in infos)
    named = {file.path.removeprefix(root): file for file in found}
    return {path: f for path, f in named.items() if not any(map(is_hidden, path.split("/")))}


@contextlib.contextmanager
def appearing(path: str) -> Iterator[Path]:
    """As `files.appearing`; for a URL a file in the temporary folder, which is then uploaded."""
    if not is_remote(path):
        with files.appearing(Path(path)) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (local := Path(folder) / path.rpartition("/")[2])
        system, name = _connect(path)
        _retry(path, lambda: system.put_file(str(local), name))


def is_damage(error: Exception) -> bool:
    """Whether an error is about the content of a file, not the network or the operating system.

    Errors of the operating system, such as a full disk, carry an errno.
    """
    others = ConnectionError | UserError
    return not isinstance(error, others) and getattr(error, "errno", None) is None


def progress(items, total: int, what: str):
    """Wraps `items` in a progress bar, shown on terminals only."""
    return tqdm(items, total=total, desc=what, unit="file", leave=False, disable=None)


class _Ranges(io.RawIOBase):
    """A remote file read by positional reads, each of which is retried."""

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
    """The result of `call`, with retries after errors of any type, as drivers raise them."""
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
    """Every path of a range such as shard-{0000..0123}.tar; several ranges are combined."""
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
    """Whether it is a file or a broken link, which is reported when it is read."""
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _local_file(path: str) -> File:
    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _remote_file(system, info: dict) -> File:
    stamp = " ".join(str(info[key]) for key in STAMPS if key in info)
    return File(system.unstrip_protocol(info["name"]), info["size"], stamp)
