"""Reads tensors from a PyTorch `.pth` file without PyTorch and without executing anything in it.

A `.pth` file is a zip archive: one pickle that describes the objects and one raw file per storage.
The pickle may name any Python function; this reader resolves the three kinds of names that a plain
dictionary of tensors needs and refuses every other one.
"""

import collections
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from simseg_jax.errors import UserError

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


def load_tensors(path: str | Path) -> dict:
    """The object stored in `path` with every tensor as a NumPy array (float32, int64, ...)."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint file at {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            root = name.removesuffix("data.pkl")
            byteorder = root + "byteorder"
            if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
                raise UserError(f"{path} was written on a big-endian machine; save it again.")
            with archive.open(name) as file:
                return _TensorUnpickler(file, archive, root).load()
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(
            f"{path} is not a PyTorch zip checkpoint (or is damaged): download it again, or, if it "
            "comes from PyTorch before 1.6, save it once more with a newer one."
        ) from error
    except (pickle.UnpicklingError, KeyError, ValueError, TypeError, EOFError) as error:
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
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which is refused.")

    def persistent_load(self, pid) -> np.ndarray:
        _, dtype, key, _, size = pid
        return np.frombuffer(self.archive.read(f"{self.root}data/{key}"), dtype, count=size)


def _rebuild_tensor(storage, offset, size, stride, *_unused) -> np.ndarray:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if offset < 0 or min((*stride, 0)) < 0 or (all(size) and last >= storage.size):
        raise ValueError("a tensor reaches beyond its storage; the file is damaged.")
    strides = [s * storage.itemsize for s in stride]
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
    return view.copy()
