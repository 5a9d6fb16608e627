"""Files: their versions, writing them completely or not at all, errors that name them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simseg_jax.runtime.errors import UserError, reading

CACHE = "SIMSEG_CACHE"


def stamp(path: str | Path) -> str:
    """SIZE:TIME of a file, in bytes and in ns of its last change; tells its versions apart."""
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"


def digest(content) -> str:
    """16 hexadecimal digits of the SHA-256 of bytes, or of the JSON of anything else."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def sha256(path: Path) -> str:
    """The checksum of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to file-system errors without a name, such as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place to write a file or folder, renamed to `path` on success: it is never incomplete.

    Several processes may write the same `path` at once.
    """
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # A long name would not fit twice.
    try:
        with naming(path):
            yield partial
        try:
            partial.replace(path)
        except OSError as error:
            # Folders do not replace each other: the one that came first has the same content.
            if error.errno != errno.ENOTEMPTY:
                raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def read_json(
    path: Path, advice: str = "Get the file again.", largest: int | None = None
) -> dict[str, Any]:
    """The object in a JSON file; a `UserError` with the advice if there is none.

    largest: in bytes, for files of others.
    """
    with reading(str(path), advice):
        size = path.stat().st_size
        if largest is not None and size > largest:
            raise ValueError(f"it has {size:,} bytes, at most {largest:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content


def write_json(path: Path, content) -> None:
    """Writes indented JSON that replaces `path` at once."""
    with appearing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def cache_folder(configured: str = "") -> Path:
    """Where everything is kept that is made once and used again: indexes, copies, programs.

    The key `data.cache`, else the environment variable SIMSEG_CACHE, else ~/.cache/simseg_jax.
    """
    return Path(configured or os.environ.get(CACHE) or "~/.cache/simseg_jax").expanduser()


def make_writable(folder: Path) -> Path:
    """Returns `folder`, created if needed; a `UserError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror}.") from error
    return folder
