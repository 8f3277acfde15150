"""Several captions in a row of text, so that padding is not computed.

Letters: B captions, U units, b = B / U captions of a unit, R rows, L row length, K = `steps`.

A unit is a run of pairs that one device computes at once; its captions share rows among themselves alone, so
that nothing has to travel. All units have as many rows, one of K numbers: each is a shape to compile.
"""

from typing import NamedTuple

import numpy as np

from clipmoe_jax.models.inputs import PackedText


class Places(NamedTuple):
    """Where captions go. num_rows: of each unit. starts (B,) int64: the place (row * L + column) of each
    caption's first token among the rows of its unit. segments (B,) int64: which caption of its row it is,
    from 1."""

    num_rows: int
    starts: np.ndarray
    segments: np.ndarray


def place_captions(lengths: np.ndarray, num_units: int, row_length: int, steps: int) -> Places:
    """First-fit decreasing: the longest caption first, each into the first row with room for it.

    lengths (B,) int, at most `row_length`; 0 is no caption. The rows of a unit are the fewest of
    ceil(b * k / steps), k = 1 … steps, that hold every unit's captions.
    """
    lengths = np.asarray(lengths, np.int64).reshape(num_units, -1)  # (U, b)
    units, size = np.arange(num_units), lengths.shape[1]
    used, count = np.zeros_like(lengths), np.zeros_like(lengths)  # (U, rows): tokens, captions
    starts, segments = np.zeros_like(lengths), np.zeros_like(lengths)
    most = 1
    for caption in np.argsort(-lengths, axis=1, kind="stable").T:  # (U,), one of each unit
        length = lengths[units, caption]
        row = np.argmax(used[:, : most + 1] + length[:, None] <= row_length, axis=1)
        starts[units, caption] = row * row_length + used[units, row]
        used[units, row] += length
        count[units, row] += 1
        segments[units, caption] = count[units, row]
        most = max(most, int(row.max()) + 1)
    choices = -(-size * np.arange(1, steps + 1) // steps)
    return Places(int(choices[choices >= most][0]), starts.reshape(-1), segments.reshape(-1))


def pack(tokens: np.ndarray, lengths: np.ndarray, places: Places, num_units: int) -> PackedText:
    """Puts captions into their places. tokens (B, L) int32: a caption is the first `lengths` (B,) of a row,
    its end token last; it may be shorter than what was placed. Where a length is 0 the end is 0."""
    row_length, size = tokens.shape[1], len(tokens) // num_units
    first = np.arange(len(tokens)) // size * places.num_rows * row_length + places.starts
    caption, column = np.nonzero(np.arange(row_length) < np.asarray(lengths)[:, None])
    place = first[caption] + column
    packed = np.zeros((2, num_units * places.num_rows * row_length), np.int32)
    packed[0, place], packed[1, place] = tokens[caption, column], places.segments[caption]
    ends = np.where(lengths > 0, places.starts + lengths - 1, 0).astype(np.int32)
    return PackedText(*packed.reshape(2, -1, row_length), ends)
