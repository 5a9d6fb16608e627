"""Files: their versions, writing them completely or not at all, errors that name them."""

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from simseg_jax.runtime.errors import UserError


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
    """A file to write, renamed to `path` on success: no file there is ever incomplete."""
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")  # A long name would not fit twice.
    try:
        with naming(path):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content) -> None:
    """Writes indented JSON that replaces `path` at once."""
    with appearing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_writable(folder: Path) -> Path:
    """Returns `folder`, created if needed; a `UserError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror}.") from error
    return folder
