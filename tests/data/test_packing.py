"""Captions that share rows: where they go, and that all of them arrive."""

import numpy as np
import pytest

from clipmoe_jax.data.packing import Places, pack, place_captions, row_numbers


def test_first_fit_decreasing_by_hand():
    """Rows of 10. Unit 0 places 7, 5, 5, 3, 2: the 7 in row 0, both 5 in row 1, the 3 beside the 7, and the 2
    opens row 2. Unit 1 has captions of 4, 4 and 1 alone, in row 0, and two places without one."""
    places = place_captions([3, 5, 7, 2, 5, 4, 0, 4, 1, 0], num_shards=2, row_length=10)
    assert places.num_rows == 3
    assert places.starts.tolist()[:5] == [0 + 7, 10 + 0, 0 + 0, 20 + 0, 10 + 5]
    assert places.segments.tolist()[:5] == [2, 1, 1, 1, 2]
    assert [places.starts[i] for i in (5, 7, 8)] == [0, 4, 8]
    assert [places.segments[i] for i in (5, 7, 8)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("row_cost", "numbers"),
    [
        (0.0, (9,)),  # a compilation is all that costs
        (0.1, (9,)),  # 6 as well would save 3 rows in three batches: 0.9 of a compilation
        (0.15, (6, 9)),  # 1.35; and 5 as well a row in two batches, 0.3
        (0.6, (5, 6, 9)),  # 1.2
    ],
)
def test_numbers_of_rows_are_as_many_as_pay(row_cost, numbers):
    """Batches that need 5, 5, 6 and 9 rows."""
    assert row_numbers([5, 9, 5, 6], row_cost) == numbers


def test_pack_by_hand():
    """Two shards of two rows of 4. Caption 1 was placed with length 3 and has 2; caption 3 is none."""
    tokens = np.array([[7, 8, 9, 0], [5, 6, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]], np.int32)
    places = Places(2, np.array([0, 4, 4, 0]), np.array([1, 1, 1, 1]))
    packed = pack(tokens, np.array([3, 2, 4, 0]), places, num_shards=2)
    assert packed.tokens.tolist() == [[7, 8, 9, 0], [5, 6, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]
    assert packed.segments.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert packed.ends.tolist() == [2, 5, 7, 0]


@pytest.mark.parametrize("num_shards", [1, 2, 6])
@pytest.mark.parametrize("seed", range(5))
def test_every_caption_arrives_once(num_shards, seed):
    """Tokens of caption i are 1000 i + 1, 1000 i + 2, … Each shard's rows are those that
    a process with that shard alone makes of the same places."""
    rng = np.random.default_rng(seed)
    size, row_length = 36, 40
    lengths = np.where(rng.random(size) < 0.1, 0, rng.integers(1, row_length + 1, size) // rng.integers(1, 9))
    placed = np.maximum(lengths, 1)
    own = np.minimum(placed, rng.integers(1, row_length, size)) * (lengths > 0)
    places = place_captions(placed, num_shards, row_length)
    tokens = (1000 * np.arange(size)[:, None] + 1 + np.arange(row_length)).astype(np.int32)
    packed = pack(tokens, own, places, num_shards)

    assert packed.tokens.shape == packed.segments.shape == (num_shards * places.num_rows, row_length)
    found = np.sort(packed.tokens[packed.tokens > 0])
    np.testing.assert_array_equal(found, np.sort(tokens[np.arange(row_length) < own[:, None]]))
    np.testing.assert_array_equal(packed.tokens > 0, packed.segments > 0)
    shard, start = np.arange(size) // (size // num_shards), places.starts
    assert np.all(start % row_length + placed <= row_length)  # within a row
    for i in np.flatnonzero(own):
        row, column = divmod(start[i], row_length)
        row += shard[i] * places.num_rows
        np.testing.assert_array_equal(packed.tokens[row, column : column + own[i]], tokens[i, : own[i]])
        assert np.count_nonzero(packed.segments[row] == places.segments[i]) == own[i]
        assert packed.ends[i] == start[i] + own[i] - 1
    for part in range(num_shards):
        here = slice(part * size // num_shards, (part + 1) * size // num_shards)
        of_part = Places(places.num_rows, places.starts[here], places.segments[here])
        alone = pack(tokens[here], own[here], of_part, 1)
        rows = slice(part * places.num_rows, (part + 1) * places.num_rows)
        np.testing.assert_array_equal(alone.tokens, packed.tokens[rows])
        np.testing.assert_array_equal(alone.segments, packed.segments[rows])
        np.testing.assert_array_equal(alone.ends, packed.ends[here])


def test_two_thirds_of_the_rows_are_spared():
    """100 captions of 60 tokens on average fill about 25 rows of 248."""
    lengths = np.clip(np.random.default_rng(0).normal(60, 20, 800), 5, 248).astype(int)
    assert place_captions(lengths, 8, 248).num_rows == 25
