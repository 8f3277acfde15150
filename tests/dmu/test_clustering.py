"""Clustering pairs and accumulating the labels of the stages."""

import numpy as np
import pytest

from clipmoe_jax.dmu.clustering import accumulate_labels, fit_centres, nearest_centre

CENTRES = 10 * np.eye(3, 8, dtype=np.float32)


def kmeans_labels(features, num_clusters, *, seed, max_fit, chunk_size=65536, num_parts=1):
    parts = np.array_split(features, num_parts)
    sizes = [len(part) for part in parts]
    centres = fit_centres(parts, sizes, num_clusters, seed=seed, max_fit=max_fit)
    return np.concatenate([nearest_centre(part, centres, chunk_size) for part in parts])


@pytest.fixture(scope="module")
def blobs():
    """300 points around three centres far apart, and which centre each belongs to."""
    rng = np.random.default_rng(0)
    of = rng.integers(0, 3, 300)
    return CENTRES[of] + rng.normal(0, 0.5, (300, 8)).astype(np.float32), of


def same_partition(labels, of):
    """Each label stands for one centre, whichever."""
    pairs = set(zip(labels.tolist(), of.tolist(), strict=True))
    return len(pairs) == len(set(labels.tolist())) == len(set(of.tolist()))


def test_blobs_are_separated(blobs):
    features, of = blobs
    labels = kmeans_labels(features, 3, seed=0, max_fit=1000)
    assert same_partition(labels, of)
    assert set(labels.tolist()) == {0, 1, 2}


def test_features_beyond_the_fitted_sample_are_labelled_too(blobs):
    features, of = blobs
    labels = kmeans_labels(features, 3, seed=0, max_fit=30, chunk_size=7)
    assert labels.shape == (300,)
    assert same_partition(labels, of)


def test_labels_do_not_depend_on_the_chunks(blobs):
    features, _ = blobs
    expected = kmeans_labels(features, 5, seed=0, max_fit=100)
    for chunk_size in (1, 64, 299, 300):
        labels = kmeans_labels(features, 5, seed=0, max_fit=100, chunk_size=chunk_size)
        np.testing.assert_array_equal(labels, expected)


def test_labels_are_those_of_the_least_distances():
    """Of features in half precision, as they lie on disk, in more rows than are multiplied at a time."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((5000, 96), np.float32).astype(np.float16)
    centres = rng.standard_normal((9, 96), np.float32)
    distances = np.square(features[:, None].astype(np.float64) - centres).sum(axis=2)
    np.testing.assert_array_equal(nearest_centre(features, centres), distances.argmin(axis=1))


def test_labels_do_not_depend_on_the_parts(blobs):
    """Parts as they lie on disk in half precision, of which a sample is drawn across their borders."""
    features = blobs[0].astype(np.float16)
    expected = kmeans_labels(features, 5, seed=0, max_fit=100)
    for num_parts in (2, 7):
        labels = kmeans_labels(features, 5, seed=0, max_fit=100, num_parts=num_parts)
        np.testing.assert_array_equal(labels, expected)


def test_labels_equal_scikit_learns_nearest_centres(blobs):
    from sklearn.metrics import pairwise_distances_argmin

    features = np.random.default_rng(1).normal(size=(500, 8)).astype(np.float32)
    np.testing.assert_array_equal(
        nearest_centre(features, CENTRES), pairwise_distances_argmin(features, CENTRES)
    )


def test_same_seed_gives_the_same_labels_and_another_others():
    """Of noise, where different seeds find different centres."""
    features = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    labels = [kmeans_labels(features, 9, seed=seed, max_fit=200) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert not np.array_equal(labels[0], labels[2])


def test_fewer_pairs_than_clusters_are_refused(blobs):
    features, _ = blobs
    with pytest.raises(ValueError, match="2 pairs cannot make cluster.num_clusters=3 clusters"):
        kmeans_labels(features[:2], 3, seed=0, max_fit=100)


def test_labels_of_three_stages_combine_as_base_k_digits():
    # Stage 1: text 2, image 1 -> 2 * 3 + 1 = 7. Stage 2: text 0, image 2 -> 7 * 9 + 2 = 65.
    # Stage 3: text 1, image 0 -> 65 * 9 + 3 = 588.
    labels = np.zeros(2, int)
    expected = [7, 65, 588]
    for image, text, label in zip([1, 2, 0], [2, 0, 1], expected, strict=True):
        labels = accumulate_labels(labels, np.array([image, 0]), np.array([text, 0]), 3)
        np.testing.assert_array_equal(labels, [label, 0])


def test_combined_label_is_unique_and_gives_its_parent():
    """For 2 clusters: 4 labels a stage, 16 after two; the parent of a label is label // 4."""
    image, text, previous = (a.ravel() for a in np.meshgrid([0, 1], [0, 1], np.arange(4)))
    labels = accumulate_labels(previous, image, text, 2)
    assert sorted(labels.tolist()) == list(range(16))
    np.testing.assert_array_equal(labels // 4, previous)
