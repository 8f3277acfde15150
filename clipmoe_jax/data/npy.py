"""Arrays in .npy files, on a local disk or in a bucket."""

import numpy as np
from etils import epath

from clipmoe_jax.core.paths import in_bucket


def load_array(path: epath.Path) -> np.ndarray:
    """All of it, in memory."""
    with path.open("rb") as file:
        return np.load(file)


def map_array(path: epath.Path) -> np.ndarray:
    """Its rows are read from disk as they are used, where the disk is a local one."""
    if not in_bucket(path):
        return np.load(path, mmap_mode="r")
    return load_array(path)
