"""k-means over what a model already encodes, and pseudo-labels accumulated over stages.

Letters: N pairs, R rows of a part, D embedding width, C clusters of one modality.
"""

from collections.abc import Sequence

import numpy as np
import threadpoolctl
from jaxtyping import Float, Float32, Int64, Integer, UInt16


def fit_centres(
    parts: Sequence[Float[np.ndarray, "_ D"]], num_clusters: int, *, seed: int, max_fit: int
) -> Float32[np.ndarray, "C D"]:
    """Returns k-means centres (C, D) float32 of features in parts, each (R, D), possibly on disk.

    They are fitted to at most `max_fit` features drawn by the seed; only these are in memory. One thread
    computes: scikit-learn adds partial sums in the order in which threads finish. Raises ValueError for fewer
    pairs than clusters.
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
        # scikit-learn declares n_init by its default alone, a string.
        kmeans = KMeans(num_clusters, n_init=3, random_state=seed)  # pyright: ignore[reportArgumentType]
        kmeans.fit(np.concatenate(sample))
    return kmeans.cluster_centers_.astype(np.float32)


def nearest_centre(
    features: Float[np.ndarray, "N D"], centres: Float32[np.ndarray, "C D"], chunk_size: int = 65536
) -> UInt16[np.ndarray, " N"]:
    """Returns the nearest of the centres (C, D) to each feature (N, D): (N,) uint16, the first of equals."""
    half_norms = np.sum(centres**2, axis=1) / 2
    labels = np.empty(len(features), np.uint16)
    for start in range(0, len(features), chunk_size):
        chunk = np.asarray(features[start : start + chunk_size], np.float32)
        labels[start : start + chunk_size] = np.argmax(chunk @ centres.T - half_norms, axis=1)
    return labels


def accumulate_labels(
    previous: Integer[np.ndarray, " N"],
    image_labels: Integer[np.ndarray, " N"],
    text_labels: Integer[np.ndarray, " N"],
    num_clusters: int,
) -> Int64[np.ndarray, " N"]:
    """Returns pseudo_label_s = pseudo_label_{s-1} * C^2 + text_label * C + image_label, (N,) int64.

    previous: of the stage before, zeros for the first (the paper's section 3.1).
    """
    labels = text_labels.astype(np.int64) * num_clusters + image_labels
    return previous.astype(np.int64) * num_clusters**2 + labels
