"""Clustering pairs by what a model already encodes, and accumulating the labels over stages.

Letters: N pairs, d embedding, k clusters of one modality.
"""

from collections.abc import Sequence

import numpy as np
import threadpoolctl


def fit_centres(parts: Sequence[np.ndarray], num_clusters: int, *, seed: int, max_fit: int) -> np.ndarray:
    """k-means centres (k, d) float32 of features in parts, each (rows, d), possibly on disk.

    They come from at most `max_fit` features drawn by the seed, which alone are in memory at once. One
    thread, since scikit-learn adds partial sums in the order in which threads finish.
    """
    from sklearn.cluster import KMeans  # here because it is slow to import

    starts = np.cumsum([0, *(len(part) for part in parts)])
    chosen = np.arange(starts[-1])
    if len(chosen) > max_fit:
        chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), max_fit, replace=False))
    if len(chosen) < num_clusters:
        raise ValueError(f"{len(chosen)} pairs cannot make cluster.num_clusters={num_clusters} clusters")
    bounds = np.searchsorted(chosen, starts)
    sample = [
        np.asarray(part[chosen[low:high] - start], np.float32)
        for part, start, low, high in zip(parts, starts, bounds, bounds[1:], strict=False)
    ]
    with threadpoolctl.threadpool_limits(1):
        kmeans = KMeans(num_clusters, n_init=3, random_state=seed).fit(np.concatenate(sample))
    return kmeans.cluster_centers_.astype(np.float32)


def nearest_centre(features: np.ndarray, centres: np.ndarray, chunk_size: int = 65536) -> np.ndarray:
    """Labels (N,) uint16 of features (N, d): which of the centres (k, d) is nearest, the first of equals."""
    half_norms = np.sum(centres**2, axis=1) / 2
    labels = np.empty(len(features), np.uint16)
    for start in range(0, len(features), chunk_size):
        chunk = np.asarray(features[start : start + chunk_size], np.float32)
        labels[start : start + chunk_size] = np.argmax(chunk @ centres.T - half_norms, axis=1)
    return labels


def accumulate_labels(
    previous: np.ndarray, image_labels: np.ndarray, text_labels: np.ndarray, num_clusters: int
) -> np.ndarray:
    """pseudo_label_s = pseudo_label_{s-1} * k^2 + text_label * k + image_label, (N,) int64; previous is zeros
    for the first stage."""
    labels = text_labels.astype(np.int64) * num_clusters + image_labels
    return previous.astype(np.int64) * num_clusters**2 + labels
