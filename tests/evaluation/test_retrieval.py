"""Recall and ranks of retrieval, by hand and against sorting."""

import numpy as np
import pytest
import torch

from clipmoe_jax.evaluation.retrieval import RANDOM_TIES, _errors, retrieval_recall

# Image features along the axes make the scores what is written here. Two images, a row each; captions 0 and 1
# are of image 0, caption 2 is of image 1.
SCORES = np.array([[0.1, 0.8, 0.9], [0.2, 0.7, 0.6]], np.float32)
OF = np.array([0, 0, 1])


def recall_of_scores(scores, image_of_text, **options):
    return retrieval_recall(np.eye(len(scores), dtype=np.float32), scores.T, image_of_text, **options)


def test_several_captions_by_hand():
    # Image 0 finds its caption 1 (0.8) second, after caption 2; caption 0's place (third) does not count.
    # Image 1 finds its caption 2 (0.6) second, after caption 1.
    # Caption 0 finds image 0 (0.1) second, 1 finds image 0 (0.8) first, 2 finds image 1 (0.6) second.
    found = recall_of_scores(SCORES, OF, ranks=(1, 2))
    without_ties = {name: value for name, value in found.items() if not name.endswith(RANDOM_TIES)}
    for name in without_ties:
        assert found.get(f"{name}{RANDOM_TIES}", found[name]) == found[name]
    assert without_ties == pytest.approx(
        {
            "image_to_text_r1": 0,
            "image_to_text_r2": 1,
            "image_to_text_mean_rank": 2,
            "image_to_text_median_rank": 2,
            "text_to_image_r1": 1 / 3,
            "text_to_image_r2": 1,
            "text_to_image_mean_rank": 5 / 3,
            "text_to_image_median_rank": 2,
        }
    )


def test_an_images_other_captions_do_not_stand_before_its_best():
    # Image 0's captions are the first three by score: it has rank 0. Image 1 has its own first.
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.0, 0.0, 0.0, 0.5]], np.float32)
    found = recall_of_scores(scores, np.array([0, 0, 0, 1]), ranks=(1,))
    assert found["image_to_text_r1"] == 1


# google-research/big_vision's image_text_retrieval_test.py (0127fb6): distances of 4 images and 8 captions,
# two of each image, and recall at 1, 5 and 10.
ALL_FIRST = (
    *((0.0, 0.0, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1), (0.5, 0.4, 0.0, 0.0, 0.4, 0.2, 0.6, 0.4)),
    *((0.5, 0.4, 0.1, 0.5, 0.0, 0.0, 0.8, 0.3), (0.5, 0.4, 0.1, 0.5, 0.3, 0.2, 0.0, 0.0)),
)
SOME_FIRST = (
    *((0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1), (0.5, 0.4, 0.0, 0.0, 0.4, 0.2, 0.6, 0.4)),
    *((0.5, 0.4, 0.1, 0.5, 0.0, 0.8, 0.8, 0.3), (0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3)),
)


@pytest.mark.parametrize(
    ("direction", "distances", "changed", "expected"),
    [
        ("image_to_text", ALL_FIRST, {}, (1, 1, 1)),
        ("image_to_text", SOME_FIRST, {}, (0.5, 0.75, 1)),
        ("text_to_image", ALL_FIRST, {}, (1, 1, 1)),
        ("text_to_image", SOME_FIRST, {(0, 6): 0.1}, (0.375, 1, 1)),
    ],
)
def test_recall_equals_big_visions(direction, distances, changed, expected):
    distances = np.array(distances, np.float32)
    for place, value in changed.items():
        distances[place] = value
    found = recall_of_scores(-distances, np.arange(8) // 2)
    assert tuple(found[f"{direction}_r{k}"] for k in (1, 5, 10)) == expected


def test_ties_count_against():
    # All 4 x 4 scores are equal: three wrong answers stand before the right one, at position 3.
    found = recall_of_scores(np.full((4, 4), 0.5, np.float32), np.arange(4), ranks=(1, 3, 4))
    for direction in ("image_to_text", "text_to_image"):
        assert [found[f"{direction}_r{k}"] for k in (1, 3, 4)] == [0, 0, 1]


def test_ties_between_an_images_own_captions_do_not():
    # Two images with two captions each, all scores equal: two wrong captions stand before an image's own, one
    # wrong image before a caption's own.
    found = recall_of_scores(np.ones((2, 4), np.float32), np.array([0, 0, 1, 1]), ranks=(1, 2, 3))
    assert [found[f"image_to_text_r{k}"] for k in (1, 2, 3)] == [0, 0, 1]
    assert [found[f"text_to_image_r{k}"] for k in (1, 2, 3)] == [0, 1, 1]


def test_ties_in_random_order_by_hand():
    # Image 0: one wrong caption scores higher, its two tie with two wrong ones. Image 1: its one caption ties
    # with a wrong one. Of the first three by score, image 0 misses both its own with 2/4 · 1/3.
    scores = np.array([[0.5, 0.5, 0.9, 0.5, 0.5], [0.1, 0.1, 0.7, 0.7, 0.2]], np.float32)
    found = recall_of_scores(scores, np.array([0, 0, 1, 1, 1]), ranks=(1, 2, 3))
    by_hand = {1: (0 + 1) / 2, 2: (1 / 2 + 1) / 2, 3: (5 / 6 + 1) / 2}
    for k, expected in by_hand.items():
        assert found[f"image_to_text_r{k}{RANDOM_TIES}"] == pytest.approx(expected)
    assert found["image_to_text_r3"] == 1 / 2  # strictly, image 0's own stand fourth and fifth


def test_ties_in_random_order_are_what_a_sorting_tool_reports_on_average():
    """Half of the captions occur twice; torch.topk, as in clip-benchmark, over many orders of the answers."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(40, 8)).astype(np.float32)
    texts = images + rng.normal(0, 1, images.shape).astype(np.float32)
    texts[20:30] = texts[10:20]
    found = retrieval_recall(images, texts, np.arange(40))
    scores, orders = torch.from_numpy(images @ texts.T), [rng.permutation(40) for _ in range(400)]
    for k in (1, 5):
        tops = [torch.tensor(order)[torch.topk(scores[:, order], k)[1]] for order in orders]
        hits = [(top == torch.arange(40)[:, None]).any(dim=1).float().mean() for top in tops]
        assert found[f"image_to_text_r{k}{RANDOM_TIES}"] == pytest.approx(np.mean(hits), abs=0.01)
    assert found["image_to_text_r1"] < found[f"image_to_text_r1{RANDOM_TIES}"] - 0.05


def random_pairs(num_images=40, num_texts=100, dim=16):
    """Captions near their image, from one to several of each, in no order."""
    rng = np.random.default_rng(0)
    of = rng.permutation(
        np.concatenate([np.arange(num_images), rng.integers(0, num_images, num_texts - num_images)])
    )
    images = rng.normal(size=(num_images, dim)).astype(np.float32)
    texts = images[of] + rng.normal(0, 2, (num_texts, dim)).astype(np.float32)
    return images, texts, of


def naive_recall(images, texts, of, rank):
    """Sorts all answers of each query."""
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    image_hits = [i in of[np.argsort(-row)[:rank]] for i, row in enumerate(scores)]
    text_hits = [of[t] in np.argsort(-column)[:rank] for t, column in enumerate(scores.T)]
    return np.mean(image_hits), np.mean(text_hits)


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_recall_equals_sorting_all_answers(rank):
    images, texts, of = random_pairs()
    found = retrieval_recall(images, texts, of)
    expected = naive_recall(images, texts, of, rank)
    assert 0 < expected[0] <= 1 and 0 < expected[1] < 1
    assert (found[f"image_to_text_r{rank}"], found[f"text_to_image_r{rank}"]) == pytest.approx(expected)


def test_ranks_equal_sorting_all_answers():
    images, texts, of = random_pairs()
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    image_ranks = [1 + min(np.flatnonzero(of[np.argsort(-row)] == i)) for i, row in enumerate(scores)]
    text_ranks = [1 + list(np.argsort(-column)).index(of[t]) for t, column in enumerate(scores.T)]
    found = retrieval_recall(images, texts, of)
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        assert found[f"{name}_mean_rank"] == pytest.approx(np.mean(ranks))
        assert found[f"{name}_median_rank"] == np.median(ranks)


def test_answers_that_are_the_same_tie_wherever_they_stand():
    """Eleven captions of unlike images have one image's own caption's features: it comes twelfth."""
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(333, 512)).astype(np.float32)
    copies = np.array([0, 1, 15, 16, 100, 127, 128, 200, 255, 256, 331])
    texts[copies] = texts[332]
    images = texts.copy()
    images[copies] = -texts[332]  # far from the copies
    found = retrieval_recall(images, texts, np.arange(333), ranks=(1, 11, 12))
    first = (333 - len(copies) - 1) / 333
    assert found["image_to_text_r1"] == pytest.approx(first)
    assert found["image_to_text_r12"] - found["image_to_text_r11"] == pytest.approx(1 / 333)


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 99])
def test_chunks_change_nothing(chunk_size):
    pairs = random_pairs()
    assert retrieval_recall(*pairs, chunk_size=chunk_size) == retrieval_recall(*pairs)


@pytest.mark.parametrize("tower", [0, 1], ids=["images", "texts"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tower, value):
    pairs = random_pairs()
    pairs[tower][3, 2] = value
    with pytest.raises(ValueError, match="some features are not finite"):
        retrieval_recall(*pairs)


def test_images_without_caption_are_named():
    with pytest.raises(ValueError, match=r"images \[1, 3\] have no caption"):
        retrieval_recall(np.eye(4), np.eye(4)[:2], np.array([0, 2]))


def test_captions_of_images_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"captions are of images \[-1, 2\], of 2 images"):
        retrieval_recall(np.eye(2), np.ones((4, 2)), np.array([0, 1, 2, -1]))


def test_errors_are_those_of_a_mean_over_images_with_their_captions():
    """Captions of an image that are found or missed together count as one."""
    found = np.repeat(np.random.default_rng(0).random(400) < 0.3, 5)
    [error] = _errors(found[:, None], np.repeat(np.arange(400), 5), 400)
    assert error == pytest.approx(1.96 * np.sqrt(found.mean() * (1 - found.mean()) / 400), rel=0.1)


def test_errors_are_of_every_recall():
    features = np.eye(3, dtype=np.float32)
    numbers = retrieval_recall(features, features, np.arange(3), with_errors=True)
    assert numbers["image_to_text_r1_error"] == 0  # all are right in every draw
    assert sum(name.endswith("_error") for name in numbers) == 6
