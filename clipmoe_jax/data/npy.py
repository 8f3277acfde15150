"""Arrays in .npy files, on a local disk or in a bucket."""

import numpy as np
from etils import epath

from clipmoe_jax.core.paths import in_bucket


def load_array(path: epath.Path) -> np.ndarray:
    """Reads an array into memory."""
    with path.open("rb") as file:
        return np.load(file)


def map_array(path: epath.Path) -> np.ndarray:
    """Maps an array whose rows are read from disk as they are used; from a bucket, reads all of it."""
    if not in_bucket(path):
        return np.load(path, mmap_mode="r")
    return load_array(path)
