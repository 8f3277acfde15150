"""Tensors of a TorchScript archive, such as OpenAI's CLIP files, without running the archive or PyTorch.

`torch.jit.load` runs code that the archive brings (`__setstate__` of its classes). Here a pickle of which
nothing but tensors, containers and stand-ins for the archive's classes can come is read, and the tensors are
those bytes of the zip file to which it points.
"""

import collections
import contextlib
import io
import math
import pickle
import reprlib
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from clipmoe_jax.interop.pickles import Unpickler, named_values

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
MOST_AXES, MOST_ELEMENTS = 64, 2**63


class StoredTensor(NamedTuple):
    """A tensor in the archive: whole numbers of elements say where in its storage it lies."""

    dtype: Any
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def open_archive(path: epath.Path) -> "Archive | None":
    """Opens a zip archive with code, as TorchScript writes; returns None for any other file.

    Raises ValueError if it is damaged, or holds what no model's state has.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(path.open("rb"))
        try:
            if not zipfile.is_zipfile(file):
                return None
            archive = opened.enter_context(zipfile.ZipFile(file))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
        if not any("/code/" in name for name in archive.namelist()):
            return None
        found = Archive(path, archive)
        opened.pop_all()  # it stays open for its tensors
        return found


class Archive:
    """A TorchScript archive.

    tensors: {name: tensor} of its modules, `visual.conv1.weight`; their data has not been read.
    """

    def __init__(self, path: epath.Path, archive: zipfile.ZipFile):
        self._path, self._archive = path, archive
        with self._told():
            self._root = _root(archive)
            if f"{self._root}/byteorder" in archive.namelist() and self._contents("byteorder") != b"little":
                raise ValueError("its numbers are big-endian")
            module = _Unpickler(io.BytesIO(self._contents("data.pkl"))).load()
            values = named_values(module, _Module.state_of)
            self.tensors = {name: value for name, value in values.items() if isinstance(value, StoredTensor)}
            if not self.tensors:
                raise ValueError("it holds no tensors")

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor. Raises ValueError if it is damaged, or does not lie within its storage."""
        _, key, offset, shape, strides = tensor = self.tensors[name]
        with self._told():
            storage = np.frombuffer(self._contents(f"data/{key}"), tensor.dtype)
            steps = zip(shape, strides, strict=True)
            end = offset + 1 + sum((size - 1) * stride for size, stride in steps)
            if max(end, math.prod(shape)) > len(storage) and 0 not in shape:
                raise ValueError(f"data/{key} holds {len(storage):,} numbers, too few for shape {shape}")
        in_bytes = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)

    def _contents(self, name: str) -> bytes:
        entry = self._archive.getinfo(f"{self._root}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed, as PyTorch never writes it")
        return self._archive.read(entry)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a damaged archive raises anything
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"{self._path} is a TorchScript archive that cannot be read: {reason}"
            ) from error


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

    @staticmethod
    def state_of(value: Any) -> dict | None:
        return value.state if isinstance(value, _Module) and isinstance(value.state, dict) else None


def _stored(storage: tuple[Any, str], offset: int, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    numbers = (offset, *shape, *strides)
    are_sizes = all(isinstance(n, int) and 0 <= n < MOST_ELEMENTS for n in numbers)
    if not len(shape) == len(strides) <= MOST_AXES or not are_sizes:
        raise pickle.UnpicklingError(
            f"a tensor of shape {reprlib.repr(shape)} and strides {reprlib.repr(strides)}"
        )
    dtype, key = storage
    return StoredTensor(dtype, key, offset, tuple(shape), tuple(strides))


def _first(content: Any, *_: Any) -> Any:
    return content


LISTS = ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _stored,
    **{("torch.jit._pickle", kind): _first for kind in LISTS},
    # Names, which cannot be called: a type of NumPy's would make an array of any list.
    **{("torch", storage): storage for storage in DTYPES},
}


class _Unpickler(Unpickler):
    """Makes modules, tensors and containers; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no model's state needs")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        _, storage, key, _, _ = pid
        if not (isinstance(storage, str) and isinstance(key, str) and storage in DTYPES):
            raise pickle.UnpicklingError("a storage of no known type or name")
        return DTYPES[storage], key
