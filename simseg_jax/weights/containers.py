"""Named arrays from weights: safetensors, NumPy's .npz, PyTorch's .pth, or a folder of them."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from simseg_jax.runtime.errors import UserError, reading, some
from simseg_jax.runtime.files import read_json, sha256
from simseg_jax.weights import bounds
from simseg_jax.weights.torch_file import load_tensors

SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
# JSON files of timm, transformers and open_clip beside the weights, which describe the model.
SETTINGS = ("config.json", "preprocessor_config.json", "open_clip_config.json")
# A folder may hold the same weights in several containers: the first of these is taken. The order
# prefers the safer ones.
USUAL = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"
GET_AGAIN = "Get the file again, or save its state dict alone with PyTorch."
# Our own files describe the architecture under these names; tensors alone do not determine it.
META, ARCHITECTURE = "simseg_jax", "architecture"

Tensors = Mapping[str, np.ndarray]
Settings = Mapping[str, dict]


class Weights(NamedTuple):
    """The tensors of a file or folder and what is known about them.

    tensors: by name; the keys of nested dictionaries are joined, as in "state_dict.norm.weight".
    settings: name -> content of the JSON files beside the weights. meta: texts and numbers inside
    the weights file, in groups. key: chooses among several models in the file, see
    `sources.split_key`.
    """

    tensors: dict[str, np.ndarray]
    settings: dict[str, dict]
    meta: dict[str, Any]
    files: Sequence[Path]
    key: str = ""

    @property
    def origin(self) -> dict[str, Any]:
        """The key, and the SHA-256 of every file, for which the files are read again."""
        key = {"key": self.key} if self.key else {}
        return {"files": {str(file): sha256(file) for file in self.files}, **key}


def read_weights(path: Path, key: str = "") -> Weights:
    """Reads a weights file, or the weights file or files in a folder; key: see `Weights`."""
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
    described = [name for name in SETTINGS if (folder / name).is_file()]
    settings = {name: read_settings(folder / name) for name in described}
    return Weights(tensors, settings, meta, files, key)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside weights."""
    return read_json(path, largest=bounds.JSON)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(read_settings(folder / INDEX).get("weight_map", {}).values()))
        # Only the last part of a path: an index must not lead out of its folder.
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
    """(tensors, meta) of one file, whose container is recognised by content, not by suffix."""
    if not file.is_file():
        raise UserError(f"No weights at {file}: it is no file or folder here.")
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if all(name.endswith(".npy") for name in archive.namelist()):
                return _read_npz(archive, file.stat().st_size), {}
        content = load_tensors(file)
        if not isinstance(content, dict):
            raise UserError(f"{file} holds no state dict: save one with PyTorch.")
        return _flat(content), _facts(content)
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[8:] == b"{":
        return _read_safetensors(file, int.from_bytes(start[:8], "little"))
    raise UserError(
        f"{file} is neither safetensors, nor a .npz, nor a .pth of PyTorch 1.6 or newer, or it is "
        "damaged: get the file again, or save it with a newer PyTorch."
    )


def _read_safetensors(file: Path, header: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if header > bounds.HEADER:
        raise ValueError(f"its header has {header:,} bytes, at most {bounds.HEADER:,} are read")
    with safe_open(file, framework="numpy") as opened:
        words = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors, {META: {ARCHITECTURE: words[META]}} if META in words else {}


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    """The arrays of an archive of `size` bytes; `np.load` would inflate them without a limit."""
    members = archive.infolist()
    inflated = sum(member.file_size for member in members)
    if inflated > bounds.inflated(size) or len(members) > bounds.TENSORS:
        raise ValueError(f"its {len(members):,} arrays would take {inflated:,} bytes")
    arrays = {}
    for member in members:
        with archive.open(member) as opened:
            try:
                array = np.lib.format.read_array(opened, allow_pickle=False)
            except ValueError as error:  # Replaces NumPy's advice to allow pickles, which run code.
                raise ValueError(f"{member.filename} is no array of numbers") from error
        # NumPy writes bfloat16 as two bytes without a type.
        typed = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
        arrays[member.filename.removesuffix(".npy")] = typed
    return arrays


def _flat(content: dict) -> dict[str, np.ndarray]:
    """The tensors of nested dictionaries, named by their keys, which dots join."""
    flat: dict[str, np.ndarray] = {}
    seen = set()  # A dictionary may contain itself.

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
    """The texts and numbers in the dictionaries of a `.pth`, by dictionary."""
    groups = {}
    for name, group in content.items():
        if isinstance(name, str) and isinstance(group, dict):
            facts = {k: v for k, v in group.items() if isinstance(k, str) and _is_plain(v)}
            if 0 < len(facts) <= 50:
                groups[name] = facts
    return groups


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 10_000)
