"""Out-of-distribution detection: how well a score tells images of known classes from others.

Letters: N images, C classes, d embedding. A score is higher for what looks like a known class.
"""

import numpy as np
import scipy  # scipy.special is imported where it is first used

CLIP_LOGIT_SCALE = 100.0


def detection_metrics(known_scores: np.ndarray, unknown_scores: np.ndarray) -> dict[str, float]:
    """Returns auroc and fpr95.

    auroc: the probability that a known image scores higher than an unknown one, equal scores counting half;
    fpr95: the share of unknown images accepted (score ≥ threshold) by the highest threshold that accepts 95 %
    of the known ones.

    known_scores (N,), unknown_scores (M,). Raises ValueError if one is empty or not finite.
    """
    from sklearn.metrics import roc_auc_score  # here because it is slow to import

    known, unknown = np.asarray(known_scores), np.asarray(unknown_scores)
    for name, scores in (("known", known), ("unknown", unknown)):
        if not len(scores) or not np.isfinite(scores).all():
            raise ValueError(f"detection: {len(scores)} scores of {name} images: none, or some not finite")
    is_known = np.repeat([1, 0], [len(known), len(unknown)])
    threshold = np.sort(known)[::-1][int(np.ceil(0.95 * len(known))) - 1]
    return {
        "auroc": float(roc_auc_score(is_known, np.concatenate([known, unknown]))),
        "fpr95": float(np.mean(unknown >= threshold)),
    }


def max_probability(probabilities: np.ndarray) -> np.ndarray:
    """Returns MSP, the highest probability (arXiv 1610.02136): (N, C) -> (N,)."""
    return probabilities.max(axis=1)


def zero_shot_probabilities(
    image_features: np.ndarray, classes: np.ndarray, logit_scale: float = CLIP_LOGIT_SCALE
) -> np.ndarray:
    """Returns the softmax over scaled inner products of unit features: (N, d), (C, d) -> (N, C).

    logit_scale is the factor itself, not its logarithm.
    """
    return scipy.special.softmax(logit_scale * (image_features @ classes.T), axis=1)


def cooked_probabilities(classifier: np.ndarray, probe: np.ndarray, zero_shot: np.ndarray) -> np.ndarray:
    """Averages the probabilities of three models, as COOkeD does (arXiv 2507.22576,
    https://github.com/glhr/COOkeD): a classifier trained on the known classes alone, a linear probe of CLIP's
    image features, and zero-shot CLIP at scale 100.

    Each (N, C) -> (N, C). Its authors score it by `max_probability` in their demo.py, by minus the entropy in
    their eval.py. Raises ValueError for shapes that differ and rows that do not sum to 1.
    """
    members = {"classifier": classifier, "probe": probe, "zero-shot": zero_shot}
    for name, probabilities in members.items():
        if probabilities.shape != classifier.shape:
            raise ValueError(
                f"COOkeD: {name} probabilities are {probabilities.shape}, those of the classifier "
                f"{classifier.shape}: give all three the same images and classes"
            )
        if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3):
            raise ValueError(f"COOkeD: {name} probabilities do not sum to 1: give softmax, not logits")
    return np.mean(list(members.values()), axis=0)
