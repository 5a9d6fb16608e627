"""Finding weights (here, on object storage, on the hub) and reading the container they are in."""

import contextlib
import hashlib
import json
import re
import shutil
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from simseg_jax.data.pairs import remote
from simseg_jax.errors import UserError
from simseg_jax.weights.torch_file import load_tensors

CACHE = Path("~/.cache/simseg_jax/weights")
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
# What describes a model beside its weights, in the words of timm, transformers and open_clip.
SETTINGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
# The usual names, the safest first: those of a folder that holds the same weights several times.
USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"
HUB_FILES = ["*.json", "*.txt", "README.md", "params/**", "tokenizer/**"]


class Weights(NamedTuple):
    """The tensors of a file or folder and what is known about them.

    settings: the JSON files beside them, by name. meta: what a `.pth` holds beside its state dict.
    """

    tensors: dict[str, np.ndarray]
    settings: dict[str, dict]
    meta: dict[str, Any]
    files: Sequence[Path]

    @property
    def origin(self) -> dict[str, Any]:
        """The files with their SHA-256, for which they are read once more."""
        return {"files": {str(file): sha256(file) for file in self.files}}


def fetch(source: str | Path) -> Path:
    """The local file or folder of a path, an address (gs://, s3://, hf://) or a hub repository.

    A repository is "owner/name" or "owner/name@revision". Copies are kept: those of addresses in
    ~/.cache/simseg_jax/weights, those of the hub in its own cache.
    """
    text = str(source)
    if remote.is_remote(text) and not text.startswith("file://"):
        return _copy(text.rstrip("/"))
    path = Path(remote.local_path(text))
    if path.exists() or not re.fullmatch(HUB_ID, text):
        return path.absolute()
    return _from_hub(text)


def read_weights(path: Path) -> Weights:
    """The tensors of a file, or of the weights file or files in a folder."""
    files = _weight_files(path) if path.is_dir() else [path]
    tensors: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {}
    for file in files:
        content, extra = _read(file)
        tensors |= content
        meta |= extra
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    folder = files[0].parent
    settings = {name: read_json(folder / name) for name in SETTINGS if (folder / name).is_file()}
    return Weights(tensors, settings, meta, files)


def sha256(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): get the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: get the file again.")
    return content


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        # Names, not paths: an index must not lead out of its folder.
        files = [folder / Path(name).name for name in names]
    else:
        files = [folder / name for name in USUAL if (folder / name).is_file()][:1]
        files = files or sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
        if len(files) > 1:
            listed = ", ".join(file.name for file in files)
            raise UserError(f"{folder} holds several weights files, name one of them: {listed}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {', '.join(missing)}" if missing else "holds no weights"
        raise UserError(f"{folder} {what} ({', '.join(SUFFIXES)}): name another folder or file.")
    return files


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, what else a `.pth` says) of one file, whatever its name ends with."""
    if not file.is_file():
        raise UserError(f"No weights at {file}: it is no file or folder here.")
    with file.open("rb") as opened:
        start = opened.read(9)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return _read_npz(file), {}
        return _state_dict(load_tensors(file), file)
    if start[8:] == b"{":
        try:
            return load_file(file), {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}): get the file again.") from error
    raise UserError(
        f"{file} is neither safetensors, nor a .npz, nor a .pth of PyTorch 1.6 or newer, or it is "
        "damaged: get the file again, or save it with a newer PyTorch."
    )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {name: _known_type(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is damaged ({error}): get the file again.") from error


def _known_type(array: np.ndarray) -> np.ndarray:
    # NumPy writes bfloat16 as two bytes of no type.
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _state_dict(content: Any, file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    meta = {}
    if isinstance(content, dict):
        for key in ("state_dict", "model"):
            if isinstance(content.get(key), dict):
                content, meta = content[key], content
                break
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no state dict: save one with PyTorch.")
    tensors = {k: v for k, v in content.items() if isinstance(v, np.ndarray)}
    return tensors, {k: v for k, v in meta.items() if isinstance(v, dict) and v is not content}


def _copy(address: str) -> Path:
    """A local copy of a remote folder, or of a remote file with the settings beside it."""
    files, name = _tree(address), ""
    if not files:
        folder, _, name = address.rpartition("/")
        wanted = (name, *SETTINGS)
        files = {n: file for n, file in _tree(folder, deep=False).items() if n in wanted}
        if name not in files:
            raise UserError(f"Nothing at {address}: give the address of a file or folder.")
    identity = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:24]
    target = CACHE.expanduser() / identity
    if not target.is_dir():
        # Complete or not there at all: several processes may copy at once.
        partial = target.with_name(f"{identity}.{uuid.uuid4().hex}.partial")
        try:
            for relative in remote.progress(files, len(files), f"Copying {address}"):
                path = partial / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                with remote.open_file(files[relative].path) as source, path.open("wb") as copy:
                    shutil.copyfileobj(source, copy, remote.BUFFER)
            with contextlib.suppress(OSError):  # Another process was first.
                partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target / name


def _tree(folder: str, deep: bool = True) -> dict[str, remote.File]:
    """The files below a remote folder by their relative paths."""
    files, folders = remote.listing(folder)
    found = {_name(file.path): file for file in files}
    for inner in folders if deep else ():
        found |= {f"{_name(inner)}/{path}": file for path, file in _tree(inner).items()}
    return found


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _from_hub(source: str) -> Path:
    # Slow to import.
    from huggingface_hub import snapshot_download

    repository, _, revision = source.partition("@")
    inner = [f"*/*{suffix}" for suffix in SUFFIXES]

    def download(patterns: list[str]) -> Path:
        # Without a network it gives what was downloaded before.
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=inner
        )
        return Path(folder)

    try:
        folder = download([*HUB_FILES, "*.safetensors"])
        if not (list(folder.glob("*.safetensors")) or (folder / "params").is_dir()):
            folder = download([*HUB_FILES, *(f"*{suffix}" for suffix in SUFFIXES)])
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"No file or folder {source} here, and the hub did not provide it "
            f"({type(error).__name__}: {reason}): check the name and the network."
        ) from error
    return folder
