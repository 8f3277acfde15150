"""Decoding in order, by threads or without."""

import itertools
import os
import threading
import time

import pytest

from clipmoe_jax.data.decoding import BYTES_AHEAD, SLOW_SECONDS, map_decoding, num_cores


def wait(slow: bool) -> None:
    if slow:
        time.sleep(2 * SLOW_SECONDS)


@pytest.mark.parametrize("first_slow", [0, 150, 10_000], ids=["slow", "slow later", "fast"])
def test_results_are_in_order(first_slow):
    def decode(item):
        wait(item >= first_slow)
        return -item

    assert list(map_decoding(decode, range(1000))) == [-i for i in range(1000)]


def test_threads_decode_what_is_slow_and_the_caller_what_is_not():
    def threads_of(slow):
        def decode(_):
            wait(slow)
            return threading.current_thread()

        return list(map_decoding(decode, range(500)))

    assert set(threads_of(slow=False)) == {threading.current_thread()}
    assert threading.current_thread() not in threads_of(slow=True)[100:]


@pytest.mark.parametrize("slow", [False, True])
def test_items_are_taken_as_results_are_used(slow):
    def decode(item):
        wait(slow)
        return item

    taken = itertools.count()
    found = map_decoding(decode, taken)
    assert [next(found) for _ in range(150)] == list(range(150))
    found.close()
    assert next(taken) < 10_000


@pytest.mark.parametrize("slow", [False, True])
def test_few_large_items_are_taken_ahead(slow):
    taken = itertools.count()
    found = map_decoding(lambda item: wait(slow), taken, num_bytes=lambda item: BYTES_AHEAD // 4)
    for _ in range(20):
        next(found)
    found.close()
    assert next(taken) < 20 + 6


@pytest.mark.parametrize("slow", [False, True])
def test_an_error_is_the_callers(slow):
    def decode(item):
        wait(slow)
        if item == 777:
            raise ValueError("record 777")
        return item

    with pytest.raises(ValueError, match="record 777"):
        list(map_decoding(decode, range(1000)))


def test_cores_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert num_cores() == len(allowed)
