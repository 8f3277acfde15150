"""Decoding in order, by threads or without."""

import itertools
import threading

import pytest

from clipmoe_jax.data.decoding import SMALL_BYTES, map_decoding


@pytest.mark.parametrize("sizes", [[0], [SMALL_BYTES], [0] * 50 + [SMALL_BYTES] * 100], ids=str)
def test_results_are_in_order(sizes):
    items = list(zip(range(1000), itertools.cycle(sizes)))
    found = map_decoding(lambda item: -item[0], items, lambda item: item[1])
    assert list(found) == [-i for i in range(1000)]


def test_small_images_are_decoded_where_the_caller_is_and_others_by_threads():
    def threads_of(size):
        return set(map_decoding(lambda _: threading.current_thread(), range(200), lambda _: size))

    assert threads_of(SMALL_BYTES - 1) == {threading.current_thread()}
    assert threading.current_thread() not in threads_of(SMALL_BYTES)


@pytest.mark.parametrize("size", [0, SMALL_BYTES])
def test_items_are_taken_as_results_are_used(size):
    taken = itertools.count()
    found = map_decoding(lambda item: item, taken, lambda _: size)
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    found.close()
    assert next(taken) < 10_000


@pytest.mark.parametrize("size", [0, SMALL_BYTES])
def test_an_error_is_the_callers(size):
    def decode(item):
        if item == 77:
            raise ValueError("record 77")
        return item

    with pytest.raises(ValueError, match="record 77"):
        list(map_decoding(decode, range(1000), lambda _: size))
