"""Finding weights: local files, and local copies of those on object storage or the hub."""

import hashlib
import re
import shutil
from pathlib import Path

from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line
from simseg_jax.runtime.files import appearing, cache_folder
from simseg_jax.weights.containers import SETTINGS, SUFFIXES

HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"
HUB_FILES = ["*.json", "*.txt", "README.md", "params/**", "tokenizer/**"]


def split_key(source: str | Path) -> tuple[str, str]:
    """("FILE", "KEY") of "FILE#KEY"; ("FILE", "") without a key.

    KEY chooses among several models in a file by the prefix of their tensors, as in
    "checkpoint.pth#teacher"; "." is the model without a prefix. An existing file with # in its name
    has no key.
    """
    text = str(source)
    name, _, key = text.rpartition("#")
    return (name, key) if name and not Path(text).exists() else (text, "")


def fetch(source: str | Path) -> Path:
    """The local file or folder of a path, an address (gs://, s3://, hf://) or a hub repository.

    A repository is "owner/name" or "owner/name@revision". Copies from addresses are kept in the
    cache folder, those from the hub in the hub's own cache.
    """
    text = str(source)
    if remote.is_remote(text) and not text.startswith("file://"):
        return _copy(text.rstrip("/"))
    path = Path(remote.local_path(text))
    if path.exists() or not re.fullmatch(HUB_ID, text):
        return path.absolute()
    return _from_hub(text)


def _copy(address: str) -> Path:
    """A local copy of a remote folder, or of a remote file with the JSON files beside it."""
    files, name = _tree(address), ""
    if not files:
        folder, _, name = address.rpartition("/")
        wanted = (name, *SETTINGS)
        files = {n: file for n, file in _tree(folder, deep=False).items() if n in wanted}
        if name not in files:
            raise UserError(f"Nothing at {address}: give the address of a file or folder.")
    identity = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:24]
    target = cache_folder() / "weights" / identity
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with appearing(target) as partial:
            for relative in remote.progress(files, len(files), f"Copying {address}"):
                path = partial / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with remote.open_file(files[relative].path) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy, remote.BUFFER)
    return target / name


def _tree(folder: str, deep: bool = True) -> dict[str, remote.File]:
    """Relative path -> file, for all files below a remote folder."""
    files, folders = remote.listing(folder)
    found = {_name(file.path): file for file in files}
    for inner in folders if deep else ():
        found |= {f"{_name(inner)}/{path}": file for path, file in _tree(inner).items()}
    return found


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download  # Here, because it is slow.

    repository, _, revision = source.partition("@")
    inner = [f"*/*{suffix}" for suffix in SUFFIXES]

    def download(patterns: list[str]) -> Path:
        # Without a network it returns what was downloaded before.
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=inner
        )
        return Path(folder)

    try:
        folder = download([*HUB_FILES, "*.safetensors"])
        if not (list(folder.glob("*.safetensors")) or (folder / "params").is_dir()):
            folder = download([*HUB_FILES, *(f"*{suffix}" for suffix in SUFFIXES)])
    except (OSError, ValueError) as error:
        raise UserError(
            f"No file or folder {source} here, and the hub did not provide it "
            f"({type(error).__name__}: {one_line(error)}): check the name and the network."
        ) from error
    return folder
