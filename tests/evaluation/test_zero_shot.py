"""Zero-shot classification by hand."""

import numpy as np
import pytest

from clipmoe_jax.evaluation.zero_shot import class_embeddings, zero_shot_accuracy


def test_class_embeddings_by_hand():
    # Class 0 has the prompts (1, 0) and (0, 1), mean (1/2, 1/2) of length sqrt(1/2); class 1 has (0, -3).
    texts = np.array([[1, 0], [0, -3], [0, 1]], np.float32)
    classes = class_embeddings(texts, [0, 1, 0])
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [0, -1]], rtol=1e-6)


def test_accuracy_by_hand():
    classes = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    # Nearest are classes 0, 1, 2 and 0; the last image is of class 1.
    images = np.array([[2, 1], [1, 2], [-1, 0.5], [0.6, 0.5]], np.float32)
    assert zero_shot_accuracy(images, classes, [0, 1, 2, 1]) == pytest.approx(3 / 4)


def test_more_prompts_of_a_class_do_not_make_it_nearer():
    """Class 0 has three prompts, class 1 one; an image halfway but for a hair is of class 1."""
    texts = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    classes = class_embeddings(texts, [0, 0, 0, 1])
    assert zero_shot_accuracy(np.array([[0.7, 0.71]], np.float32), classes, [1]) == 1
