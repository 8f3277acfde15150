"""The sorted index of clusters."""

import pickle

import numpy as np
import pytest
from etils import epath

from clipmoe_jax.data import clusters
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.samplers import ClusterSampler


def test_sort_by_hand():
    index = ClusterIndex.sort(np.array([7, 0, 7, 3, 0, 7]))
    assert index.labels.tolist() == [0, 3, 7]
    assert index.sizes.tolist() == [2, 1, 3]
    assert index.order.tolist() == [1, 4, 3, 0, 2, 5]
    assert index.order.dtype == np.uint32


@pytest.mark.parametrize("num_clusters", [1, 9, 300, 70_000])
def test_sort_in_chunks_is_numpys_stable_sort(num_clusters, monkeypatch):
    monkeypatch.setattr(clusters, "CHUNK", 1000)
    labels = np.random.default_rng(0).integers(0, num_clusters, 12_345).astype(np.int32)
    index = ClusterIndex.sort(labels)
    np.testing.assert_array_equal(index.order, np.argsort(labels, kind="stable"))
    np.testing.assert_array_equal(np.repeat(index.labels, index.sizes), np.sort(labels))


def test_an_index_on_disk_is_mapped_also_by_worker_processes(tmp_path):
    """It pickles as its folder: no worker gets a copy of the records."""
    labels = np.random.default_rng(0).integers(0, 81, 100_000)
    in_memory = ClusterIndex.sort(labels)
    in_memory.write(epath.Path(tmp_path))
    opened = ClusterIndex.open(epath.Path(tmp_path))
    assert isinstance(opened.order, np.memmap)
    sent = pickle.dumps(ClusterSampler(opened, 64, seed=0))
    assert len(sent) < 20_000
    expected = ClusterSampler(in_memory, 64, seed=0)
    for sampler in (ClusterSampler(opened, 64, seed=0), pickle.loads(sent)):
        for step in (0, 700, expected.num_steps + 3):
            np.testing.assert_array_equal(sampler.indices(step), expected.indices(step))


def test_an_array_of_a_relative_workdir_is_mapped(tmp_path, monkeypatch):
    """As the README's own command has it: --workdir=runs/demo."""
    monkeypatch.chdir(tmp_path)
    np.save("order.npy", np.arange(6.0))
    found = map_array(epath.Path("order.npy"))
    assert isinstance(found, np.memmap) and found.tolist() == list(range(6))


DAMAGE = {
    "a record that is none": ("order.npy", (3,), 900, "order.npy is damaged .it names records outside the 6"),
    "a size": ("sizes.npy", (1, 0), 3, "sizes.npy is damaged .its 3 clusters do not make 6 records"),
    "an empty cluster": ("sizes.npy", (1,), [3, 0, 3], "sizes.npy is damaged"),
    "labels out of order": ("sizes.npy", (0,), [3, 0, 7], "sizes.npy is damaged"),
    "a negative label": ("sizes.npy", (0, 0), -1, "sizes.npy is damaged"),
}


@pytest.mark.parametrize(("name", "place", "value", "message"), DAMAGE.values(), ids=DAMAGE)
def test_numbers_out_of_range_are_told_without_checksums_too(tmp_path, name, place, value, message):
    ClusterIndex.sort(np.array([7, 0, 7, 3, 0, 7])).write(epath.Path(tmp_path))
    array = np.load(tmp_path / name)
    array[place] = value
    np.save(tmp_path / name, array)
    with pytest.raises(ValueError, match=message):
        ClusterIndex.open(epath.Path(tmp_path)).records(np.arange(6))
