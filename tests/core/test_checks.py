"""Files that are read whole: their size is looked at first, and how much of it is on the disk."""

import os

import pytest
from etils import epath

from clipmoe_jax.core import checks
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.core.metrics import read_lines


def holes(path, length, start=b""):
    path.write_bytes(start)
    os.truncate(path, length)
    return epath.Path(path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (checks.MAX_BYTES + 1, "x.json has 67,108,865 bytes, of which 67,108,864 may be read$"),
        (checks.MAX_BYTES, "x.json has 67,108,864 bytes and only 4,096 of them on the disk: copy it again$"),
    ],
    ids=["too large", "holes"],
)
def test_json_is_read_if_it_is_small_and_on_the_disk(tmp_path, length, message):
    with pytest.raises(ValueError, match=message):
        read_json(holes(tmp_path / "x.json", length, b"{"))


def test_a_log_is_read_if_it_is_on_the_disk(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl has 1,000,000,000 bytes and only 0 of them on"):
        list(read_lines(holes(tmp_path / "metrics.jsonl", 10**9)))


def test_a_tenth_of_a_large_file_must_be_on_the_disk(tmp_path):
    small, large = b"x" * 2**17, b"x" * 2**18
    checks.check_not_sparse(holes(tmp_path / "a", 2**20))
    checks.check_not_sparse(holes(tmp_path / "b", 10 * 2**18, large))
    with pytest.raises(ValueError, match="c has 2,621,440 bytes and only 131,072 of them on the disk"):
        checks.check_not_sparse(holes(tmp_path / "c", 10 * 2**18, small))
