"""Digit scenes: whose handwriting, and what a scene depends on."""

import hashlib
from importlib import resources

import numpy as np
import pytest
from sklearn.datasets import load_digits

from clipmoe_jax.data.sources import open_source
from clipmoe_jax.data.sources.digit_scenes import ATTRIBUTES, DigitScenes


def test_handwriting_is_scikit_learns():
    expected = load_digits()
    with np.load(resources.files("clipmoe_jax.data.sources").joinpath("digits.npz")) as digits:
        np.testing.assert_array_equal(digits["images"], expected.images)
        np.testing.assert_array_equal(digits["target"], expected.target)


def test_seed_and_split_choose_the_scenes():
    def draw(split, seed):
        return list(DigitScenes(split, pairs=3, seed=seed))

    assert draw("train", 0) == draw("train", 0)
    assert draw("train", 0) != draw("train", 1)
    assert draw("train", 0) != draw("test", 0)


def test_captions_do_not_change_the_scenes():
    detailed, coarse = (list(DigitScenes("train", pairs=5, captions=name)) for name in ("detailed", "coarse"))
    assert [pair.image for pair in detailed] == [pair.image for pair in coarse]
    for pair in detailed:
        assert list(pair.attributes) == list(ATTRIBUTES)
        assert all(value in pair.captions[0].split() for value in pair.attributes.values())
    lengths = [[len(pair.captions[0].split()) for pair in pairs] for pairs in (detailed, coarse)]
    assert sum(lengths[1]) < sum(lengths[0])


def test_fewer_scenes_are_the_first_of_more():
    source = open_source("digit_scenes:test?pairs=2&seed=5")
    assert list(source) == list(DigitScenes("test", pairs=4, seed=5))[:2]
    assert len(open_source("digit_scenes:test")) == 8000  # nothing is drawn


def test_scenes_of_the_demo_are_these():
    """The numbers in the README are of these scenes."""
    digest = hashlib.sha256()
    for pair in DigitScenes("train", pairs=100, captions="coarse", seed=0):
        digest.update(pair.image + pair.captions[0].encode())
    assert digest.hexdigest()[:16] == "36f7302d38f6b291"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit_scenes:valid", "SPLIT=valid: choose train or test"),
        ("digit_scenes:train?captions=long", "captions=long: choose detailed or coarse"),
        ("digit_scenes:train?pairs=0", "pairs=0 must be a whole number from 1"),
        (f"digit_scenes:train?pairs={20 * '9'}", "pairs=999999999999999999… has more than 18 digits"),
        (f"digit_scenes:train?seed={5000 * '9'}", "seed=999999999999999999… has more than 18 digits"),
        ("digit_scenes:train?pairs=1e3", "pairs=1e3 must be a whole number from 1"),
        ("digit_scenes:train?seed=-1", "seed=-1 must be a whole number from 0"),
        ("digit_scenes:train?size=32", "no option size; digit_scenes has pairs, captions, seed"),
    ],
)
def test_options_that_cannot_be_are_named(spec, message):
    with pytest.raises(ValueError, match=f"source digit_scenes:.*{message}"):
        open_source(spec)
