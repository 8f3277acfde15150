"""The linear probe and nearest neighbours, against scikit-learn and by hand."""

import numpy as np
import pytest
from grids import grid
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipmoe_jax.evaluation import probe
from clipmoe_jax.evaluation.gda import fit_gda, gda
from clipmoe_jax.evaluation.probe import fit_linear_probe, knn, linear_probe


def clusters(num_images, num_classes=8, dim=16, noise=0.35, seed=0):
    """Unit vectors around a direction for each class; the directions are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(num_classes, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_images)
    features = centres[labels] + rng.normal(0, noise, (num_images, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features.astype(np.float32), labels


@pytest.mark.parametrize("num_classes", grid(8, rest=[2]))
def test_probe_equals_scikit_learns_at_its_strength(num_classes):
    train, test = clusters(240, num_classes), clusters(150, num_classes, seed=1)
    found, probabilities = linear_probe(*train, *test, num_classes)
    reference = LogisticRegression(C=found["C"], max_iter=1000).fit(*train)
    expected = reference.predict_proba(test[0])
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert 0.6 < found["top1"] < 1
    assert found["top1"] == pytest.approx(reference.score(*test))
    assert found["mean_per_class"] == pytest.approx(
        balanced_accuracy_score(test[1], reference.predict(test[0]))
    )
    if num_classes > 5:
        assert found["top5"] == pytest.approx(top_k_accuracy_score(test[1], expected, k=5))


def test_probe_is_the_same_every_time():
    train, test = clusters(120), clusters(50, seed=1)
    first, second = (linear_probe(*train, *test, 8) for _ in range(2))
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


def test_a_class_without_training_images_is_never_the_answer():
    features, labels = clusters(120)
    train = labels != 3
    found, probabilities = linear_probe(features[train], labels[train], features, labels, 8)
    assert not probabilities[:, 3].any()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert found["top1"] <= np.mean(train)
    neighbours = knn(features[train], labels[train], features, labels, 8, k=5)
    assert neighbours["top5"] <= np.mean(train)


@pytest.mark.parametrize("num_images", [240, 24])
def test_gda_is_linear_discriminant_analysis_with_the_papers_shrinkage(num_images):
    """Of (N - 1) S + tr(S) I the identity has the part d / (N - 1 + d), and all of it another scale."""
    features, labels = clusters(num_images, dim=32)[0], np.arange(num_images) % 8
    test, (n, d) = clusters(150, dim=32, seed=1)[0], features.shape
    shrinkage = d / (n - 1 + d)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=np.full(8, 1 / 8))
    expected = reference.fit(features.astype(np.float64), labels).decision_function(test) + np.log(8)
    weight, bias = fit_gda(features, labels, 8)
    np.testing.assert_allclose(
        test @ weight.T + bias, d * (1 - shrinkage) / n * expected, rtol=1e-6, atol=1e-9
    )


def test_gda_joins_zero_shot_with_the_weight_that_held_out_images_choose():
    train, test = clusters(400), clusters(300, seed=1)
    centres = np.random.default_rng(99).normal(size=(8, 16)).astype(np.float32)
    classes = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    found = gda(*train, *test, classes)
    weight, bias = fit_gda(*train, 8)
    gaussian = test[0] @ weight.T + bias
    joined = 100 * test[0] @ classes.T + found["alpha"] * gaussian
    assert found["gda_top1"] == pytest.approx(np.mean(gaussian.argmax(axis=1) == test[1]))
    assert found["top1"] == pytest.approx(top_k_accuracy_score(test[1], joined, k=1))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(test[1], joined, k=5))
    # Prompts that mean nothing leave the choice to the training images.
    assert gda(*train, *test, np.zeros_like(classes))["top1"] == found["gda_top1"]
    with pytest.raises(ValueError, match="gda: class 7 of 8 has no training image"):
        fit_gda(train[0][train[1] < 7], train[1][train[1] < 7], 8)
    with pytest.raises(ValueError, match="no class has 5 training images"):
        gda(np.eye(16)[:8], np.arange(8), *test, classes)


def test_search_by_hand():
    """A peak at 0.4: of steps of 2 the best is 0, then -1 or 1 are worse, then 0.5, then 0.25, then 0.375."""
    tried = []

    def accuracy(exponent):
        tried.append(exponent)
        return -abs(exponent - 0.4)

    assert probe._search(accuracy) == 0.375
    assert tried == [-6, -4, -2, 0, 2, 4, 6, -1, 1, -0.5, 0.5, 0.25, 0.75, 0.375, 0.625][: len(tried)]
    # Equal everywhere: the strongest penalty, and nothing beyond it.
    assert probe._search(lambda exponent: 1.0) == -6


def test_a_fifth_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2], [10, 4, 27])
    held_out = probe.pick_held_out(labels, seed=0)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [2, 0, 5]
    assert (held_out != probe.pick_held_out(labels, seed=1)).any()


def test_knn_by_hand():
    # Cosines of the test image to the training images: 1, 0.8, 0.6, 0. With temperature 0.2 the first three
    # vote with e^5, e^4, e^3: class 1 has 148, class 0 has 55 + 20 = 75, class 2 is no neighbour.
    train = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]])
    arguments = dict(k=3, temperature=0.2)
    for label, expected in ((0, (0, 1)), (1, (1, 1)), (2, (0, 0))):
        found = knn(train, [1, 0, 0, 2], np.array([[2.0, 0]]), [label], 3, **arguments)
        assert (found["top1"], found["top5"]) == expected
    # At temperature 1 the votes are e^1 = 2.7 against e^0.8 + e^0.6 = 4.0.
    assert knn(train, [1, 0, 0, 2], np.array([[2.0, 0]]), [0], 3, k=3, temperature=1)["top1"] == 1


@pytest.mark.parametrize("chunk_size", [13, 4096])
def test_knn_equals_counting_votes(chunk_size):
    (train, train_labels), (test, test_labels) = clusters(300, noise=0.5), clusters(100, noise=0.5, seed=1)
    cosines = test.astype(np.float64) @ train.astype(np.float64).T
    votes = np.zeros((100, 8))
    for i, row in enumerate(cosines):
        for j in np.argsort(-row)[:20]:
            votes[i, train_labels[j]] += np.exp(row[j] / 0.07)
    order = np.argsort(-votes, axis=1, kind="stable")
    first_five = [
        label in ranked[:5] and own[label] > 0
        for ranked, own, label in zip(order, votes, test_labels, strict=True)
    ]
    found = knn(train, train_labels, test, test_labels, 8, chunk_size=chunk_size)
    assert 0.3 < found["top1"] < found["top5"] <= 1
    assert found["top1"] == pytest.approx(np.mean(order[:, 0] == test_labels))
    assert found["top5"] == pytest.approx(np.mean(first_five))


def test_too_few_images_or_classes_are_refused():
    features, labels = clusters(40)
    with pytest.raises(ValueError, match="the training images are of one class"):
        fit_linear_probe(features, np.zeros(40, int), 8)
    with pytest.raises(ValueError, match="no class has 5 training images"):
        fit_linear_probe(features[:8], np.arange(8), 8)
    with pytest.raises(ValueError, match=r"training labels \[7\] are not among the 7 classes"):
        fit_linear_probe(features, labels, 7)
    with pytest.raises(ValueError, match="k=41 neighbours of 40 training images"):
        knn(features, labels, features, labels, 8, k=41)
