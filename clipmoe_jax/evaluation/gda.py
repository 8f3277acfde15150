"""Gaussian discriminant analysis of frozen features, alone and with zero-shot logits (arXiv 2402.04087).

It takes no training but means, one covariance and its inverse, and is hard to beat.

Letters: N images, C classes, d features.
"""

import numpy as np

from clipmoe_jax.evaluation.ood import CLIP_LOGIT_SCALE
from clipmoe_jax.evaluation.probe import check_held_out, check_labels, pick_held_out
from clipmoe_jax.evaluation.zero_shot import label_ranks, metrics_of_ranks

# Weights of GDA's logits beside those of zero-shot, as in the authors' code (github.com/mrflogs/ICLR24).
ALPHAS = 10.0 ** np.arange(-4, 3)
CHUNK = 65536  # images in float64 at a time


def fit_gda(features: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns weight (C, d) and bias (C,) of the logits features·weightᵀ + bias, float64.

    Classes are Gaussians of one covariance and equally probable: weight_c = P μ_c, bias_c = -μ_cᵀ P μ_c / 2.
    The precision is P = d ((N - 1) S + tr(S) I)⁻¹ of the covariance S within classes, which can be inverted
    however few images there are.

    features (N, d), labels (N,) int below num_classes. Raises ValueError for a class without images, and
    where all images of each class are the same.
    """
    labels = np.asarray(labels)
    counts = _count_images(labels, num_classes)
    means, scatter = np.zeros((num_classes, features.shape[1])), np.zeros(2 * features.shape[1:])
    chunks = [slice(start, start + CHUNK) for start in range(0, len(labels), CHUNK)]
    for chunk in chunks:
        np.add.at(means, labels[chunk], features[chunk])
    means /= counts[:, None]
    for chunk in chunks:
        centred = features[chunk] - means[labels[chunk]]
        scatter += centred.T @ centred  # in all (N - 1) S
    if not (trace := np.trace(scatter) / max(1, len(labels) - 1)):
        raise ValueError("gda: the training images of each class are all the same: give two or more")
    identity = np.eye(len(scatter))
    weight = len(scatter) * np.linalg.solve(scatter + trace * identity, means.T).T
    return weight, -np.einsum("cd,cd->c", weight, means) / 2


def check_gda(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for training labels (N,) int that are no class, for a class without images, and if no
    class has five."""
    _count_images(labels, num_classes)
    check_held_out(labels, "gda")


def _count_images(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns (C,) int64, the images of each class. Raises ValueError for a class without, and for labels
    that are no class."""
    check_labels(labels, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(f"gda: class {np.argmin(counts)} of {num_classes} has no training image: give some")
    return counts


def gda(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    classes: np.ndarray,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Returns top1, top5, mean_per_class (as `metrics_of_ranks`) of zero-shot logits plus alpha times GDA's,
    the same of GDA alone (`gda_top1`, …), and alpha.

    alpha is the best of ALPHAS, of equally good the smallest, on a fifth of each class's training images that
    GDA does not see; GDA is then fitted once more on all. Features (N, d) and classes (C, d), from prompts,
    are unit vectors; labels (N,) int. Raises ValueError as `check_gda` and `fit_gda`.
    """
    train_labels, num_classes = np.asarray(train_labels), len(classes)
    check_gda(train_labels, num_classes)
    out = pick_held_out(train_labels, seed)

    def logits(fitted: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight, bias = fit_gda(train_features[fitted], train_labels[fitted], num_classes)
        return CLIP_LOGIT_SCALE * features @ classes.T, features @ weight.T + bias

    zero_shot, gaussian = logits(~out, train_features[out])
    right = [np.mean(np.argmax(zero_shot + a * gaussian, axis=1) == train_labels[out]) for a in ALPHAS]
    alpha = float(ALPHAS[np.argmax(right)])
    zero_shot, gaussian = logits(np.ones(len(out), bool), test_features)
    metrics = metrics_of_ranks(label_ranks(zero_shot + alpha * gaussian, test_labels), test_labels)
    alone = metrics_of_ranks(label_ranks(gaussian, test_labels), test_labels)
    return metrics | {f"gda_{name}": value for name, value in alone.items()} | {"alpha": alpha}
