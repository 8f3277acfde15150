"""`benchmarks/flips.py`: no flipped bit stays silent, but in formats of others that have no checksums."""

import collections
import pathlib
import random

import pytest

from benchmarks import flips


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return flips.make_rows(pathlib.Path(tmp_path_factory.mktemp("flips")), pairs=8)


def test_every_flip_is_told_where_there_are_checksums(rows):
    silent = {}
    for row in rows:
        rng = random.Random(row.name)
        counts = collections.Counter(flips.flip(row, rng) for _ in range(4))
        silent[row.name] = counts["silent"]
    assert silent.pop("somebody's .safetensors file") > 0  # nobody can see it
    assert not any(silent.values()), silent
