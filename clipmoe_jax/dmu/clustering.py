"""Clustering pairs by what a model already encodes, and accumulating the labels over stages.

Letters: N pairs, d embedding, k clusters of one modality.
"""

import numpy as np
import threadpoolctl


def kmeans_labels(
    features: np.ndarray, num_clusters: int, *, seed: int, max_fit: int, chunk_size: int = 65536
) -> np.ndarray:
    """k-means labels (N,) int64 of features (N, d) float32.

    The centres come from at most `max_fit` features drawn by the seed; all features are labelled in chunks.
    One thread, since scikit-learn adds partial sums in the order in which threads finish.
    """
    from sklearn.cluster import KMeans  # here because it is slow to import

    rng = np.random.default_rng(seed)
    sample = features
    if len(features) > max_fit:
        sample = features[np.sort(rng.choice(len(features), max_fit, replace=False))]
    if len(sample) < num_clusters:
        raise ValueError(f"{len(sample)} pairs cannot make cluster.num_clusters={num_clusters} clusters")
    with threadpoolctl.threadpool_limits(1):
        kmeans = KMeans(num_clusters, n_init=3, random_state=seed).fit(np.asarray(sample))
        starts = range(0, len(features), chunk_size)
        labels = [kmeans.predict(np.asarray(features[i : i + chunk_size])) for i in starts]
    return np.concatenate(labels).astype(np.int64)


def accumulate_labels(
    previous: np.ndarray | None, image_labels: np.ndarray, text_labels: np.ndarray, num_clusters: int
) -> np.ndarray:
    """pseudo_label_s = pseudo_label_{s-1} * k^2 + text_label * k + image_label, all (N,) int64."""
    labels = text_labels * num_clusters + image_labels
    return labels if previous is None else previous * num_clusters**2 + labels
