"""Files of named tensors, safetensors and PyTorch's, one file or several shards, read a tensor at a time.

Opening a file gives {name: Tensor}: shapes are known before any data is read. To get an array, pop its Tensor
and read it, so that neither the file nor a state dict stays in memory beside the arrays made from it.
"""

import functools
import io
import json
import os
import pickle
import reprlib
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import huggingface_hub
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from clipmoe_jax.core.checks import check_not_sparse
from clipmoe_jax.core.errors import first_line, naming
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import check_plain_file, in_bucket
from clipmoe_jax.interop import torchscript
from clipmoe_jax.interop.pickles import check_pickle, named_values

SAFETENSORS_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
ZIP, OLD_PICKLES = b"PK\3\4", 5  # what a file of PyTorch begins with, and what one of before 1.6 does
SHARD_BYTES = 5 * 10**9  # other libraries too write several files past this size


class Tensor(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it into a numpy array."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Tensors = dict[str, Tensor]


def open_tensors(path: epath.Path) -> Tensors:
    """Opens a safetensors or PyTorch file; its first bytes tell which it is.

    A PyTorch file may hold dicts in dicts, as training checkpoints do: then names have a key and a dot before
    them, `state_dict.visual.proj`, and what is no tensor is left out.
    Raises ValueError for a file that is truncated, of another kind, mostly holes, or wants to run code.
    """
    check_plain_file(path)
    check_not_sparse(path)
    with path.open("rb") as file:
        start = file.read(9)
    return _open_safetensors(path) if start[8:] == b"{" else _open_torch(path)


def open_sharded(index: epath.Path) -> Tensors:
    """Opens all files that a `….index.json` names.

    Raises ValueError for tensors that their file lacks, and errors as `files_of`.
    """
    shards = weight_map(index)
    opened = {file.name: open_tensors(file) for file in files_of(index)}
    if missing := [name for name, shard in shards.items() if name not in opened[shard]]:
        raise ValueError(f"{index} names tensors that their files lack: {missing[:10]}")
    return {name: opened[shard].pop(name) for name, shard in shards.items()}


def files_of(path: epath.Path) -> list[epath.Path]:
    """Returns the files of tensors that a `….index.json` names; another file is its own.

    Raises FileNotFoundError naming files that do not exist, ValueError for files that are not in the index's
    folder.
    """
    if not is_index(path):
        return [path]
    names = sorted(set(weight_map(path).values()))
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise FileNotFoundError(f"{path} names {len(names)} files, of which {missing[:10]} do not exist")
    return [path.parent / name for name in names]


def is_index(path: epath.Path) -> bool:
    """Returns whether a file is one that names the files of tensors."""
    return path.name.endswith(".index.json")


def weight_map(index: epath.Path) -> dict[str, str]:
    """Returns {tensor: file} of a `….index.json`."""
    weight_map = field(read_json(index), "weight_map", dict, str(index))
    if outside := [name for name in weight_map.values() if not _is_file_name(name)]:
        raise ValueError(
            f"{index} names the file {outside[0]!r}, which is none of its folder: mend or remove it"
        )
    return weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\0"}


def read_as(tensors: Tensors, dtype: str | None, source: str) -> Tensors:
    """Returns the tensors so that they are read in this dtype, None in their own, and `finite`."""
    return {
        name: Tensor(tensor.shape, functools.partial(_read_finite, tensor, name, dtype, source))
        for name, tensor in tensors.items()
    }


def finite(array: np.ndarray, name: str, dtype: str | None, source: str) -> np.ndarray:
    """Returns an array in this dtype, None in its own.

    Raises ValueError naming the tensor of the file `source` if it has NaN or infinity, or a value that is too
    large for the dtype.
    """
    with np.errstate(over="ignore"):
        cast = np.asarray(array, dtype)
    if np.isfinite(cast).all():
        return cast
    if not np.isfinite(array).all():
        raise ValueError(f"{source}: {name} has NaN or infinite values: give a checkpoint that is whole")
    largest = np.abs(array.astype(np.float64)).max()
    raise ValueError(
        f"{source}: {name} has values up to {largest:.4g}, more than {dtype} can hold: choose another dtype"
    )


def _read_finite(tensor: Tensor, name: str, dtype: str | None, source: str) -> np.ndarray:
    return finite(tensor.read(), name, dtype, source)


def write_safetensors(
    folder: epath.Path,
    arrays: dict[str, np.ndarray],
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes STEM.safetensors, or numbered shards and their index if one file would exceed `shard_bytes`.

    Takes the arrays out of the dict as it writes them.
    """
    split = huggingface_hub.split_state_dict_into_shards_factory(
        arrays,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    os.umask(umask := os.umask(0))
    for file, names in split.filename_to_tensors.items():
        # safetensors writes memory as it lies; np.ascontiguousarray would give a scalar an axis.
        shard = {name: np.asarray(arrays.pop(name), order="C") for name in names}
        safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o666 & ~umask)  # the package makes it readable by its owner alone


def write_torch(path: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a PyTorch state dict. Raises ValueError if PyTorch is not installed."""
    torch = _import_torch(path)
    torch.save({name: _to_torch(torch, array) for name, array in arrays.items()}, path)


def _open_safetensors(path: epath.Path) -> Tensors:
    try:
        if in_bucket(path):
            with tempfile.TemporaryDirectory() as folder:
                # The package reads local files alone. It keeps this one open, so the name may go.
                file = _open_local(path.copy(epath.Path(folder) / path.name))
        else:
            file = _open_local(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    tensors = {}
    for name in file.offset_keys():
        entry = file.get_slice(name)
        if entry.get_dtype() not in SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry.get_dtype()}, which no CLIP's parameters have")
        tensors[name] = Tensor(tuple(entry.get_shape()), functools.partial(file.get_tensor, name))
    return tensors


def _open_local(path: epath.Path) -> Any:
    # Pages of a mapped file, the default, would count as memory until it is closed.
    return safetensors.safe_open(os.fspath(path), framework="numpy", backend="pread")


def _open_torch(path: epath.Path) -> Tensors:
    if archive := torchscript.open_archive(path):  # as OpenAI's own files are
        return {
            name: Tensor(tensor.shape, functools.partial(archive.read, name))
            for name, tensor in archive.tensors.items()
        }
    torch = _import_torch(path)
    _check_zip(path)
    try:
        _check_pickles(path)
        with path.open("rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file raises errors of pickle, zipfile, PyTorch, …
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's own words advise to run its code
            reason = "it holds more than tensors, or is damaged"
        fix = ". Only tensors are read, no pickled code: save the model's state_dict() alone"
        raise ValueError(
            f"{path} cannot be read as safetensors or as a PyTorch state dict: {reason.removesuffix('.')}"
            + (fix if isinstance(error, pickle.UnpicklingError) else "")
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a state dict: it holds a {type(state).__name__}")
    with naming(f"{path} is not a state dict"):
        flat = named_values(state, lambda value: value if isinstance(value, dict) else None)
    tensors = {
        name: Tensor(tuple(value.shape), functools.partial(_to_numpy, torch, value, f"{path}: {name}"))
        for name, value in flat.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        held = [key if isinstance(key, str) else reprlib.repr(key) for key in list(state)[:10]]
        raise ValueError(f"{path} is not a state dict: it holds {held} and no tensors")
    return tensors


def _check_pickles(path: epath.Path) -> None:
    """Raises UnpicklingError for a pickle that PyTorch would read for ever, or that is damaged."""
    with path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            archive = zipfile.ZipFile(file)
            for part in archive.infolist():
                if part.filename.lower().endswith("data.pkl"):  # PyTorch does not mind the case
                    check_pickle(io.BytesIO(archive.read(part)))
            return
        file.seek(0)
        for _ in range(OLD_PICKLES):
            check_pickle(file)


def _check_zip(path: epath.Path) -> None:
    """Raises ValueError if a part of a zip archive is not what its checksum says. PyTorch does not look.

    Files of before PyTorch 1.6 are no archives and have no checksums.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return
        try:
            archive = zipfile.ZipFile(file)
            parts = archive.infolist()
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if compressed or sum(part.file_size for part in parts) > path.stat().length:
                raise zipfile.BadZipFile("parts are compressed or overlap, as PyTorch never writes them")
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        except Exception as error:  # a damaged archive raises anything
            raise ValueError(
                f"{path} is damaged ({error}): fetch it again; if it was saved with "
                "set_crc32_options(False), save it again without"
            ) from error


def _import_torch(path: epath.Path) -> Any:
    try:
        import torch  # optional
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and PyTorch is not installed: pip install torch"
        ) from error
    return torch


def _to_numpy(torch: Any, tensor: Any, name: str) -> np.ndarray:
    """Returns a tensor's values in its own dtype. PyTorch's conversion does not know ml_dtypes' bfloat16.

    Raises ValueError with the name for complex numbers, and for what is no plain array: sparse, quantised, …
    """
    try:
        if tensor.is_complex():
            raise TypeError(f"it is {tensor.dtype}")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise TypeError(f"the file has fewer numbers than its shape {tuple(tensor.shape)}")
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name} is not a tensor that a CLIP's parameters can be: {reason}") from error


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
