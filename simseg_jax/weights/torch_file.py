"""Reads and writes tensors in PyTorch `.pth` files without PyTorch and without executing anything.

A `.pth` file is a zip archive: one pickle that describes the objects and one raw file per storage.
The pickle may name any Python function; the reader resolves the four kinds of names that a plain
dictionary of tensors needs and refuses every other one.
"""

import collections
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from simseg_jax.errors import UserError, require_file

DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
STORAGES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def load_tensors(path: str | Path) -> Any:
    """The object stored in `path` with every tensor as a NumPy array (float32, int64, ...)."""
    path = require_file(Path(path), "the checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            name = next(n for n in names if n.endswith("/data.pkl"))
            root = name.removesuffix("data.pkl")
            if any(n.startswith(f"{root}code/") for n in names):
                raise UserError(
                    f"{path} is a TorchScript program, not a file of tensors: take the safetensors "
                    "file of the same model."
                )
            byteorder = root + "byteorder"
            if byteorder in names and archive.read(byteorder) != b"little":
                raise UserError(f"{path} was written on a big-endian machine; save it again.")
            with archive.open(name) as file:
                return _TensorUnpickler(file, archive, root).load()
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(
            f"{path} is not a PyTorch zip checkpoint (or is damaged): download it again, or, if it "
            "comes from PyTorch before 1.6, save it once more with a newer one."
        ) from error
    except (
        pickle.UnpicklingError,
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{path} cannot be read as a file of plain tensors: {error}") from error


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_requires_grad_and_hooks: tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(
            f"it asks to run {module}.{name}, which is refused. If you trust the file, save its "
            'state dict alone with PyTorch: torch.save({"state_dict": ...}, PATH).'
        )

    def persistent_load(self, pid) -> np.ndarray:
        _, dtype, key, _, size = pid
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype, count=size)


def _rebuild_tensor(storage, offset, size, stride, *_unused) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min((*stride, *size, 0)) < 0 or (all(size) and last >= storage.size):
        raise ValueError("a tensor reaches beyond its storage; the file is damaged.")
    if math.prod(size) > storage.size:
        raise ValueError("a tensor has more elements than its storage; save a contiguous copy.")
    strides = [s * storage.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
    return view.copy()


def save_tensors(path: Path, content: dict) -> None:
    """Writes what `torch.load(path, weights_only=True)` gives back with tensors for arrays.

    content: nested dictionaries with string keys; arrays, strings, integers, floats, None.
    """
    storages: list[np.ndarray] = []
    described = pickle.PROTO + b"\x02" + _pickled(content, storages) + pickle.STOP
    root = path.stem
    # Stored, not compressed: PyTorch maps the storages into memory.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, f"{root}/data.pkl", described)
        _add(archive, f"{root}/byteorder", b"little")
        for key, storage in enumerate(storages):
            _add(archive, f"{root}/data/{key}", storage.tobytes())
        _add(archive, f"{root}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)
    assert archive.fp is not None
    # PyTorch wants the data of an entry at a multiple of 64 bytes: a header field fills the gap.
    begin = archive.fp.tell() + 30 + len(name.encode()) + 4
    padding = -begin % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(info, data)


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The pickle of `value`: PyTorch's names are written as they are, it need not be installed."""
    if isinstance(value, dict):
        items = [_pickled(k, storages) + _pickled(v, storages) for k, v in value.items()]
        return pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    if isinstance(value, np.ndarray):
        storages.append(value)
        name = STORAGES[value.dtype]
        strides = np.cumprod([1, *value.shape[:0:-1]])[::-1] if value.ndim else ()
        identity = (
            _pickled("storage", storages)
            + _named("torch", name)
            + _pickled(str(len(storages) - 1), storages)
            + _pickled("cpu", storages)
            + _pickled(value.size, storages)
        )
        arguments = (
            _tuple(identity)
            + pickle.BINPERSID
            + _pickled(0, storages)
            + _tuple(b"".join(_pickled(n, storages) for n in value.shape))
            + _tuple(b"".join(_pickled(int(n), storages) for n in strides))
            + pickle.NEWFALSE
            + _named("collections", "OrderedDict")
            + pickle.EMPTY_TUPLE
            + pickle.REDUCE
        )
        rebuild = _named("torch._utils", "_rebuild_tensor_v2")
        return rebuild + _tuple(arguments) + pickle.REDUCE
    # Everything else as Python pickles it, without the frame around it.
    return pickle.dumps(value, protocol=2)[2:-1]


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(items: bytes) -> bytes:
    return pickle.MARK + items + pickle.TUPLE
