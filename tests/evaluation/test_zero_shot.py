"""Zero-shot classification by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipmoe_jax.evaluation.zero_shot import (
    class_embeddings,
    classification_metrics,
    label_ranks,
    metrics_of_ranks,
    nearest_ranks,
)


def test_class_embeddings_by_hand():
    # Class 0 has the prompts (1, 0) and (0, 1), mean (1/2, 1/2) of length sqrt(1/2); class 1 has (0, -3).
    texts = np.array([[1, 0], [0, -3], [0, 1]], np.float32)
    classes = class_embeddings(texts, [0, 1, 0])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [0, -1]], rtol=1e-6)


def test_a_longer_prompt_feature_weighs_no_more():
    # (4, 0) and (0, 1) count as (1, 0) and (0, 1).
    classes = class_embeddings(np.array([[4, 0], [0, 1]], np.float32), [0, 0])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_a_class_without_prompt_is_named():
    with pytest.raises(ValueError, match="class 1 of 3 has no prompt"):
        class_embeddings(np.eye(2), [0, 2])


def test_metrics_by_hand():
    classes = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    # Nearest are classes 0, 1, 2 and 0; the last image is of class 1. Of class 1 half is right.
    images = np.array([[2, 1], [1, 2], [-1, 0.5], [0.6, 0.5]], np.float32)
    found = classification_metrics(images, classes, [0, 1, 2, 1])
    assert found == pytest.approx({"top1": 3 / 4, "top5": 1, "mean_per_class": (1 + 1 / 2 + 1) / 3})


def test_ties_go_to_the_lower_class():
    # Scores of 7 classes; 2, 4 and 6 tie for the first place, 0 and 5 for the last.
    scores = np.array([[0, 1, 3, 2, 3, 0, 3]] * 7, np.float32)
    assert label_ranks(scores, np.arange(7)).tolist() == [5, 4, 0, 3, 1, 6, 2]
    assert np.argmax(scores[0]) == 2


def test_a_model_that_knows_nothing_is_at_chance():
    found = classification_metrics(np.ones((20, 4)), np.ones((10, 4)), np.arange(20) % 10)
    assert found == pytest.approx({"top1": 0.1, "top5": 0.5, "mean_per_class": 0.1})


def test_metrics_equal_scikit_learns():
    rng = np.random.default_rng(0)
    labels = rng.choice(12, 300, p=np.arange(1, 13) / 78)  # as unbalanced as 12 to 1
    classes = rng.normal(size=(12, 8)).astype(np.float32)
    images = classes[labels] + rng.normal(0, 2, (300, 8)).astype(np.float32)
    scores = images @ classes.T
    for chunk_size in (7, 300):
        found = metrics_of_ranks(nearest_ranks(images, classes, labels, chunk_size=chunk_size), labels)
        assert 0.1 < found["top1"] < 0.9 and found["top1"] != found["mean_per_class"]
        assert found["top1"] == pytest.approx(top_k_accuracy_score(labels, scores, k=1))
        assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
        assert found["mean_per_class"] == pytest.approx(
            balanced_accuracy_score(labels, np.argmax(scores, axis=1))
        )


def test_more_prompts_of_a_class_do_not_make_it_nearer():
    """Class 0 has three prompts, class 1 one; an image halfway but for a hair is of class 1."""
    texts = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    classes = class_embeddings(texts, [0, 0, 0, 1])
    assert classification_metrics(np.array([[0.7, 0.71]], np.float32), classes, [1])["top1"] == 1


def test_scores_or_labels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"labels \[-1, 2\] are not among the 2 classes"):
        classification_metrics(np.eye(3, 2), np.eye(2), [-1, 0, 2])
    with pytest.raises(ValueError, match="some scores are not finite"):
        classification_metrics(np.full((1, 2), np.nan), np.eye(2), [0])
