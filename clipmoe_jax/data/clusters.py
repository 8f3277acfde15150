"""The records of each cluster: labels sorted once, read from disk as they are used.

Letters: N records, C clusters.
"""

import functools
import os
from collections import Counter

import numpy as np
from etils import epath

from clipmoe_jax.data.npy import load_array, map_array

ORDER, SIZES = "order.npy", "sizes.npy"
# Labels read at a time.
CHUNK = 1 << 22


class ClusterIndex:
    """The records of each cluster. An index on disk pickles as its folder, so that worker processes map the
    same pages.

    Attributes:
        labels: (C,) int64, ascending.
        sizes: (C,) int64, the number of records of each cluster.
        order: (N,) uint32 (int64 from 2^32 on): the records of the first cluster, ascending, then those of
            the second, …
    """

    def __init__(self, labels: np.ndarray, sizes: np.ndarray, order: np.ndarray):
        self.labels, self.sizes, self.order = labels, sizes, order
        self._folder = None

    @classmethod
    def sort(cls, labels: np.ndarray) -> "ClusterIndex":
        """Sorts (N,) int labels, in memory or mapped, by counting; `order` is held in memory."""
        counts = Counter()
        for start in range(0, len(labels), CHUNK):
            values, numbers = np.unique(labels[start : start + CHUNK], return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
        values = np.array(sorted(counts), np.int64)
        sizes = np.array([counts[value] for value in values.tolist()], np.int64)
        order = np.empty(len(labels), np.uint32 if len(labels) < 2**32 else np.int64)
        free = np.cumsum(sizes) - sizes  # the next free place of each cluster
        small = np.min_scalar_type(max(len(values) - 1, 0))  # 8 and 16 bits are sorted by radix
        for start in range(0, len(labels), CHUNK):
            which = np.searchsorted(values, labels[start : start + CHUNK]).astype(small)
            records = np.argsort(which, kind="stable")
            numbers = np.bincount(which, minlength=len(values))
            # From a place in `records` to one in `order`.
            shift = np.repeat(free - (np.cumsum(numbers) - numbers), numbers)
            order[shift + np.arange(len(records))] = records + start
            free += numbers
        return cls(values, sizes, order)

    def write(self, folder: epath.Path) -> None:
        """Writes order.npy and sizes.npy, (2, C) int64 of labels and sizes."""
        for name, array in ((ORDER, self.order), (SIZES, np.stack([self.labels, self.sizes]))):
            with (folder / name).open("wb") as file:
                np.save(file, array)

    @classmethod
    def open(cls, folder: epath.Path, *, verify: bool = True) -> "ClusterIndex":
        """Opens what `write` wrote; `order` stays on a local disk. Raises ValueError if it is damaged.

        verify: False leaves out the checksum of `order`.
        """
        labels, sizes = load_array(folder / SIZES)
        index = cls(labels, sizes, map_array(folder / ORDER, verify=verify))
        if sizes.sum() != len(index) or (sizes < 1).any() or (np.diff(labels, prepend=-1) < 1).any():
            raise _damaged(folder / SIZES, f"its {len(sizes)} clusters do not make {len(index):,} records")
        index._folder = folder
        return index

    def records(self, places: np.ndarray) -> np.ndarray:
        """Returns the records at places of `order`, int64. Raises ValueError if one does not exist."""
        records = self.order[places].astype(np.int64)
        if records.min() < 0 or records.max() >= len(self):
            raise _damaged(f"{self._folder}/{ORDER}", f"it names records outside the {len(self):,} there are")
        return records

    def sizes_by_range(self, stops: np.ndarray) -> np.ndarray:
        """Returns (C, K) int64, the records of each cluster below the first of stops (K,), from there below
        the second, and so on; the last is N."""
        ends = np.cumsum(self.sizes)
        parts = zip(ends - self.sizes, ends, strict=True)  # records of a cluster ascend
        below = np.array([np.searchsorted(self.order[start:end], stops) for start, end in parts])
        return np.diff(below, axis=1, prepend=0)

    def __len__(self) -> int:
        return len(self.order)

    def __reduce__(self):
        if self._folder is not None:
            return functools.partial(ClusterIndex.open, verify=False), (self._folder,)
        return ClusterIndex, (self.labels, self.sizes, self.order)


def _damaged(path: os.PathLike | str, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): delete its folder and start the same command again")
