"""Databases of OCDBT that TensorStore wrote: their index is looked at before it is expanded."""

import random

import jax
import numpy as np
import pytest
import tensorstore
from etils import epath

from clipmoe_jax.core import checkpoints, ocdbt


def write(folder, values, inline=2**20, node=2**30, times=1):
    """Writes values to a database. inline, node: the most bytes of a value in a node, and of a node."""
    store = tensorstore.KvStore.open(
        {
            "driver": "ocdbt",
            "base": f"file://{folder}/",
            "config": {"max_inline_value_bytes": inline, "max_decoded_node_bytes": node},
        }
    ).result()
    for _ in range(times):
        with tensorstore.Transaction() as transaction:
            for key, value in values.items():
                store.with_transaction(transaction)[key] = value
    return folder


def small(folder):
    rng = random.Random(0)
    values = {f"layer_{i % 7}/{i}": rng.randbytes(rng.randrange(300)) for i in range(500)}
    return write(folder, values, inline=100, node=1000, times=3)


def num_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("make", [small, lambda folder: write(folder, {})], ids=["deep", "empty"])
def test_what_tensorstore_writes_is_read_to_the_end(tmp_path, make):
    make(tmp_path / "params")
    if (tmp_path / "params" / "manifest.ocdbt").exists():
        ocdbt.check_index(tmp_path / "params")


def test_all_nodes_are_looked_at(tmp_path, monkeypatch):
    small(tmp_path)
    opened, open_node = [], ocdbt._Index._opened
    monkeypatch.setattr(
        ocdbt._Index, "_opened", lambda self, *place: opened.append(place) or open_node(self, *place)
    )
    ocdbt.check_index(tmp_path)
    assert len(opened) > 20  # 500 keys in nodes of 1,000 bytes


def test_values_in_an_index_may_not_expand_far(tmp_path):
    folder = write(tmp_path / "params", {f"a/{i}": bytes(2**20 - 8) for i in range(300)})
    assert num_bytes(folder) < 2**15
    abstract = {"a": jax.ShapeDtypeStruct((), np.float32)}
    with pytest.raises(ValueError, match="params is damaged or .*its index expands to more than 268,435,456"):
        checkpoints.load_params(epath.Path(folder), abstract)


def test_names_in_an_index_may_not_expand_far(tmp_path, monkeypatch):
    monkeypatch.setattr(ocdbt, "MAX_EXPANDED", 2**22)
    folder = write(tmp_path / "params", {60_000 * "a" + f"{i:05}": b"" for i in range(100)})
    assert num_bytes(folder) < 2**12
    with pytest.raises(ValueError, match="its index expands to more than 4,194,304 bytes"):
        ocdbt.check_index(folder)


@pytest.mark.parametrize("file", ["../elsewhere", "/dev/zero"])
def test_an_index_names_files_of_its_folder_alone(tmp_path, file):
    write(tmp_path, {"a": bytes(10)})
    place = ocdbt._Place(b"", file.encode(), 0, 100)
    with pytest.raises(ValueError, match="it names files of other folders"):
        ocdbt._Index(tmp_path)._opened(place, ocdbt.NODE_MAGIC)


def test_a_damaged_index_raises_value_errors_alone(tmp_path):
    small(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    rng, told = random.Random(0), 0
    for _ in range(60):
        path = rng.choice([tmp_path / "manifest.ocdbt", rng.choice(files)])
        whole = path.read_bytes()
        bit = rng.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            ocdbt.check_index(tmp_path)
        except ValueError:
            told += 1
        path.write_bytes(whole)
    assert told
