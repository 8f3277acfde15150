"""The stages' own work: features in parts, and what a signal leaves of them."""

import contextlib
import os
import resource
import types

import numpy as np
import pytest
from etils import epath
from tqdm import tqdm

from clipmoe_jax.core import artifacts, distributed
from clipmoe_jax.dmu import stages

FEATURES = {name: np.random.default_rng(i).normal(size=(40, 3)) for i, name in enumerate(stages.MODALITIES)}


class Encoder:
    """Encodes batches of four; `encoded` are the first rows of those that it gave."""

    def __init__(self):
        self.encoded = []

    @contextlib.contextmanager
    def open(self, pairs, first, stop, num_workers, num_text_shards):
        yield [(i, min(i + 4, stop)) for i in range(first, stop, 4)]

    def stream(self, batches):
        for first, stop in batches:
            self.encoded.append(first)
            yield {name: array[first:stop] for name, array in FEATURES.items()}


def encode(folder, encoder, start=10, stop=30):
    config = types.SimpleNamespace(data=types.SimpleNamespace(num_workers=0))
    mesh = types.SimpleNamespace(size=1)
    run = types.SimpleNamespace(config=config, mesh=mesh, pairs=lambda name: None)
    begun = epath.Path(folder) / stages.BEGUN
    with tqdm(disable=True) as progress:
        return stages._encode(run, encoder, begun, start, stop, "embed_1", progress)


def signal_after(monkeypatch, num_batches):
    asked = iter([False] * (num_batches - 1) + [True])
    monkeypatch.setattr(distributed, "preempted", lambda: next(asked))


def test_embedding_stops_between_batches_and_goes_on_with_the_next(tmp_path, monkeypatch):
    whole = encode(tmp_path, Encoder())
    for name, array in FEATURES.items():
        np.testing.assert_array_equal(whole[name], array[10:30].astype(np.float16))
    encoder = Encoder()
    signal_after(monkeypatch, 2)
    with pytest.raises(distributed.Preempted, match="embed_1, 18 pairs: stopped by SIGTERM"):
        encode(tmp_path, encoder)
    signal_after(monkeypatch, 1)  # a second time
    with pytest.raises(distributed.Preempted, match="embed_1, 22 pairs"):
        encode(tmp_path, encoder)
    monkeypatch.undo()
    resumed = encode(tmp_path, encoder)
    assert encoder.encoded == [10, 14, 18, 22, 26]  # none twice
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


def test_batches_of_another_part_are_none_of_this_one(tmp_path, monkeypatch):
    """A kill may leave them when their part is whole."""
    signal_after(monkeypatch, 1)
    with pytest.raises(distributed.Preempted):
        encode(tmp_path, Encoder())
    monkeypatch.undo()
    encoder = Encoder()
    np.testing.assert_array_equal(
        encode(tmp_path, encoder, 30, 40)["image"], FEATURES["image"][30:40].astype(np.float16)
    )
    assert encoder.encoded == [30, 34, 38]


def test_part_is_written_before_its_signal_counts(tmp_path, monkeypatch):
    """After its last batch nothing is asked: `embed` does, when the part's files are there."""
    signal_after(monkeypatch, 3)
    assert len(encode(tmp_path, Encoder(), 10, 22)["text"]) == 12
    assert not (tmp_path / stages.BEGUN).exists()


@pytest.mark.parametrize("value", [0.5, np.nan])
def test_damaged_features_are_told_by_their_file(tmp_path, value):
    """Also where k-means refuses them first, as it does numbers that are not finite."""
    features = epath.Path(tmp_path / "features")

    def build(folder):
        for part in range(2):
            np.save(folder / f"image-{part:05d}.npy", FEATURES["image"][20 * part :][:20].astype(np.float16))
        return {}

    artifacts.make(features, {}, build)
    cluster = types.SimpleNamespace(num_clusters=3, max_fit_pairs=40)
    run = types.SimpleNamespace(config=types.SimpleNamespace(cluster=cluster), seed=0)
    assert stages._label(run, features, "image", epath.Path(tmp_path)) == [20, 20]
    damaged = np.load(features / "image-00001.npy", mmap_mode="r+")
    damaged[7, 1] = value
    damaged.flush()
    with pytest.raises(
        ValueError, match="image-00001.npy is damaged .*: delete .*features and make it again"
    ):
        stages._label(run, features, "image", epath.Path(tmp_path))


def test_features_may_have_more_parts_than_files_may_be_open(tmp_path):
    """65 million pairs have 1,000 parts, which is what a process may open where nobody raised it."""
    features, num_parts = epath.Path(tmp_path / "features"), 300

    def build(folder):
        for part in range(num_parts):
            np.save(folder / f"image-{part:05d}.npy", np.eye(3, dtype=np.float16))
        return {}

    artifacts.make(features, {}, build)
    cluster = types.SimpleNamespace(num_clusters=3, max_fit_pairs=100)
    run = types.SimpleNamespace(config=types.SimpleNamespace(cluster=cluster), seed=0)
    stages._label(run, features, "image", epath.Path(tmp_path))  # what is imported late opens files, too
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        assert stages._label(run, features, "image", epath.Path(tmp_path)) == [3] * num_parts
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("label", [9, -1])
def test_pseudo_labels_that_cannot_be_are_told(tmp_path, label):
    cluster = types.SimpleNamespace(num_clusters=3)
    run = types.SimpleNamespace(config=types.SimpleNamespace(cluster=cluster))
    before, out = epath.Path(tmp_path / "before"), epath.Path(tmp_path)
    before.mkdir()
    for modality in stages.MODALITIES:
        np.save(stages._labels_file(out, modality, 0), np.array([0, 1, 2, 2], np.uint16))
    np.save(before / "pseudo_labels.npy", np.array([0, 3, 8, 8], np.int32))
    stages._write_pseudo_labels(run, out, before, [4], 2)
    assert np.load(out / "pseudo_labels.npy").tolist() == [0, 31, 80, 80]
    np.save(before / "pseudo_labels.npy", np.array([0, 3, 8, label], np.int32))
    with pytest.raises(ValueError, match="before/pseudo_labels.npy is damaged .a label is not from 0 to 8."):
        stages._write_pseudo_labels(run, out, before, [4], 2)
