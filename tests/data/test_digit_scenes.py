"""Digit scenes: whose handwriting, and what a scene depends on."""

from importlib import resources

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clipmoe_jax.data import digit_scenes


def test_the_handwriting_is_scikit_learns():
    expected = load_digits()
    with np.load(resources.files("clipmoe_jax.data").joinpath("digits.npz")) as digits:
        np.testing.assert_array_equal(digits["images"], expected.images)
        np.testing.assert_array_equal(digits["target"], expected.target)


def test_seed_and_split_choose_the_scenes():
    def make(split, seed):
        return digit_scenes.make_scenes(3, split=split, seed=seed)

    assert make("train", 0) == make("train", 0)
    assert make("train", 0) != make("train", 1)
    assert make("train", 0) != make("test", 0)
    with pytest.raises(ValueError, match="choose 'train' or 'test'"):
        make("valid", 0)
