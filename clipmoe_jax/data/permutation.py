"""Permutations of 0 … n - 1 by a key, computed place by place and never stored.

A balanced Feistel network permutes the least power of 4 that is not below n; a value outside 0 … n - 1 goes
through again until it is inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002), which keeps the map a bijection and takes fewer than four rounds on average.
"""

import numpy as np

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def make_key(*parts: int | np.ndarray) -> np.ndarray:
    """Returns a uint64 key of numbers or arrays of them, an array if one of them is."""
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # NumPy warns where single numbers wrap around, not where arrays do
        for part in parts:
            key = _mix(key ^ _mix(np.asarray(part).astype(np.uint64) ^ _GOLDEN))
    return key


def permute(places: np.ndarray, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Permutes places: (B,) int in 0 … size - 1 -> (B,) int64 in 0 … size - 1.

    size () or (B,), key () or (B,) uint64: places that share both are permuted together.
    """
    sizes, keys = np.broadcast_arrays(np.asarray(size, np.uint64), key)
    sizes, keys = np.broadcast_to(sizes, places.shape), np.broadcast_to(keys, places.shape)
    # With less than 3 bits a half some orders come more often than others. frexp gives the bits of n - 1
    # exactly up to 2^53.
    half = np.maximum(3, (np.frexp((sizes - np.uint64(1)).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    round_keys = _mix(keys + _GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None])  # (ROUNDS, B)
    moved = places.astype(np.uint64)
    walking = np.arange(len(places))
    while len(walking):
        moved[walking] = _feistel(moved[walking], half[walking], round_keys[:, walking])
        walking = walking[moved[walking] >= sizes[walking]]
    return moved.astype(np.int64)


def _feistel(values: np.ndarray, half: np.ndarray, round_keys: np.ndarray) -> np.ndarray:
    """Permutes the numbers of 2·half bits by the keys of each round, (ROUNDS, B)."""
    left, right = values >> half, values & ((np.uint64(1) << half) - np.uint64(1))
    for keys in round_keys:
        left, right = right, left ^ (_mix(right ^ keys) >> (np.uint64(64) - half))
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's finalizer (Steele, Lea and Flood, 2014): every bit of x changes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
