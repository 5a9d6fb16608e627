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
from safetensors import safe_open

from simseg_jax.runtime import remote
from simseg_jax.runtime.errors import UserError, one_line, reading, some
from simseg_jax.runtime.files import sha256
from simseg_jax.weights import bounds
from simseg_jax.weights.torch_file import load_tensors

CACHE = Path("~/.cache/simseg_jax/weights")
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
# Files beside the weights that describe the model: of timm, transformers and open_clip.
SETTINGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
# Of a folder that holds the same weights several times the first of these is taken: the safest.
USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
GET_AGAIN = "Get the file again, or save its state dict alone with PyTorch."
# Under this name our files describe the architecture, which the tensors alone do not tell.
META, ARCHITECTURE = "simseg_jax", "architecture"
HUB_ID = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"
HUB_FILES = ["*.json", "*.txt", "README.md", "params/**", "tokenizer/**"]


class Weights(NamedTuple):
    """The tensors of a file or folder and what is known about them.

    tensors: those of nested dictionaries have names such as "state_dict.norm.weight". settings: the
    JSON files beside them, by name. meta: words and numbers that the file holds beside them, in
    groups. key: which of several models in the file to take, see `split_key`.
    """

    tensors: dict[str, np.ndarray]
    settings: dict[str, dict]
    meta: dict[str, Any]
    files: Sequence[Path]
    key: str = ""

    @property
    def origin(self) -> dict[str, Any]:
        """The files with their SHA-256, for which they are read once more, and the key."""
        key = {"key": self.key} if self.key else {}
        return {"files": {str(file): sha256(file) for file in self.files}, **key}


def split_key(source: str | Path) -> tuple[str, str]:
    """("FILE", "KEY") of "FILE#KEY"; the key is empty without one, or if such a file exists.

    KEY tells which model to take where a file holds several: the part of the tensors' names that
    sets them apart, as in "checkpoint.pth#teacher"; "." is the one without any such part.
    """
    text = str(source)
    name, _, key = text.rpartition("#")
    return (name, key) if name and not Path(text).exists() else (text, "")


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


def read_weights(path: Path, key: str = "") -> Weights:
    """The tensors of a file, or of the weights file or files in a folder; key: see `split_key`."""
    tensors: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {}
    with reading(f"the weights {path}", GET_AGAIN):
        files = _weight_files(path) if path.is_dir() else [path]
        for file in files:
            content, extra = _read(file)
            twice = tensors.keys() & content.keys()
            if twice:
                raise UserError(f"{path} holds {some(sorted(twice))} in several files.")
            tensors |= content
            meta |= extra
        if len(tensors) > bounds.TENSORS:
            raise ValueError(f"it has {len(tensors):,} tensors, more than {bounds.TENSORS:,}")
        strange = [n for n in tensors if len(n) > bounds.NAME or not n.isprintable()]
        if strange or not tensors:
            raise ValueError(f"a tensor has the name {strange[0]!a}" if strange else "it is empty")
    folder = files[0].parent
    settings = {name: read_json(folder / name) for name in SETTINGS if (folder / name).is_file()}
    return Weights(tensors, settings, meta, files, key)


def read_json(path: Path) -> dict:
    """The object in a JSON file."""
    with reading(str(path), "Get the file again."):
        size = path.stat().st_size
        if size > bounds.JSON:
            raise ValueError(f"it has {size:,} bytes, at most {bounds.JSON:,} are read")
        content = json.loads(path.read_text(encoding="utf-8"))
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
            listed = some(file.name for file in files)
            raise UserError(f"{folder} holds several weights files, name one of them: {listed}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {some(missing)}" if missing else "holds no weights"
        raise UserError(f"{folder} {what} ({', '.join(SUFFIXES)}): name another folder or file.")
    return files


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, meta) of one file, whatever its name ends with."""
    if not file.is_file():
        raise UserError(f"No weights at {file}: it is no file or folder here.")
    with file.open("rb") as opened:
        start = opened.read(9)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return _read_npz(archive, file), {}
        content = load_tensors(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no state dict: save one with PyTorch.")
        return _flat(content), _facts(content)
    if start[8:] == b"{":
        return _read_safetensors(file, int.from_bytes(start[:8], "little"))
    raise UserError(
        f"{file} is neither safetensors, nor a .npz, nor a .pth of PyTorch 1.6 or newer, or it is "
        "damaged: get the file again, or save it with a newer PyTorch."
    )


def _read_npz(archive: zipfile.ZipFile, file: Path) -> dict[str, np.ndarray]:
    members = archive.infolist()
    inflated = sum(member.file_size for member in members)
    if inflated > bounds.inflated(file.stat().st_size) or len(members) > bounds.TENSORS:
        raise ValueError(f"its {len(members):,} arrays would take {inflated:,} bytes")
    arrays = {}
    for member in members:
        with archive.open(member) as opened:
            try:
                array = np.lib.format.read_array(opened, allow_pickle=False)
            except ValueError as error:  # NumPy's advice is to allow pickles, which run code.
                raise ValueError(f"{member.filename} is no array of numbers") from error
        # NumPy writes bfloat16 as two bytes of no type.
        typed = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        arrays[member.filename.removesuffix(".npy")] = typed
    return arrays


def _read_safetensors(file: Path, header: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if header > bounds.HEADER:
        raise ValueError(f"its header has {header:,} bytes, at most {bounds.HEADER:,} are read")
    with safe_open(file, framework="numpy") as opened:
        words = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, {META: {ARCHITECTURE: words[META]}} if META in words else {}


def _flat(content: dict) -> dict[str, np.ndarray]:
    """The tensors of nested dictionaries with the keys that lead to them, joined by dots."""
    flat: dict[str, np.ndarray] = {}
    seen = set()  # A dictionary may be in several others, or in itself.

    def add(inner: dict, prefix: str) -> None:
        seen.add(id(inner))
        for key, value in inner.items():
            name = f"{prefix}{key}"
            if len(name) > bounds.NAME:
                raise ValueError(f"a name has more than {bounds.NAME} characters")
            if isinstance(value, np.ndarray):
                if name in flat:
                    raise ValueError(f"two tensors have the name {name}")
                flat[name] = value
            elif isinstance(value, dict) and id(value) not in seen:
                add(value, f"{name}.")

    add(content, "")
    if not flat:
        raise ValueError(f"it holds no tensors, only {some(content) or 'nothing'}")
    return flat


def _facts(content: dict) -> dict[str, dict]:
    """The groups of words and numbers in the content of a `.pth`, for the record."""
    groups = {}
    for name, group in content.items():
        if isinstance(name, str) and isinstance(group, dict):
            facts = {k: v for k, v in group.items() if isinstance(k, str) and _is_plain(v)}
            if 0 < len(facts) <= 50:
                groups[name] = facts
    return groups


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 10_000)


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
        raise UserError(
            f"No file or folder {source} here, and the hub did not provide it "
            f"({type(error).__name__}: {one_line(error)}): check the name and the network."
        ) from error
    return folder
