"""Precision and mean average precision, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from clipmoe_jax.evaluation import precision
from clipmoe_jax.evaluation.precision import precision_metrics


def test_average_precision_is_scikit_learns(monkeypatch):
    """In chunks of two queries, one of which has no right answer and does not count."""
    monkeypatch.setattr(precision, "CHUNK", 120)
    rng = np.random.default_rng(0)
    queries, answers = rng.normal(size=(9, 8)), rng.normal(size=(60, 8))
    groups = rng.integers(0, 8, 60)
    found = precision_metrics(queries, answers, np.arange(9), groups)
    scores = queries @ answers.T
    expected = [average_precision_score(groups == q, scores[q]) for q in range(8)]
    assert found["map"] == pytest.approx(np.mean(expected))
    best = np.argsort(-scores, axis=1)
    for k in (1, 5, 10):
        shares = [np.mean(groups[best[q, :k]] == q) for q in range(8)]
        assert found[f"p{k}"] == pytest.approx(np.mean(shares))


def test_precision_by_hand():
    """Right answers at the places 1 and 4 of four: (1 / 1 + 2 / 4) / 2; of equal scores, at 3 and 4."""
    answers = np.array([[0.9], [0.5], [0.4], [0.3]])
    found = precision_metrics(np.ones((1, 1)), answers, np.array([7]), np.array([7, 1, 2, 7]))
    assert found == pytest.approx({"p1": 1.0, "p5": 2 / 5, "p10": 2 / 10, "map": 0.75})
    found = precision_metrics(np.ones((1, 1)), np.ones((4, 1)), np.array([7]), np.array([7, 1, 2, 7]))
    assert found["p1"] == 0 and found["map"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    with pytest.raises(ValueError, match="precision: no query has a right answer"):
        precision_metrics(np.ones((1, 1)), np.ones((2, 1)), np.array([7]), np.array([1, 2]))
