"""Out-of-distribution detection by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from clipmoe_jax.evaluation.ood import (
    cooked_probabilities,
    detection_metrics,
    max_probability,
    zero_shot_probabilities,
)


def test_auroc_by_hand():
    # Of 2 x 3 comparisons the known image wins 3 (0.9) and 1 (0.4 > 0.1), and ties 1 (0.4 = 0.4).
    found = detection_metrics(np.array([0.9, 0.4]), np.array([0.1, 0.4, 0.5]))
    assert found["auroc"] == pytest.approx((3 + 1 + 0.5) / 6)


def test_fpr95_by_hand():
    # 20 known images: the threshold 2 keeps 19 of them, 95 %. Of the unknown ones 2 and 7 of four pass.
    found = detection_metrics(np.arange(1, 21), np.array([1, 1.5, 2, 7]))
    assert found["fpr95"] == 0.5
    # Of 19, 18 are too few: all must pass, with 1 and all that is above it.
    assert detection_metrics(np.arange(1, 20), np.array([0, 1, 1.5, 7]))["fpr95"] == 0.75


@pytest.mark.parametrize("levels", [5, 10**6], ids=["many ties", "few"])
def test_metrics_equal_scikit_learns(levels):
    rng = np.random.default_rng(0)
    known = np.round(rng.beta(4, 2, 400) * levels) / levels
    unknown = np.round(rng.beta(2, 3, 300) * levels) / levels
    is_known, scores = np.repeat([1, 0], [400, 300]), np.concatenate([known, unknown])
    found = detection_metrics(known, unknown)
    assert found["auroc"] == roc_auc_score(is_known, scores)
    fpr, tpr, _ = roc_curve(is_known, scores, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)])
    assert 0 < found["fpr95"] < 1


def test_score_that_tells_nothing_is_at_chance():
    assert detection_metrics(np.ones(10), np.ones(30)) == {"auroc": 0.5, "fpr95": 1}


@pytest.mark.parametrize(
    ("known", "unknown"), [([], [1.0]), ([1.0], []), ([1.0], [np.nan]), ([np.inf], [1.0])]
)
def test_scores_that_are_none_or_not_finite_are_refused(known, unknown):
    with pytest.raises(ValueError, match=r"detection: [01] scores of (un)?known images"):
        detection_metrics(np.array(known), np.array(unknown))


def test_highest_probability_by_hand():
    np.testing.assert_allclose(max_probability(np.array([[0.5, 0.25, 0.25], [1, 0, 0]])), [0.5, 1])


def test_zero_shot_probabilities_by_hand():
    # Inner products 0.6 and 0.8: at scale 10 the odds are e^2.
    found = zero_shot_probabilities(np.array([[0.6, 0.8]]), np.eye(2), 10.0)
    np.testing.assert_allclose(found, [[1 / (1 + np.e**2), 1 / (1 + np.e**-2)]])
    assert zero_shot_probabilities(np.array([[0.6, 0.8]]), np.eye(2))[0, 1] == pytest.approx(1 - np.exp(-20))


def test_cooked_by_hand():
    # One image, two classes: (0.9 + 0.6 + 0.3) / 3 = 0.6.
    members = [np.array([[p, 1 - p]]) for p in (0.9, 0.6, 0.3)]
    np.testing.assert_allclose(cooked_probabilities(*members), [[0.6, 0.4]])


def test_cooked_tells_what_none_of_its_members_does():
    """Three sure classifiers agree on known images and not on unknown ones: MSP tells only of the mean."""
    sure = 0.9 * np.eye(3) + 0.1 / 3
    known = cooked_probabilities(sure, sure, sure)
    unknown = cooked_probabilities(sure, np.roll(sure, 1, axis=1), np.roll(sure, 2, axis=1))
    alone = detection_metrics(max_probability(sure), max_probability(np.roll(sure, 1, axis=1)))
    assert alone["auroc"] == 0.5
    assert detection_metrics(max_probability(known), max_probability(unknown)) == {"auroc": 1, "fpr95": 0}


def test_cooked_members_that_do_not_fit_are_refused():
    good = np.full((2, 4), 0.25)
    with pytest.raises(
        ValueError, match=r"COOkeD: probe probabilities are \(2, 3\), those of the classifier"
    ):
        cooked_probabilities(good, good[:, :3], good)
    with pytest.raises(ValueError, match="COOkeD: zero-shot probabilities do not sum to 1"):
        cooked_probabilities(good, good, 8 * good)
