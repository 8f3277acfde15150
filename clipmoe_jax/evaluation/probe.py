"""Classifiers on frozen features: a linear probe and nearest neighbours.

Letters: N images, C classes, d features.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy  # scipy.special is imported where it is first used

from clipmoe_jax.evaluation.zero_shot import label_ranks, metrics_of_ranks

HELD_OUT = 0.2
NEIGHBOURS = 20
# log10 of C, the inverse of the L2 penalty: from 1e-6 to 1e6, to an eighth of a decade.
COARSE_STRENGTHS = np.arange(-6.0, 7.0, 2.0)
FINEST_STEP = 0.125


class Probe(NamedTuple):
    """A linear probe. A class without training images has the lowest bias there is.

    Attributes:
        weight: (C, d) float32.
        bias: (C,) float32.
        strength: the C of the logistic regression, the inverse of its L2 penalty.
    """

    weight: np.ndarray
    bias: np.ndarray
    strength: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Returns (N, C) logits of (N, d) features."""
        return features @ self.weight.T + self.bias

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns (N, C) probabilities of (N, d) features."""
        return scipy.special.softmax(self.logits(features), axis=1)


def fit_linear_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, *, max_iter: int = 1000, seed: int = 0
) -> Probe:
    """Fits logistic regression by L-BFGS with an L2 penalty; features (N, d), labels (N,) int below
    num_classes.

    As in CLIP's paper (arXiv 2103.00020, A.3): at most 1,000 iterations; C is searched on a part held out (a
    fifth of each class, drawn by seed), first in steps of two decades and then around the best in steps that
    halve down to an eighth; the probe is fitted once more on everything. Of equally good C the smallest.
    Raises ValueError as `check_linear_probe`.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    check_linear_probe(labels, num_classes)
    held_out = pick_held_out(labels, seed)

    def accuracy(exponent: float) -> float:
        probe = _fit(features[~held_out], labels[~held_out], num_classes, 10.0**exponent, max_iter)
        return float(np.mean(np.argmax(probe.logits(features[held_out]), axis=1) == labels[held_out]))

    best = _search(accuracy)
    return _fit(features, labels, num_classes, 10.0**best, max_iter)


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    *,
    max_iter: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, float], np.ndarray]:
    """Returns top1, top5, mean_per_class (as `metrics_of_ranks`) and C of a probe, and its probabilities
    (N, C) of the test images. Arguments as for `fit_linear_probe`.
    """
    probe = fit_linear_probe(train_features, train_labels, num_classes, max_iter=max_iter, seed=seed)
    ranks = label_ranks(probe.logits(test_features), test_labels)
    metrics = metrics_of_ranks(ranks, test_labels) | {"C": probe.strength}
    return metrics, probe.probabilities(test_features)


def knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    num_classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = 0.07,
    chunk_size: int = 4096,
) -> dict[str, float]:
    """Returns top1, top5, mean_per_class (as `metrics_of_ranks`) of the votes of the k nearest training
    images.

    Features (N, d) compared by cosine, labels (N,) int below num_classes. A neighbour's vote weighs
    exp(cosine / temperature), as in DINO (arXiv 2104.14294, after arXiv 1805.01978). A class without vote is
    no answer, not even among the first five. Raises ValueError for more neighbours than training images.
    """
    from sklearn.neighbors import KNeighborsClassifier

    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    check_labels(train_labels, num_classes)
    if k > len(train_labels):
        raise ValueError(f"k={k} neighbours of {len(train_labels)} training images: use a smaller k")

    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp(-distances / temperature)  # votes are divided by their sum: a cosine of 1 may weigh 1

    weights: Any = weigh  # scikit-learn's types know strings alone
    neighbours = KNeighborsClassifier(n_neighbors=k, metric="cosine", weights=weights)
    neighbours.fit(train_features, train_labels)
    ranks = []
    for start in range(0, len(test_features), chunk_size):
        labels = test_labels[start : start + chunk_size]
        votes = np.zeros((len(labels), num_classes))
        votes[:, neighbours.classes_] = neighbours.predict_proba(test_features[start : start + chunk_size])
        has_vote = votes[np.arange(len(labels)), labels] > 0
        ranks.append(np.where(has_vote, label_ranks(votes, labels), np.inf))
    return metrics_of_ranks(np.concatenate(ranks), test_labels)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for training labels (N,) int that are no class."""
    if wrong := sorted(set(labels[(labels < 0) | (labels >= num_classes)].tolist())):
        raise ValueError(f"training labels {wrong[:10]} are not among the {num_classes} classes")


def check_linear_probe(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for training labels (N,) int that are no class, for fewer than two classes, and if no
    class has the five images to hold one out."""
    check_labels(labels, num_classes)
    if len(np.unique(labels)) < 2:
        raise ValueError("linear probe: the training images are of one class: give two or more")
    check_held_out(labels, "linear probe")


def check_held_out(labels: np.ndarray, what: str) -> None:
    """Raises ValueError if no class has the five images to hold one out. labels: (N,) int from 0 up, N > 0.
    what: begins the message."""
    if not _num_held_out(np.bincount(labels).max()):
        raise ValueError(
            f"{what}: no class has {round(1 / HELD_OUT)} training images, of which to hold one out"
        )


def pick_held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Picks the first fifth of each class, rounded down, in an order drawn by seed: (N,) int -> (N,) bool."""
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: _num_held_out(len(members))]] = True
    return held_out


def _num_held_out(num_images: int) -> int:
    return int(HELD_OUT * num_images)


def _search(accuracy: Callable[[float], float]) -> float:
    """Returns the exponent of the highest accuracy, between the ends of COARSE_STRENGTHS."""
    accuracies = {float(exponent): accuracy(exponent) for exponent in COARSE_STRENGTHS}
    step = (COARSE_STRENGTHS[1] - COARSE_STRENGTHS[0]) / 2
    while step >= FINEST_STEP:
        best = max(accuracies, key=lambda exponent: (accuracies[exponent], -exponent))
        for exponent in (best - step, best + step):
            if COARSE_STRENGTHS[0] <= exponent <= COARSE_STRENGTHS[-1] and exponent not in accuracies:
                accuracies[exponent] = accuracy(exponent)
        step /= 2
    return max(accuracies, key=lambda exponent: (accuracies[exponent], -exponent))


def _fit(features: np.ndarray, labels: np.ndarray, num_classes: int, strength: float, max_iter: int) -> Probe:
    from sklearn.exceptions import ConvergenceWarning  # here because scikit-learn is slow to import
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # The limit on iterations is part of the recipe.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=strength, max_iter=max_iter).fit(features, labels)
    weight = np.zeros((num_classes, features.shape[1]), np.float32)
    bias = np.full(num_classes, np.finfo(np.float32).min, np.float32)
    if len(fitted.classes_) == 2:  # scikit-learn has one row for two classes: that of the second's log odds
        low, high = fitted.classes_
        weight[high], bias[high], bias[low] = fitted.coef_[0], fitted.intercept_[0], 0
    else:
        weight[fitted.classes_], bias[fitted.classes_] = fitted.coef_, fitted.intercept_
    return Probe(weight, bias, float(strength))
