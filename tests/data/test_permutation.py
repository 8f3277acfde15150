"""Keyed permutations: bijections, as even as drawn ones, the same for ever."""

import numpy as np
import pytest
from scipy import stats

from clipmoe_jax.data.permutation import make_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4096, 4097, 100_003])
def test_every_place_is_taken_once(size):
    for epoch in range(3):
        moved = permute(np.arange(size), size, make_key(0, epoch))
        np.testing.assert_array_equal(np.sort(moved), np.arange(size))


def test_sizes_beyond_32_bits():
    """Two far places of a permutation of 5 billion differ and lie inside it."""
    size = 5_000_000_000
    places = np.array([0, 1, size // 2, size - 1])
    moved = permute(places, size, make_key(7))
    assert len(set(moved.tolist())) == 4 and 0 <= moved.min() and moved.max() < size


def test_places_of_several_permutations_at_once():
    """As each alone: sizes and keys may differ from place to place."""
    sizes, keys = np.array([5, 100, 7]), make_key(1, np.array([3, 4, 5]))
    together = permute(np.array([4, 60, 0]), sizes, keys)
    alone = [permute(np.array([p]), s, k)[0] for p, s, k in zip([4, 60, 0], sizes, keys, strict=True)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("size", [3, 5, 12, 37])
def test_every_place_goes_everywhere_equally_often(size):
    """Chi-square over 4,000 keys of where each place goes, and of where neighbours go together."""
    keys = make_key(0, np.arange(4000))
    goes_to = np.stack([permute(np.full(4000, place), size, keys) for place in range(size)], axis=1)
    for place in range(size):
        assert stats.chisquare(np.bincount(goes_to[:, place], minlength=size)).pvalue > 1e-5
    distance = (goes_to[:, 1] - goes_to[:, 0]) % size  # 1 to size - 1, equally often
    assert stats.chisquare(np.bincount(distance, minlength=size)[1:]).pvalue > 1e-5


def test_all_orders_of_four_are_equally_likely():
    keys = make_key(5, np.arange(24_000))
    orders = np.stack([permute(np.full(24_000, place), 4, keys) for place in range(4)], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-5


def test_neighbours_and_epochs_are_unrelated():
    """Spearman's correlations of 50,000 places with their order, and of two epochs: within 5 sigma of 0."""
    epochs = [permute(np.arange(50_000), 50_000, make_key(3, epoch)) for epoch in range(2)]
    for one, other in (
        (epochs[0], np.arange(50_000)),
        (epochs[0][1:], epochs[0][:-1]),
        (epochs[0], epochs[1]),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(50_000)


def test_the_order_is_the_same_in_every_version():
    """A run that goes on with a newer version must not see records twice: these numbers are for ever."""
    assert permute(np.arange(10), 10, make_key(0, 0)).tolist() == [9, 8, 6, 1, 0, 4, 7, 3, 2, 5]
    assert [int(k) for k in (make_key(0), make_key(0, 1), make_key(1, 0))] == [
        5197578548964807871,
        1191219686120235551,
        6333499917245204837,
    ]
