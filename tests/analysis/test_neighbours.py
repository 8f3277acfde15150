"""Nearest captions where one of two models is right: by hand, and against sorted score matrices."""

import numpy as np
import pytest

from clipmoe_jax.analysis.neighbours import neighbours

CAPTIONS = ("a cat", "a kitten", "a dog", "a bird", "a dog")
OF = np.array([0, 0, 1, 2, 3])
EYE = np.eye(4, dtype=np.float32)
# Scores of images (rows) and captions. Caption 4 is caption 2's words again.
BASE = np.array(
    [
        [0.3, 0.1, 0.5, 0.2, 0.5],  # image 0: a dog (0.5) before its own a cat (0.3): margin -0.2
        [0.2, 0.2, 0.9, 0.1, 0.9],  # image 1: its own words are also another caption: a tie, margin 0
        [0.1, 0.1, 0.2, 0.8, 0.1],  # image 2: right, margin 0.6
        [0.6, 0.1, 0.1, 0.1, 0.4],  # image 3: a cat before its own: margin -0.2
    ],
    np.float32,
)
MOE = np.array(
    [
        [0.4, 0.7, 0.6, 0.1, 0.1],  # image 0: right by a kitten, margin 0.1
        [0.2, 0.2, 0.8, 0.1, 0.7],  # image 1: right, but the base's first caption was right in words
        [0.9, 0.1, 0.3, 0.7, 0.1],  # image 2: a cat before its own: margin -0.2
        [0.1, 0.1, 0.3, 0.1, 0.9],  # image 3: right, margin 0.6
    ],
    np.float32,
)


def test_neighbours_by_hand():
    found = neighbours((EYE, BASE.T), (EYE, MOE.T), CAPTIONS, OF)
    approx = pytest.approx
    # Margins are 0.8 apart for image 3 (0.6 + 0.2) and 0.3 for image 0.
    assert found["clip_moe_right"] == [
        {"image": 3, "caption": "a dog", "base": ["a cat", approx(0.6)], "clip_moe": ["a dog", approx(0.9)]},
        {
            **{"image": 0, "caption": "a kitten"},
            **{"base": ["a dog", approx(0.5)], "clip_moe": ["a kitten", approx(0.7)]},
        },
    ]
    right = {"base": ["a bird", approx(0.8)], "clip_moe": ["a cat", approx(0.9)]}
    assert found["base_right"] == [{"image": 2, "caption": "a bird", **right}]


def test_neighbours_of_many_images_equal_sorting():
    """More images than a chunk holds: who is right by whole score matrices."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1500, 8)).astype("f4")
    texts = [images + rng.normal(0, 0.5, images.shape).astype("f4") for _ in range(2)]
    captions = [f"caption {i}" for i in range(1500)]
    found = neighbours((images, texts[0]), (images, texts[1]), captions, np.arange(1500), 10_000)
    first = [np.argmax(images @ of_model.T, axis=1) for of_model in texts]
    right = [best == np.arange(1500) for best in first]
    for name, expected in (("clip_moe_right", right[1] & ~right[0]), ("base_right", right[0] & ~right[1])):
        assert sorted(example["image"] for example in found[name]) == np.flatnonzero(expected).tolist()
        assert max(example["image"] for example in found[name]) > 1024
        for example in found[name]:
            assert example["base"][0] == captions[first[0][example["image"]]]
