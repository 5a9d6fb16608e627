"""Files: telling versions apart, atomic writing, errors that name the file, the cache folder."""

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

from simseg_jax.runtime.errors import UserError, one_line, reading

CACHE = "SIMSEG_CACHE"


def stamp(path: str | Path) -> str:
    """SIZE:TIME of a file (bytes, modification time in ns), which tells its versions apart."""
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"


def digest(content) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of bytes, or of anything else as JSON."""
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds `path` to file-system errors that name no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that is renamed to `path` on success.

    `path` is therefore never incomplete. Several processes may write the same `path` at once.
    """
    # Without the name of `path`: a long one with a suffix could exceed the limit.
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with naming(path):
            yield partial
        try:
            partial.replace(path)
        except OSError as error:
            # A folder cannot replace another; the first one written has the same content.
            if error.errno != errno.ENOTEMPTY:
                raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def read_json(
    path: Path, advice: str = "Get the file again.", largest: int | None = None
) -> dict[str, Any]:
    """The object in a JSON file; a `UserError` with the advice if it cannot be read.

    largest: the maximum size in bytes, for untrusted files.
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
    """Writes indented JSON, replacing `path` atomically."""
    with appearing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_same(folder, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises a `UserError` that names what differs between a folder's job and the one wanted.

    "content" is the digest of the source's files.
    """
    differing = [key for key in wanted if saved.get(key) != wanted[key]]
    if differing == ["content"]:
        raise UserError(
            f"The files of the source have changed since {folder} was begun: use another --output, "
            "or delete that folder to start again."
        )
    if differing:
        pairs = {key: (repr(saved.get(key)), repr(wanted[key])) for key in differing}
        values = {k: [one_line(text, 80) for text in pair] for k, pair in pairs.items()}
        changes = ", ".join(f"{k}={old} instead of {new}" for k, (old, new) in values.items())
        raise UserError(
            f"{folder} holds another job, with {changes}: use another --output, or delete that "
            "folder to start again."
        )


def cache_folder(configured: str = "") -> Path:
    """The folder for everything that is made once and reused: indexes, copies, compiled programs.

    It is configured by the key `data.cache`, else by the environment variable SIMSEG_CACHE, else it
    is ~/.cache/simseg_jax.
    """
    return Path(configured or os.environ.get(CACHE) or "~/.cache/simseg_jax").expanduser()


def make_writable(folder: Path) -> Path:
    """Returns `folder`, created if needed; a `UserError` if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(f"Cannot write into {folder}: {error.strerror}.") from error
    return folder
