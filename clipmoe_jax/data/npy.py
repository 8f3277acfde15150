"""Arrays in .npy and .npz files, on a local disk or in a bucket.

A file is read through once before, and ValueError is raised if it is not what its folder's checksums say.
What cannot be read raises ValueError naming the file; pickled objects are not read.
"""

import contextlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np
from etils import epath

from clipmoe_jax.core import checksums, distributed
from clipmoe_jax.core.checks import check_expansion
from clipmoe_jax.core.errors import first_line
from clipmoe_jax.core.paths import in_bucket, written_whole


def load_array(path: epath.Path) -> np.ndarray:
    """Reads an array into memory."""
    checksums.verify(path.parent, path.name)
    return _load(path)


def map_array(path: epath.Path, *, verify: bool = True) -> np.ndarray:
    """Maps an array whose rows are read from disk as they are used; from a bucket, reads all of it.

    verify: False leaves the checksum to the caller.
    """
    if verify:
        checksums.verify(path.parent, path.name)
    if in_bucket(path):
        return _load(path)
    with _naming_damage(path):
        return np.lib.format.open_memmap(path, mode="r")


def save_array(path: epath.Path, array: np.ndarray) -> None:
    """Writes an array whole or not at all; process 0 does."""
    if not distributed.is_main():
        return
    with written_whole(path) as where, where.open("wb") as file:
        np.save(file, array)


def array_shape(path: epath.Path) -> tuple[int, ...]:
    """Returns the shape of an array, whose values are not read."""
    with _naming_damage(path), path.open("rb") as file:
        return _read_header(file)[0]


def load_arrays(
    path: epath.Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, with `shapes` those of real numbers of these names and shapes alone.

    An array's header is then read before its values are: a few bytes may expand to any number of them. Raises
    ValueError naming what is damaged, missing or of another shape or type.
    """
    checksums.verify(path.parent, path.name)
    with _naming_damage(path), path.open("rb") as file, np.load(file) as arrays:
        _check_members(arrays.zip.infolist(), path.stat().length)
        if shapes is None:
            return dict(arrays)
        for name, shape in shapes.items():
            if name not in arrays.files:
                raise ValueError(f"it must have an array {name!r} of shape {shape}")
            with arrays.zip.open(f"{name}.npy") as member:
                has, dtype = _read_header(member)
            if has != shape or dtype.kind not in "fiu":
                raise ValueError(f"its array {name!r} is {dtype} {has}, not real numbers {shape}")
        return {name: arrays[name] for name in shapes}


def _check_members(members: list[zipfile.ZipInfo], num_bytes: int) -> None:
    """Raises ValueError for an archive of so many bytes that expands to far more, or without a bound, and for
    names that NumPy takes for one another: of `a` and `a.npy` it reads the first as the array `a`."""
    names = [member.filename for member in members]
    if len(set(names)) < len(names) or not all(name.endswith(".npy") for name in names):
        raise ValueError("it holds other than arrays, or two of one name")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise ValueError("its arrays are compressed as NumPy never does")
    check_expansion(num_bytes, sum(member.file_size for member in members))


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and type of the array in a .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _load(path: epath.Path) -> np.ndarray:
    with _naming_damage(path), path.open("rb") as file:
        return np.lib.format.read_array(file)


@contextlib.contextmanager
def _naming_damage(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of a damaged file: also EOFError, SyntaxError, zipfile's, zlib's, …
        raise ValueError(f"{path} is damaged or no file of NumPy's: {first_line(error)[:200]}") from error
