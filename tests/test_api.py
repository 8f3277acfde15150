"""The inputs of a loaded model: each gives features or one clear error."""

import dataclasses
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from clipmoe_jax.api import LoadedClip
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params, normalize_features
from clipmoe_jax.models.transformer import ComputeConfig

LENGTH = 12
TEXTS = ["A photo of a cat.", "Two dogs"]


def make_clip(vocab_size=49408):
    config = ClipConfig(
        embed_dim=16,
        vision=VisionConfig(image_size=16, patch_size=8, width=16, num_layers=1, head_width=8),
        text=TextConfig(vocab_size, LENGTH, width=16, num_layers=1, head_width=8),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract_params(config)
    )
    return LoadedClip(config, params, "dense CLIP", ComputeConfig())


@pytest.fixture(scope="module")
def clip():
    return make_clip()


class Column:
    """A column of a table: pandas' and polars' have a shape, iterate, and become arrays of objects."""

    def __init__(self, values):
        self.values, self.shape = values, (len(values),)

    def __array__(self, dtype=None, copy=None):
        array = np.empty(len(self.values), object)
        array[:] = self.values
        return array

    def __iter__(self):
        return iter(self.values)


IMAGES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
TEXT_INPUTS = {
    "tuple": tuple,
    "generator": iter,
    "array of strings": np.array,
    "array of objects": lambda texts: np.array(texts, object),
    "column of a table": Column,
    "numpy's own strings": lambda texts: np.array(texts, np.dtypes.StringDType()),
    "token ids": Tokenizer(LENGTH),
    "token ids of 64 bits": lambda texts: Tokenizer(LENGTH)(texts).astype(np.int64),
    "token ids in JAX": lambda texts: jnp.asarray(Tokenizer(LENGTH)(texts)),
    "token ids in PyTorch": lambda texts: torch.tensor(Tokenizer(LENGTH)(texts)).long(),
}
IMAGE_INPUTS = {
    "tuple": tuple,
    "generator": iter,
    "column of a table": Column,
    "pixels": lambda images: np.stack([preprocess_image(image, 16) for image in images]),
    "pixels in JAX": lambda images: jnp.stack([preprocess_image(image, 16) for image in images]),
    "pixels in PyTorch": lambda images: torch.tensor(np.stack([preprocess_image(i, 16) for i in images])),
}


@pytest.mark.parametrize("form", TEXT_INPUTS.values(), ids=TEXT_INPUTS)
def test_texts_may_come_in_many_forms(clip, form):
    np.testing.assert_array_equal(clip.encode_text(form(TEXTS)), clip.encode_text(TEXTS))


@pytest.mark.parametrize("form", IMAGE_INPUTS.values(), ids=IMAGE_INPUTS)
def test_images_may_come_in_many_forms(clip, form):
    np.testing.assert_array_equal(clip.encode_image(form(IMAGES)), clip.encode_image(IMAGES))


def test_a_single_one_is_a_batch_of_one(clip):
    for encode, one in ((clip.encode_text, TEXTS[0]), (clip.encode_image, IMAGES[0])):
        np.testing.assert_array_equal(encode(one), encode([one]))
    np.testing.assert_array_equal(clip.encode_text(np.array(TEXTS[0])), clip.encode_text(TEXTS[:1]))


EMPTY = {
    "list": [],
    "array": np.array([]),
    "column of a table": Column([]),
    "images": np.zeros((0, 16, 16, 3), np.uint8),
    "token ids": np.zeros((0, LENGTH), np.int32),
}


@pytest.mark.parametrize("nothing", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_gives_no_rows(clip, nothing, normalize):
    for encode, shape in ((clip.encode_text, (LENGTH,)), (clip.encode_image, (16, 16, 3))):
        if np.ndim(nothing) < 2 or nothing.shape[1:] == shape:
            features = encode(nothing, normalize=normalize)
            assert features.shape == (0, 16) and features.dtype == jnp.float32


def test_nothing_is_encoded_by_a_model_with_tokens_of_its_own():
    assert make_clip(300).encode_text([]).shape == (0, 16)


WRONG_TEXTS = {
    "nothing": (None, TypeError, "encode_text takes strings or one array of token ids .*, not a NoneType"),
    "a number": (7, TypeError, "not a int"),
    "a tokenizer's output": ({"input_ids": [[1]]}, TypeError, "not a dict"),
    "a set, which has no order": ({"a", "b"}, TypeError, "not a set"),
    "bytes": (b"a cat", TypeError, "not a bytes"),
    "a missing value": (["a cat", float("nan")], TypeError, "caption 1 is a float, expected a string"),
    "a missing value in a column": (Column(["a cat", None]), TypeError, "caption 1 is a NoneType"),
    "lists of ids": ([[49406, 49407]], TypeError, "caption 0 is a list, expected a string"),
    "a table": (
        np.array([["a", "b"]]),
        TypeError,
        r"not an array of objects of shape \(1, 2\): give one col",
    ),
    "floats": (np.zeros((1, 4)), TypeError, "token ids are float64: give integers"),
    "one row": (np.array([49406, 49407]), ValueError, r"token ids have shape \(2,\): give an array \(B, L\)"),
    "rows of nothing": (np.zeros((2, 0), int), ValueError, r"token ids have shape \(2, 0\)"),
    "too long": (
        np.ones((1, LENGTH + 1), int),
        ValueError,
        "tokens have length 13; this model takes at most",
    ),
    "an id too high": (
        np.array([[49406, 49408, 49407]]),
        ValueError,
        "token ids lie between 49406 and 49408, but this model's are 0 to 49407: give",
    ),
    "a negative id": (np.array([[49406, -1]]), ValueError, "token ids lie between -1 and 49406"),
}


@pytest.mark.parametrize(("texts", "error", "message"), WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_other_texts_are_refused_with_one_line(clip, texts, error, message):
    with pytest.raises(error, match=message):
        clip.encode_text(texts)


WRONG_IMAGES = {
    "nothing": (
        None,
        TypeError,
        r"encode_image takes PIL images or one array \(B, H, W, 3\), not a NoneType",
    ),
    "a file's name": ("photo.jpg", TypeError, "not a str"),
    "a path": (pathlib.Path("photo.jpg"), TypeError, "not a PosixPath"),
    "names of files": (["a.jpg"], TypeError, "not a list with str: open files with PIL.Image.open"),
    "a column of names": (Column(["a.jpg"]), TypeError, "not a list with str: open files"),
    "arrays": ([np.zeros((4, 4, 3), np.uint8)], TypeError, "with ndarray: .*make arrays images with PIL"),
    "one array": (
        np.zeros((16, 16, 3), np.uint8),
        ValueError,
        r"shape \(16, 16, 3\); this model takes \(B, ",
    ),
    "channels first": (np.zeros((1, 3, 16, 16), np.float32), ValueError, r"shape \(1, 3, 16, 16\); this"),
    "another size": (np.zeros((1, 32, 32, 3), np.uint8), ValueError, r"shape \(1, 32, 32, 3\); this model"),
    "another type": (np.zeros((1, 16, 16, 3), np.int32), TypeError, "images are int32: give uint8 pixels"),
    "a broken file": (
        Image.open(io.BytesIO(b"P5 50 40 255\nshort")),
        UnreadableImageError,
        "truncated",
    ),
}


@pytest.mark.parametrize(("images", "error", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_other_images_are_refused_with_one_line(clip, images, error, message):
    with pytest.raises(error, match=message):
        clip.encode_image(images)


def test_a_program_of_the_users_own_may_contain_the_model(clip):
    """Under jit there are no values of token ids to look at."""
    tokens = Tokenizer(LENGTH)(TEXTS)
    np.testing.assert_allclose(jax.jit(clip.encode_text)(tokens), clip.encode_text(tokens), atol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 300])
def test_batches_of_any_size_give_the_features_of_their_rows(clip, num_rows):
    images = np.random.default_rng(num_rows).integers(0, 256, (num_rows, 16, 16, 3), np.uint8)
    tokens = np.resize(Tokenizer(LENGTH)(TEXTS), (num_rows, LENGTH))
    for method, rows in (("encode_image", images), ("encode_text", tokens)):
        features = getattr(clip, method)(rows, normalize=True)
        expected = normalize_features(make_encode(clip.model, method)(clip.params, rows))
        assert features.shape == (num_rows, 16)
        np.testing.assert_allclose(features, expected, atol=1e-6)


def test_a_program_is_compiled_for_each_power_of_two():
    clip = make_clip()
    clip.model = clip.model.clone(compute=dataclasses.replace(clip.model.compute, attention="chunked"))
    for num_rows in (*range(1, 18), 260):
        clip.encode_image(np.zeros((num_rows, 16, 16, 3), np.uint8))
    assert make_encode(clip.model, "encode_image")._cache_size() == 7  # 1, 2, 4, 8, 16, 32, 256
