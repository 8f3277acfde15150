"""Arrays in .npy files, on a local disk or in a bucket."""

import os

import numpy as np
from etils import epath


def load_array(path: epath.Path) -> np.ndarray:
    """All of it, in memory."""
    with path.open("rb") as file:
        return np.load(file)


def map_array(path: epath.Path) -> np.ndarray:
    """Its rows are read from disk as they are used, where the disk is a local one."""
    if "://" not in os.fspath(path):
        return np.load(path, mmap_mode="r")
    return load_array(path)
