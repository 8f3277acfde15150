"""Files of named tensors: safetensors and PyTorch's, one file or sharded, read a tensor at a time.

A file is opened to {name: Tensor}, whose shapes are known before any data is read; who wants an array pops
its Tensor and reads it, so that neither file nor state dict stays in memory beside what is made of it.
"""

import functools
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
SHARD_BYTES = 5 * 10**9  # past which other libraries too write several files


class Tensor(NamedTuple):
    """A tensor of a file: its shape, and what reads it into a numpy array of its own dtype."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Tensors:
    """Arrays in memory as if they came from a file."""
    return {name: Tensor(array.shape, lambda array=array: array) for name, array in arrays.items()}


def open_tensors(path: epath.Path) -> Tensors:
    """Opens a file of either kind, which its first bytes tell.

    Raises ValueError for a file that is truncated, of another kind, or wants to run code.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return _open_safetensors(path) if start[8:] == b"{" else _open_torch(path)


def open_sharded(index: epath.Path) -> Tensors:
    """Opens all files that a `….index.json` names.

    Raises FileNotFoundError naming a file that is not there, ValueError for a tensor that its file lacks.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map: it is not the index of a sharded checkpoint")
    shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    if missing := [name for name, path in shards.items() if not path.exists()]:
        raise FileNotFoundError(f"{index} names {len(shards)} files, of which {missing[:10]} are not there")
    opened = {name: open_tensors(path) for name, path in shards.items()}
    if missing := [name for name, shard in weight_map.items() if name not in opened[shard]]:
        raise ValueError(f"{index} names tensors that their files lack: {missing[:10]}")
    return {name: opened[shard].pop(name) for name, shard in weight_map.items()}


def read_json(path: epath.Path) -> dict:
    """The contents of a JSON file. Raises ValueError if it is not one."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_safetensors(
    folder: epath.Path, arrays: dict[str, np.ndarray], stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes STEM.safetensors, or numbered shards and their index if one file would pass `shard_bytes`.

    Takes the arrays out of the dict as it writes them.
    """
    shards, sizes = [[]], [0]
    for name, array in arrays.items():
        if sizes[-1] and sizes[-1] + array.nbytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += array.nbytes
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    os.umask(umask := os.umask(0))
    for file, names in zip(files, shards, strict=True):
        # safetensors writes memory as it lies; np.ascontiguousarray would give a scalar an axis.
        shard = {name: np.asarray(arrays.pop(name), order="C") for name in names}
        specs = {
            name: safetensors.TensorSpec(
                dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
            )
            for name, array in shard.items()
        }
        safetensors.serialize_file(specs, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o666 & ~umask)  # which the package makes readable by its owner alone


def write_torch(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a PyTorch state dict. Raises ValueError if PyTorch is not installed."""
    torch = _import_torch(path)
    torch.save({name: _to_torch(torch, array) for name, array in arrays.items()}, path)


def _open_safetensors(path: epath.Path) -> Tensors:
    """Reads the header here: the package's numpy loader has no bfloat16, and maps the file into memory."""
    size = path.stat().length
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            raise ValueError(f"{path} is truncated: it ends before its header does")
        try:
            header = json.loads(file.read(start - 8))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}, of no CLIP's parameters")
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name} has {end - begin} bytes, which are not {shape} of {dtype}")
        if start + end > size:
            raise ValueError(f"{path} is truncated: {name} ends at byte {start + end:,} of {size:,}")

        def read(offset=start + begin, length=end - begin, dtype=dtype, shape=shape):
            with path.open("rb") as file:
                file.seek(offset)
                return np.frombuffer(file.read(length), dtype).reshape(shape)

        tensors[name] = Tensor(shape, read)
    return tensors


def _open_torch(path: epath.Path) -> Tensors:
    torch = _import_torch(path)
    try:
        with path.open("rb") as file:
            # OpenAI's own files are TorchScript archives, which hold no pickled Python.
            if _is_torchscript(file):
                state = dict(torch.jit.load(file, map_location="cpu").state_dict())
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = " Only tensors are read, no pickled code: save the model's state_dict() alone."
        raise ValueError(
            f"{path} cannot be read as safetensors or as a PyTorch state dict: {reason}"
            + (fix if isinstance(error, pickle.UnpicklingError) else "")
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: it holds a {type(state).__name__}")
    return {
        name.removeprefix("module."): Tensor(tuple(tensor.shape), functools.partial(_to_numpy, torch, tensor))
        for name, tensor in state.items()
    }


def _import_torch(path: epath.Path):
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and PyTorch is not installed: pip install torch"
        ) from error
    return torch


def _is_torchscript(file: BinaryIO) -> bool:
    found = False
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            found = any("/code/" in name for name in archive.namelist())
    file.seek(0)
    return found


def _to_numpy(torch, tensor) -> np.ndarray:
    """The tensor's own values and dtype; numpy knows bfloat16 by ml_dtypes, PyTorch's conversion does not."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch, array: np.ndarray):
    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
