"""The second world of the demo: signs whose names say nothing of their looks."""

import io

import numpy as np
import pytest
from PIL import Image

from clipmoe_jax.data.sources import open_source
from clipmoe_jax.data.sources.glyphs import NAMES


def read(spec):
    pairs = list(open_source(spec))
    return pairs, np.stack([np.asarray(Image.open(io.BytesIO(pair.image))) for pair in pairs])


def test_pairs_depend_on_split_and_seed_alone():
    _, images = read("glyphs:train?pairs=12&seed=3")
    _, fewer = read("glyphs:train?pairs=5&seed=3")
    np.testing.assert_array_equal(images[:5], fewer)
    for other in ("glyphs:test?pairs=12&seed=3", "glyphs:train?pairs=12&seed=4"):
        assert (read(other)[1] != images).mean() > 0.5
    assert images.shape == (12, 32, 32, 3)


def test_captions_of_training_are_sentences_and_those_of_test_labels():
    (first, *_), _ = read("glyphs:train?pairs=2")
    (label, *_), _ = read("glyphs:test?pairs=2")
    assert first.captions == (f"a photo of a {NAMES[0][0]}.",) and label.captions == (NAMES[0][0],)
    assert [len(set(names)) for names in NAMES] == [400, 400] and not {*NAMES[0]} & {*NAMES[1]}


def test_renderings_of_a_glyph_are_nearer_than_other_glyphs():
    """By the mean colour of each ninth: of 40 renderings most are nearest to their own glyph's other one."""
    _, images = read("glyphs:train?pairs=440")
    blurred = images[:, 1:31, 1:31].reshape(440, 3, 10, 3, 10, 3).mean(axis=(2, 4)).reshape(440, -1)
    again, first = blurred[400:], blurred[:400]
    nearest = np.argmin(((again[:, None] - first[None]) ** 2).sum(axis=2), axis=1)
    assert (nearest == np.arange(40)).mean() > 0.5


def test_other_alphabet_has_other_names_and_looks():
    pairs, images = read("glyphs:train?pairs=12&alphabet=1")
    assert pairs[0].captions == (f"a drawing of a {NAMES[1][0]}.",)
    assert (images != read("glyphs:train?pairs=12")[1]).mean() > 0.5


BAD = ["glyphs:valid", "glyphs:train?pairs=0", "glyphs:train?seed=x", "glyphs:train?alphabet=2"]


@pytest.mark.parametrize("spec", BAD)
def test_options_that_cannot_be_are_named(spec):
    with pytest.raises(ValueError, match=f"source {spec.partition('?')[0]}: "):
        open_source(spec)
