"""k-means over what a model already encodes, and pseudo-labels accumulated over stages.

Letters: N pairs, R rows of a part, D embedding width, C clusters of one modality.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jaxtyping import Float, Float32, Int64, Integer, UInt16

BLOCK = 512  # rows whose float32 values stay in a core's cache


def fit_centres(
    parts: Sequence[Float[np.ndarray, "_ D"]],
    part_sizes: Sequence[int],
    num_clusters: int,
    *,
    seed: int,
    max_fit: int,
) -> Float32[np.ndarray, "C D"]:
    """Returns k-means centres (C, D) float32 of features in parts, each (R, D), possibly on disk.

    They are fitted to at most `max_fit` features drawn by the seed; only these are in memory, and parts are
    taken one after the other. part_sizes: each part's R. One thread computes: scikit-learn adds partial sums
    in the order in which threads finish. Raises ValueError for fewer pairs than clusters.
    """
    from sklearn.cluster import KMeans  # here because it is slow to import

    starts = np.cumsum([0, *part_sizes])
    num_pairs = int(starts[-1])
    if num_pairs < num_clusters:
        raise ValueError(f"{num_pairs} pairs cannot make cluster.num_clusters={num_clusters} clusters")
    if num_pairs > max_fit:
        chosen = np.sort(np.random.default_rng(seed).choice(num_pairs, max_fit, replace=False))
    else:
        chosen = np.arange(num_pairs)
    bounds = np.searchsorted(chosen, starts)
    sample = [
        np.asarray(parts[k][chosen[low:high] - starts[k]], np.float32)
        for k, (low, high) in enumerate(itertools.pairwise(bounds))
        if low < high
    ]
    with threadpoolctl.threadpool_limits(1):
        # scikit-learn declares n_init by its default alone, a string.
        kmeans = KMeans(num_clusters, n_init=3, random_state=seed)  # pyright: ignore[reportArgumentType]
        kmeans.fit(np.concatenate(sample))
    return kmeans.cluster_centers_.astype(np.float32)


def nearest_centre(
    features: Float[np.ndarray, "N D"], centres: Float32[np.ndarray, "C D"], chunk_size: int = 4096
) -> UInt16[np.ndarray, " N"]:
    """Returns the nearest of the centres (C, D) to each feature (N, D): (N,) uint16, the first of equals."""
    labels = np.empty(len(features), np.uint16)
    for start in range(0, len(features), chunk_size):
        chunk = np.asarray(features[start : start + chunk_size])
        if (num_rows := len(chunk)) < chunk_size:  # another shape would be compiled
            chunk = np.pad(chunk, ((0, chunk_size - num_rows), (0, 0)))
        labels[start : start + chunk_size] = _nearest_centre(chunk, centres)[:num_rows]
    return labels


@jax.jit
def _nearest_centre(features: jax.Array, centres: jax.Array) -> jax.Array:
    half_norms = jnp.sum(centres**2, axis=1) / 2

    def label(feature: jax.Array) -> jax.Array:
        # XLA converts half precision many times as fast as NumPy.
        products = jnp.dot(centres, feature.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(products - half_norms).astype(jnp.uint16)

    return jax.lax.map(label, features, batch_size=BLOCK)


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
