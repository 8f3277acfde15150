"""Decoding image files, and many of them in order, on all cores where that is faster."""

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from clipmoe_jax.core.terminal import reading
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.sources.base import MAX_IMAGE_BYTES, read_file

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of an image that takes less, most is Python's own work, which threads take turns at: two threads took 1.0 to
# 1.8 times as long as one for images of up to 0.2 ms, and 0.5 to 0.7 times for others.
SLOW_SECONDS = 3e-4
SLOW_CHUNKS = 3  # in a row, before threads take over
BYTES_AHEAD = 2**28  # of items that are read before it is their turn


def num_cores() -> int:
    """Returns how many cores this process may use: under SLURM or in a container fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def preprocess_file(file: os.PathLike | str, image_size: int) -> np.ndarray:
    """Returns the pixels of an image file as `preprocess_image`, uint8 (image_size, image_size, 3).

    Raises ValueError naming a file that does not decode, and errors as `read_file`.
    """
    try:
        with reading([file]):
            return preprocess_image(read_file(file, True, MAX_IMAGE_BYTES), image_size)
    except UnreadableImageError as error:
        raise ValueError(f"{file} does not decode: {error}") from error


def map_decoding(
    function: Callable[[Item], Result], items: Iterable[Item], num_bytes: Callable[[Item], int] = lambda _: 0
) -> Iterator[Result]:
    """Yields function(item) of each item, in order.

    Calls it in the caller's thread until that turns out to be slow, then on all cores. A few chunks of items
    for each core are in memory at a time, fewer where they take BYTES_AHEAD by `num_bytes` of each.
    """
    items, cores = iter(items), num_cores()
    size = max(1, 32 // cores)  # many at a time are less work for one thread, few occupy many

    def take() -> list[Item]:
        chunk, left = [], BYTES_AHEAD // 8
        for item in itertools.islice(items, size):
            chunk.append(item)
            left -= num_bytes(item)
            if left < 0:
                break
        return chunk

    def work(chunk: list[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    slow_chunks = 0
    while slow_chunks < SLOW_CHUNKS and (chunk := take()):
        began = time.perf_counter()
        results = work(chunk)
        slow = time.perf_counter() - began > SLOW_SECONDS * len(chunk)
        slow_chunks = slow_chunks + 1 if slow else 0
        yield from results
    with ThreadPoolExecutor(cores) as pool:
        pending, ahead = collections.deque(), 0
        while True:
            while len(pending) < 4 * cores and ahead < BYTES_AHEAD and (chunk := take()):
                taken = sum(map(num_bytes, chunk))
                pending.append((pool.submit(work, chunk), taken))
                ahead += taken
            if not pending:
                return
            future, taken = pending.popleft()
            ahead -= taken
            yield from future.result()
