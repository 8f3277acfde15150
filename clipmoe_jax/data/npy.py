"""Arrays in .npy and .npz files, on a local disk or in a bucket.

A file is read through once before, and ValueError is raised if it is not what its folder's checksums say.
What cannot be read raises ValueError naming the file; pickled objects are not read.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from clipmoe_jax.core import checksums
from clipmoe_jax.core.paths import in_bucket


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


def load_arrays(path: epath.Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an .npz file, or those of these names that it has."""
    checksums.verify(path.parent, path.name)
    with _naming_damage(path), path.open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files if names is None or name in names}


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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or no file of NumPy's: {reason[:200]}") from error
