"""Reads and writes PyTorch's `.pth` files without PyTorch; nothing in a file is executed.

A `.pth` file is a zip archive. Its entry data.pkl is a pickle that describes the objects; each
storage has an entry data/KEY of raw numbers. A pickle may ask to call any Python function. The
reader interprets the functions that build dictionaries of tensors, ignores those of other objects
that training loops save, and refuses all others.
"""

import math
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from simseg_jax.runtime.errors import UserError
from simseg_jax.weights import bounds

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
# Opcodes of pickles that push their argument unchanged.
PLAIN = (
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "BINFLOAT", "FLOAT"),
    "NONE",
)


def load_tensors(path: Path) -> Any:
    """The object stored in `path`, with every tensor as a NumPy array of the same type.

    Tensors are read-only views of their storages, which they may share. The parsers' errors about
    damaged files are not converted: call this within `errors.reading`.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        name = next((n for n in names if n.endswith("/data.pkl")), None)
        if name is None:
            raise UserError(
                f"{path} is a zip archive but no checkpoint of PyTorch: get the file again, or "
                "unpack it if it contains the weights."
            )
        root = name.removesuffix("data.pkl")
        if any(n.startswith(f"{root}code/") for n in names):
            raise UserError(
                f"{path} is a TorchScript program, not a file of tensors: take the safetensors "
                "file of the same model."
            )
        reader = _Reader(archive, root, path.stat().st_size)
        if root + "byteorder" in names and reader.entry("byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine; save it again.")
        return reader.unpickled(reader.entry("data.pkl"))


class _Storage(NamedTuple):
    data: bytes
    dtype: np.dtype


class _Ignored:
    """Stands for an object that is no tensor."""


# The functions that a pickle may ask for -> what `_make` returns for a call.
MADE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): "dictionary",
    ("torch._utils", "_rebuild_tensor_v2"): "tensor",
    ("torch._utils", "_rebuild_parameter"): "parameter",
    # Options and NumPy's scalars, which training loops save with the weights.
    ("argparse", "Namespace"): _Ignored,
    ("numpy", "dtype"): _Ignored,
    ("numpy.core.multiarray", "scalar"): _Ignored,
    ("numpy._core.multiarray", "scalar"): _Ignored,
    ("_codecs", "encode"): _Ignored,
    ("torch", "device"): _Ignored,
    ("torch", "Size"): _Ignored,
}


class _Reader:
    """Interprets the opcodes that PyTorch writes for dictionaries of tensors; nothing is called.

    Python's unpickler is no alternative: it calls what a file names, and a few bytes can exhaust
    it, since its memo grows to any index and hashing a key of nested tuples can take forever.

    size: bytes of the file, which limit the bytes of its entries and tensors.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, size: int):
        self.archive, self.root = archive, root
        self.storages: dict[str, bytes] = {}
        self.entry_bytes, self.tensor_bytes = size, bounds.inflated(size)
        self.tensors = bounds.TENSORS

    def entry(self, name: str) -> bytes:
        """An entry of the archive. All entries together may not exceed the file's size."""
        info = self.archive.getinfo(self.root + name)
        self.entry_bytes -= info.file_size
        if info.compress_type != zipfile.ZIP_STORED or self.entry_bytes < 0:
            raise ValueError("its entries are compressed or overlap, which PyTorch never writes")
        return self.archive.read(info)

    def unpickled(self, pickled: bytes) -> Any:
        """The object that a pickle describes.

        A pickle is a program for a stack machine. Most opcodes push an object. MARK sets the stack
        aside and begins an empty one; a later opcode turns its items into a container, or adds them
        to one, and restores the old stack. The memo keeps objects for later use, by number.
        """
        if len(pickled) > bounds.PICKLE:
            raise ValueError(f"its pickle has {len(pickled):,} bytes, more than {bounds.PICKLE:,}")
        stack: list[Any] = []
        marks: list[list] = []
        memo: dict[Any, Any] = {}
        for opcode, argument, _ in pickletools.genops(pickled):
            match opcode.name:
                case name if name in PLAIN:
                    stack.append(argument)
                case "NEWTRUE" | "NEWFALSE" as name:
                    stack.append(name == "NEWTRUE")
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[argument])
                case "MARK":
                    marks.append(stack)
                    stack = []
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" as name:
                    stack.append(_container(name.removeprefix("EMPTY_"), []))
                case "TUPLE" | "LIST" | "DICT" as name:
                    items, stack = stack, marks.pop()
                    stack.append(_container(name, items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
                case "SETITEM" | "APPEND" as name:
                    count = 2 if name == "SETITEM" else 1
                    items = stack[-count:]
                    del stack[-count:]
                    _extend(stack[-1], items)
                case "SETITEMS" | "APPENDS":
                    items, stack = stack, marks.pop()
                    _extend(stack[-1], items)
                case "GLOBAL":
                    stack.append(_named(*str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_named(module, name))
                case "BINPERSID":
                    stack.append(self._storage(*stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, made = stack.pop(), stack.pop()
                    stack.append(self._make(made, arguments))
                case "BUILD":  # Sets attributes, such as the versions of a state dict: ignored.
                    stack.pop()
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(
                        f"its pickle has the opcode {name}, which PyTorch never writes"
                    )
        raise ValueError("its pickle has no end")

    def _make(self, made: Any, arguments: tuple) -> Any:
        if made == "tensor":
            return self._tensor(*arguments[:4])
        if made == "parameter":
            return arguments[0]
        if made == "dictionary" and not arguments:
            return {}
        if made is _Ignored:
            return _Ignored
        raise ValueError("its pickle makes an object out of something else")

    def _storage(self, _kind, dtype: np.dtype, key: str, *_device_and_size) -> _Storage:
        if not (isinstance(key, str) and isinstance(dtype, np.dtype)):
            raise ValueError("a storage has no name or type")
        if key not in self.storages:
            self.storages[key] = self.entry(f"data/{key}")
        return _Storage(self.storages[key], dtype)

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple) -> np.ndarray:
        if not isinstance(storage, _Storage) or len(size) > bounds.DIMENSIONS:
            raise ValueError("a tensor has no storage or too many dimensions")
        itemsize = storage.dtype.itemsize
        self.tensors -= 1
        self.tensor_bytes -= math.prod(size) * itemsize
        if self.tensors < 0 or self.tensor_bytes < 0:
            raise ValueError(
                f"it has more than {bounds.TENSORS:,} tensors, or many that share their storage"
            )
        # NumPy raises an error unless every element lies in the storage.
        strides = [s * itemsize for s in stride]
        return np.ndarray(size, storage.dtype, storage.data, offset * itemsize, strides)


def _named(module: str, name: str) -> Any:
    if (module, name) in MADE:
        return MADE[module, name]
    if module == "torch" and name in DTYPES:
        return np.dtype(DTYPES[name])
    raise UserError(
        f"The .pth asks to run {f'{module}.{name}'[:80]!a}, which is refused. If you trust "
        'the file, save its state dict alone with PyTorch: torch.save({"state_dict": ...}, PATH).'
    )


def _container(kind: str, items: list) -> Any:
    if kind == "TUPLE":
        return tuple(items)
    container = {} if kind == "DICT" else []
    _extend(container, items)
    return container


def _extend(container: Any, items: list) -> None:
    if isinstance(container, list):
        container.extend(items)
    elif isinstance(container, dict):
        if not all(isinstance(key, str | int) for key in items[::2]):
            raise ValueError("a key is neither a name nor a number")
        container.update(zip(items[::2], items[1::2], strict=True))
    elif container is not _Ignored:
        raise ValueError("items go into something that holds none")


def save_tensors(path: Path, content: dict) -> None:
    """Writes `content` so that `torch.load(path, weights_only=True)` returns it with tensors.

    content: nested dictionaries with string keys, of arrays, strings, integers, floats and None.
    """
    storages: list[np.ndarray] = []
    described = pickle.PROTO + b"\x02" + _pickled(content, storages) + pickle.STOP
    entries = {
        "data.pkl": described,
        "byteorder": b"little",
        **{f"data/{key}": storage for key, storage in enumerate(storages)},
        "version": b"3\n",
    }
    # Stored, not compressed: PyTorch maps the storages into memory.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            assert archive.fp is not None
            # PyTorch wants the data of an entry at a multiple of 64 bytes. They follow a header of
            # 30 bytes, the name, and a field of four bytes plus padding that fills the gap.
            padding = -(archive.fp.tell() + 30 + len(info.filename.encode()) + 4) % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            archive.writestr(info, data if isinstance(data, bytes) else data.tobytes())


def _pickled(value: Any, storages: list[np.ndarray]) -> bytes:
    """The pickle of `value` without PROTO and STOP; appends its arrays to `storages`.

    PyTorch's functions are written by name, so PyTorch need not be installed.
    """

    def call(module: str, name: str, *arguments: bytes) -> bytes:
        return named(module, name) + tuple_of(*arguments) + pickle.REDUCE

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    def tuple_of(*items: bytes) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def plain(scalar: Any) -> bytes:
        return pickle.dumps(scalar, protocol=2)[2:-1]

    if isinstance(value, dict):
        items = [_pickled(part, storages) for item in value.items() for part in item]
        return pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
    if not isinstance(value, np.ndarray):
        return plain(value)
    storages.append(value)
    strides = np.cumprod([1, *value.shape[:0:-1]])[::-1] if value.ndim else ()  # In elements.
    kind, key, device = named("torch", STORAGES[value.dtype]), str(len(storages) - 1), "cpu"
    storage = tuple_of(plain("storage"), kind, plain(key), plain(device), plain(value.size))
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        storage + pickle.BINPERSID,
        plain(0),  # Offset of the first element in the storage.
        tuple_of(*map(plain, value.shape)),
        tuple_of(*(plain(int(stride)) for stride in strides)),
        pickle.NEWFALSE,  # requires_grad
        call("collections", "OrderedDict"),  # Hooks: none.
    )
