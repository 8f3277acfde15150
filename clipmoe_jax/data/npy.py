"""Arrays in .npy files, on a local disk or in a bucket.

A file is read through once before, and ValueError is raised if it is not what its folder's checksums say.
"""

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
    return _load(path) if in_bucket(path) else np.load(path, mmap_mode="r")


def _load(path: epath.Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.load(file)
