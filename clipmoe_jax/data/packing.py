"""Several captions in a row of text, so that padding is not computed.

Letters: B captions, S shards, b = B / S captions of a shard, R rows, L row length.

A shard is the part of a batch that one device computes at once. Captions share rows only within a shard, so
that nothing moves between devices. All shards have the same number of rows, one of a few (`row_numbers`),
because each number is a shape to compile.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmoe_jax.models.inputs import PackedText


class Places(NamedTuple):
    """The places of B captions.

    Attributes:
        num_rows: of each shard.
        starts: (B,) int64, the place (row * L + column) of each caption's first token within its shard.
        segments: (B,) int64, the number of each caption within its row, from 1.
    """

    num_rows: int
    starts: np.ndarray
    segments: np.ndarray


def place_captions(lengths: np.ndarray, num_shards: int, row_length: int) -> Places:
    """Places captions by first-fit decreasing: the longest first, each into the first row with room for it.

    lengths (B,) int, at most `row_length`; 0 is no caption. A shard has as many rows as the fullest needs.
    """
    lengths = np.asarray(lengths, np.int64).reshape(num_shards, -1)  # (S, b)
    orders = np.argsort(-lengths, axis=1, kind="stable")
    num_rows, starts, segments = 0, np.zeros_like(lengths), np.zeros_like(lengths)
    # Lists: on so few numbers each of NumPy's operations would take longer than a whole search.
    for shard, order in enumerate(orders):
        placed: list[tuple[int, int]] = []  # (start, segment)
        used, count = [0], [0]  # of each row: tokens, captions
        row, before = 0, row_length
        for length in lengths[shard, order].tolist():
            if length < before:  # one of equal length finds no room in a row before
                row, before = 0, length
            while used[row] + length > row_length:
                row += 1
                if row == len(used):
                    used.append(0)
                    count.append(0)
            count[row] += 1
            placed.append((row * row_length + used[row], count[row]))
            used[row] += length
        starts[shard, order], segments[shard, order] = np.transpose(placed)
        num_rows = max(num_rows, len(used))
    return Places(num_rows, starts.reshape(-1), segments.reshape(-1))


def with_room(num_rows: Any, size: int) -> Any:
    """Returns `num_rows`, an int or an array, and a sixteenth more, for batches that need a little more.

    They are so many sixteenths of the `size` captions of a shard, at most all: phases that are alike have the
    same number of rows then, and one program.
    """
    needed = num_rows + (num_rows + 12) // 16
    return np.minimum(size, -(-16 * needed // size) * size // 16)


def row_numbers(needed: Sequence[int] | np.ndarray, row_cost: float) -> tuple[int, ...]:
    """Returns the numbers of rows that batches should have, ascending: those that cost least.

    needed: the rows that some batches need. row_cost: what a row of each of these batches costs, in
    compilations of a step: another number of rows pays where it saves more rows than one compilation costs.
    """
    values, counts = np.unique(needed, return_counts=True)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]  # of the batches that need the least
    for stop, value in enumerate(values.tolist(), 1):
        best.append(
            min(
                (cost + 1 + row_cost * value * counts[first:stop].sum(), (*numbers, value))
                for first, (cost, numbers) in enumerate(best)
            )
        )
    return best[-1][1]


def pack(tokens: np.ndarray, lengths: np.ndarray, places: Places, num_shards: int) -> PackedText:
    """Puts captions into their places.

    tokens (B, L) int32: a caption is the first `lengths` (B,) of a row, its end token last; it may be shorter
    than when it was placed. Where a length is 0 the end is 0.
    """
    row_length, size = tokens.shape[1], len(tokens) // num_shards
    first = np.arange(len(tokens)) // size * places.num_rows * row_length + places.starts
    caption, column = np.nonzero(np.arange(row_length) < np.asarray(lengths)[:, None])
    place = first[caption] + column
    packed = np.zeros((2, num_shards * places.num_rows * row_length), np.int32)
    packed[0, place], packed[1, place] = tokens[caption, column], places.segments[caption]
    ends = np.where(lengths > 0, places.starts + lengths - 1, 0).astype(np.int32)
    return PackedText(packed[0].reshape(-1, row_length), packed[1].reshape(-1, row_length), ends)
