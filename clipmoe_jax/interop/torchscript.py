"""Tensors of a TorchScript archive, such as OpenAI's CLIP files, without running the archive or PyTorch.

`torch.jit.load` runs code that the archive brings (`__setstate__` of its classes). Here a pickle of which
nothing but tensors, containers and stand-ins for the archive's classes can come is read, and the tensors are
those bytes of the zip file to which it points.
"""

import collections
import functools
import io
import math
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

DTYPES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
MOST_NAMES = 20_000  # a module that contains itself has no end of them


class StoredTensor(NamedTuple):
    """A tensor in the archive: whole numbers of elements say where in its storage it lies."""

    dtype: Any
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def is_torchscript(path: epath.Path) -> bool:
    """Returns whether a file is a zip archive with code, as TorchScript writes."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return False
        with zipfile.ZipFile(file) as archive:
            return any("/code/" in name for name in archive.namelist())


def stored_tensors(path: epath.Path) -> dict[str, StoredTensor]:
    """Returns {name: tensor} of an archive's modules, `visual.conv1.weight`, without reading their data.

    Raises ValueError if it is damaged, or holds what no model's state has.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            root = _root(archive)
            if f"{root}/byteorder" in archive.namelist() and _contents(archive, "byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            module = _Unpickler(io.BytesIO(_contents(archive, "data.pkl"))).load()
        if not (tensors := _named_tensors(module)):
            raise ValueError("it holds no tensors")
        return tensors
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is a TorchScript archive that cannot be read: {reason}") from error


def read_tensor(path: epath.Path, tensor: StoredTensor) -> np.ndarray:
    """Reads one tensor. Raises ValueError if it does not lie within its storage."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        storage = np.frombuffer(_contents(archive, f"data/{tensor.key}"), tensor.dtype)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    end = tensor.offset + 1 + sum((size - 1) * stride for size, stride in steps)
    if max(end, math.prod(tensor.shape)) > len(storage) and 0 not in tensor.shape:
        raise ValueError(
            f"{path}: data/{tensor.key} holds {len(storage):,} numbers, too few for shape {tensor.shape}"
        )
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides, writeable=False)


def _contents(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(f"{_root(archive)}/{name}")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, as PyTorch never writes it")
    return archive.read(entry)


def _root(archive: zipfile.ZipFile) -> str:
    """Returns the folder in the archive that holds everything."""
    for name in archive.namelist():
        folder, _, file = name.rpartition("/")
        if file == "data.pkl" and "/" not in folder:
            return folder
    raise ValueError("it has no data.pkl")


class _Module:
    """In place of any class of the archive: keeps its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes modules, tensors and containers; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in DTYPES:
            return functools.partial(np.dtype, DTYPES[name])
        allowed = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _stored,
            **{("torch.jit._pickle", kind): _first for kind in LISTS},
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no model's state needs")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return dtype(), str(key)


LISTS = ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")


def _stored(storage: tuple[Any, str], offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides}")
    dtype, key = storage
    return StoredTensor(dtype, key, offset, tuple(shape), tuple(strides))


def _first(content: Any, *_: Any) -> Any:
    return content


def _named_tensors(module: Any) -> dict[str, StoredTensor]:
    tensors, waiting, count = {}, [("", module)], 0
    while waiting:
        prefix, value = waiting.pop()
        if (count := count + 1) > MOST_NAMES:
            raise ValueError(f"it has more than {MOST_NAMES:,} names")
        if isinstance(value, StoredTensor):
            tensors[prefix] = value
        elif isinstance(value, _Module) and isinstance(value.state, dict):
            for name, inside in reversed(value.state.items()):
                waiting.append((f"{prefix}.{name}".removeprefix("."), inside))
    return tensors
