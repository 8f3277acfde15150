"""The inputs of a loaded model: each gives features or one clear error."""

import dataclasses
import io
import json
import os
import pathlib
import re
import tarfile
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import clipmoe_jax
from clipmoe_jax import api
from clipmoe_jax import config as configs
from clipmoe_jax.api import LoadedClip
from clipmoe_jax.core import trees
from clipmoe_jax.data import decoding
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.dmu.upcycling import stack_experts
from clipmoe_jax.evaluation.classes import templates
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    abstract_params,
    normalize_features,
)
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "python.md"
LENGTH = 12
TEXTS = ["A photo of a cat.", "Two dogs"]


def make_clip(vocab_size=49408, moe=None):
    config = ClipConfig(
        embed_dim=16,
        moe=moe,
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
    "uint8 arrays": lambda images: [np.asarray(image) for image in images],
    "arrays and images": lambda images: [np.asarray(images[0]), images[1]],
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
        r"encode_image takes image files, PIL images or uint8 arrays .*, not a NoneType",
    ),
    "no file": ("nowhere.jpg", FileNotFoundError, "No such file or directory: 'nowhere.jpg'"),
    "no image": (__file__, ValueError, r"test_api.py does not decode: not an image file \("),
    "contents of a file": ([b"P5 1 1"], TypeError, "an image is a bytes: give image files, PIL images or"),
    "floats in a list": (
        [np.zeros((4, 4, 3))],
        ValueError,
        r"an image is float64 of shape \(4, 4, 3\): give u",
    ),
    "grey arrays": ([np.zeros((4, 4), np.uint8)], ValueError, r"an image is uint8 of shape \(4, 4\): give"),
    "one array": (
        np.zeros((16, 16, 3), np.float32),
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


def test_patches_lie_in_their_places_and_may_be_units(clip):
    """A red image with a blue corner: one patch of four differs from those of a red one."""
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    pixels[..., 0], pixels[1, 8:, :8] = 255, (0, 0, 255)
    red, corner = (clip.encode_image(p, output="patches", normalize=True)[0] for p in pixels)
    assert red.shape == (2, 2, 16)
    np.testing.assert_allclose(jnp.linalg.norm(corner, axis=-1), 1, atol=1e-6)
    differences = np.abs(corner - red).max(axis=-1)
    assert np.unravel_index(differences.argmax(), (2, 2)) == (1, 0)
    assert clip.encode_image([], output="patches").shape == (0, 2, 2, 16)
    with pytest.raises(ValueError, match="output='tokens': choose one of pooled, patches"):
        clip.encode_image(IMAGES, output="tokens")


def test_a_program_of_the_users_own_may_contain_the_model(clip):
    """Under jit there are no values of token ids to look at."""
    tokens = Tokenizer(LENGTH)(TEXTS)
    np.testing.assert_allclose(jax.jit(clip.encode_text)(tokens), clip.encode_text(tokens), atol=1e-6)


@pytest.mark.parametrize("encoded_values", [0, 100], ids=["whole", "in parts"])
@pytest.mark.parametrize("num_rows", [1, 3, 8, 300])
def test_batches_of_any_size_give_the_features_of_their_rows(num_rows, encoded_values):
    """In parts of one row, so that one row too few is one too few."""
    clip = make_clip()
    clip.model = clip.model.clone(compute=ComputeConfig(encoded_values=encoded_values))
    images = np.random.default_rng(num_rows).integers(0, 256, (num_rows, 16, 16, 3), np.uint8)
    tokens = np.resize(Tokenizer(LENGTH)(TEXTS), (num_rows, LENGTH))
    for method, rows in (("encode_image", images), ("encode_text", tokens)):
        features = getattr(clip, method)(rows, normalize=True)
        expected = normalize_features(make_encode(Clip(clip.config), method)(clip.params, rows))
        assert features.shape == (num_rows, 16)
        np.testing.assert_allclose(features, expected, atol=1e-6)


def test_a_program_is_compiled_for_each_power_of_two():
    clip = make_clip()
    clip.model = clip.model.clone(compute=dataclasses.replace(clip.model.compute, attention="chunked"))
    for num_rows in (*range(1, 18), 260):
        clip.encode_image(np.zeros((num_rows, 16, 16, 3), np.uint8))
    program = make_encode(clip.model, "encode_image", False, output="pooled", value_attention=False)
    assert program._cache_size() == 7  # 1, 2, 4, 8, 16, 32, 256


def test_a_model_is_held_for_few_rows_and_has_the_params_that_were_saved(clip, tmp_path):
    """On a CPU its matrices are transposed, which shows in neither params, features nor a copy."""
    clip.save(tmp_path / "model")
    loaded = clipmoe_jax.load(str(tmp_path / "model"))
    held, saved = (
        tree["visual"]["resblocks_0"]["mlp"]["c_fc"]["kernel"] for tree in (loaded._held, clip.params)
    )
    np.testing.assert_array_equal(held, np.transpose(saved))
    chex.assert_trees_all_equal(loaded.params, clip.params)
    np.testing.assert_allclose(loaded.encode_image(IMAGES), clip.encode_image(IMAGES), atol=1e-6)
    np.testing.assert_allclose(loaded.encode_text(TEXTS), clip.encode_text(TEXTS), atol=1e-6)
    loaded.save(tmp_path / "again")
    chex.assert_trees_all_equal(read_model(str(tmp_path / "again")).params, clip.params)


@pytest.mark.parametrize(("smallest", "dispatch"), [(configs.SMALL_WIDTH, "dense"), (8, "ragged")])
def test_experts_of_a_loaded_model_run_by_the_size_of_its_towers(tmp_path, monkeypatch, smallest, dispatch):
    monkeypatch.setattr(configs, "SMALL_WIDTH", smallest)
    make_clip(moe=MoeConfig(3, 2)).save(tmp_path / "model")
    assert clipmoe_jax.load(str(tmp_path / "model")).model.compute.dispatch == dispatch


def test_kernels_are_held_in_the_dtype_of_the_computation(tmp_path):
    """But for routers'. It changes no feature: products take them in it anyway."""
    clip = make_clip(moe=MoeConfig(3, 2))
    clip.save(tmp_path / "model")
    loaded = clipmoe_jax.load(str(tmp_path / "model"), dtype="bfloat16")
    for name, leaf in trees.flatten(loaded.params).items():
        is_held = name.endswith("/kernel") and "router" not in name
        assert leaf.dtype == (jnp.bfloat16 if is_held else jnp.float32), name
    whole = LoadedClip(clip.config, clip.params, "dense CLIP", loaded.model.compute)
    for found, expected in (
        (loaded.encode_image(IMAGES), whole.encode_image(IMAGES)),
        (loaded.encode_text(TEXTS), whole.encode_text(TEXTS)),
    ):
        np.testing.assert_array_equal(found, expected)
    loaded.save(tmp_path / "rounded")
    saved = read_model(str(tmp_path / "rounded")).params
    rounded = {n: trees.cast_kernel(n, leaf, "bfloat16") for n, leaf in trees.flatten(clip.params).items()}
    chex.assert_trees_all_equal(trees.flatten(saved), jax.tree.map(np.float32, rounded))
    with pytest.raises(ValueError, match="dtype='int8': choose one of float32, bfloat16, float16"):
        clipmoe_jax.load(str(tmp_path / "model"), dtype="int8")


def test_files_are_read_as_they_are_encoded(clip, tmp_path):
    """By any kind of path, alone or among images, more than are computed at once."""
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    files = [tmp_path / "0.png", str(tmp_path / "1.png")]
    expected = clip.encode_image(IMAGES)
    np.testing.assert_array_equal(clip.encode_image(files), expected)
    np.testing.assert_array_equal(clip.encode_image(Column(list(map(str, files)))), expected)
    np.testing.assert_allclose(clip.encode_image(files[1]), expected[1:], atol=1e-6)
    mixed = (files + IMAGES) * 65
    np.testing.assert_allclose(clip.encode_image(mixed), np.tile(expected, (130, 1)), atol=1e-6)


def test_images_that_pil_opened_are_decoded_by_threads_where_nothing_is_shared(clip, monkeypatch, tmp_path):
    """One image that is given twice is loaded once; images within one open file are left to one thread."""
    rng = np.random.default_rng(0)
    for i in range(120):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as tar:
        for i in range(120):
            tar.add(tmp_path / f"{i}.png", f"{i}.png")
    threads = {}

    def noted(image, size):
        threads.setdefault(id(image), []).append(threading.get_ident())
        return preprocess_image(image, size)

    expected = np.stack([preprocess_image(Image.open(tmp_path / f"{i}.png"), 16) for i in range(120)])
    monkeypatch.setattr(api, "preprocess_image", noted)
    monkeypatch.setattr(decoding, "SLOW_SECONDS", 0.0)  # so that threads take over
    by_path = [Image.open(tmp_path / f"{i}.png") for i in range(120)]
    np.testing.assert_array_equal(clip.preprocess(by_path * 2), np.concatenate([expected] * 2))
    assert all(len(of_image) == 1 for of_image in threads.values())
    assert {threading.get_ident()} < {of_image[0] for of_image in threads.values()}
    threads.clear()
    with tarfile.open(tmp_path / "all.tar.gz") as tar:
        within = [Image.open(tar.extractfile(member)) for member in tar.getmembers()]
        np.testing.assert_array_equal(clip.preprocess(within), expected)
    assert {thread for of_image in threads.values() for thread in of_image} == {threading.get_ident()}


def test_preprocess_and_tokenize_give_what_the_towers_take(clip):
    pixels, ids = clip.preprocess(IMAGES), clip.tokenize(TEXTS)
    assert (pixels.dtype, pixels.shape, ids.dtype, ids.shape) == (np.uint8, (2, 16, 16, 3), np.int32, (2, 12))
    np.testing.assert_array_equal(pixels[1], preprocess_image(IMAGES[1], 16))
    np.testing.assert_array_equal(clip.preprocess(np.stack([np.asarray(i) for i in IMAGES])), pixels)
    np.testing.assert_array_equal(clip.preprocess(IMAGES[1]), pixels[1:])
    np.testing.assert_array_equal(ids, Tokenizer(LENGTH)(TEXTS))
    np.testing.assert_array_equal(clip.tokenize(TEXTS[0]), ids[:1])
    with pytest.raises(ValueError, match="has 300 tokens of its own, not CLIP's 49,408: give token ids"):
        make_clip(300).tokenize(TEXTS)


def test_similarity_is_the_cosine(clip):
    images, texts = (np.asarray(f, np.float64) for f in (clip.encode_image(IMAGES), clip.encode_text(TEXTS)))
    lengths = np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(texts, axis=1)
    np.testing.assert_allclose(clip.similarity(IMAGES, TEXTS), images @ texts.T / lengths, atol=1e-6)


def test_probabilities_are_those_of_one_prompt_a_class(clip):
    prompts = ["a photo of a cat.", "a photo of a dog."]
    expected = jax.nn.softmax(jnp.exp(clip.logit_scale) * clip.similarity(IMAGES, prompts))
    found = clip.classify(IMAGES, ["cat", "dog"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(clip.classify(IMAGES, ["cat", "dog"], "a photo of a {}."), found, atol=1e-6)
    np.testing.assert_allclose(clip.classify(IMAGES[0], "cat"), [[1.0]])


def test_a_table_of_templates_is_an_ensemble(clip):
    """As in OpenAI's notebook: unit features of a class's prompts, their mean, made a unit again."""
    classes = []
    for label in ("cat", "dog"):
        prompts = [sentence.replace("{}", label) for sentence in templates("imagenet")]
        mean = np.asarray(clip.encode_text(prompts, normalize=True)).mean(axis=0)
        classes.append(mean / np.linalg.norm(mean))
    cosines = clip.encode_image(IMAGES, normalize=True) @ np.stack(classes).T
    expected = jax.nn.softmax(jnp.exp(clip.logit_scale) * cosines)
    np.testing.assert_allclose(clip.classify(IMAGES, ["cat", "dog"], "imagenet"), expected, atol=1e-6)


WRONG_CLASSES = {
    "no label": (([],), ValueError, "labels are empty: give one or more"),
    "a number": ((["cat", 7],), TypeError, "classify takes labels as strings, not a list with int"),
    "no sentence": ((["cat"], ()), ValueError, "templates are empty: give one or more"),
    "no place": (
        (["cat"], ["a {}", "a photo"]),
        ValueError,
        "template 'a photo' has no {}: put it in place of the class name",
    ),
    "no table": (
        (["cat"], "imagenett"),
        ValueError,
        "template 'imagenett' has no {}: put it in place of the class name, or name one of the tables cif",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_CLASSES.values(), ids=WRONG_CLASSES)
def test_labels_and_templates_that_are_none_are_refused(clip, arguments, error, message):
    with pytest.raises(error, match=message):
        clip.classify(IMAGES, *arguments)


EXPERT_LAYERS = {"feed_forward": ("mlp",), "attention_and_feed_forward": ("mlp", "attn")}


@pytest.mark.parametrize("expert_layers", EXPERT_LAYERS)
def test_an_expert_is_the_dense_model_that_it_came_from(clip, tmp_path, expert_layers):
    """What is saved is loaded again, the mixture with its K."""
    rng, experts = np.random.default_rng(1), [clip.params]
    leaves = trees.flatten(clip.params)
    own = [
        name for name in leaves if name.split("/")[2:3] and name.split("/")[2] in EXPERT_LAYERS[expert_layers]
    ]
    experts += [trees.unflatten({**leaves, **{n: rng.normal(0, 0.1, leaves[n].shape) for n in own}})]
    moe = MoeConfig(2, 1, expert_layers=expert_layers)
    params = stack_experts(experts, jax.random.key(0), expert_layers=expert_layers)
    mixture = LoadedClip(dataclasses.replace(clip.config, moe=moe), params, "CLIP-MoE", ComputeConfig())
    mixture.save(tmp_path / "moe")
    mixture = clipmoe_jax.load(str(tmp_path / "moe"))
    assert mixture.config.moe == moe
    for e, of_expert in enumerate(experts):
        dense = LoadedClip(clip.config, of_expert, "dense CLIP", ComputeConfig())
        found = mixture.expert(e)
        assert (
            repr(found)
            == f"<dense CLIP, expert {e} of a CLIP-MoE (2 experts, 1 selected) of a run, embed_dim 16>"
        )
        np.testing.assert_allclose(found.encode_image(IMAGES), dense.encode_image(IMAGES), atol=1e-6)
        np.testing.assert_allclose(found.encode_text(TEXTS), dense.encode_text(TEXTS), atol=1e-6)
    with pytest.raises(ValueError, match="there is no expert 2: choose one of 0 to 1"):
        mixture.expert(2)
    with pytest.raises(ValueError, match="moe exists already: delete it or choose another folder"):
        mixture.save(tmp_path / "moe")


def test_damage_to_a_saved_model_is_told(clip, tmp_path):
    clip.save(tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "model.json").read_text())
    (tmp_path / "saved" / "model.json").write_text(json.dumps(content | {"activation": "gelu"}))
    with pytest.raises(ValueError, match=r"model.json is damaged \(its CRC-32 is"):
        clipmoe_jax.load(str(tmp_path / "saved"))
    assert os.listdir(tmp_path) == ["saved"]


def test_dir_shows_what_there_is_to_call():
    assert {"load", "LoadedClip"} <= set(dir(clipmoe_jax))


def test_lines_of_the_docs_run(clip, tmp_path, monkeypatch):
    """In docs/python.md, after the demo: here with an untrained model."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    moe = MoeConfig(2, 1, expert_layers="attention_and_feed_forward")
    params = stack_experts([clip.params] * 2, jax.random.key(0), expert_layers=moe.expert_layers)
    mixture = LoadedClip(dataclasses.replace(clip.config, moe=moe), params, "CLIP-MoE", ComputeConfig())
    mixture.save("runs/demo/moe/params")
    found = {}
    exec("\n".join(blocks), found)
    assert found["heat"].shape == (1, 2, 2) and found["images"].shape == (2, 16)
    assert found["gates"].shape == (1, 1, 2, 2, 2)
    gates = mixture.image_gates([*IMAGES, "photo.jpg"])
    np.testing.assert_allclose(gates[2:], found["gates"], atol=1e-6)
    assert mixture.image_gates([]).shape == (0, *gates.shape[1:])
    assert clipmoe_jax.load("runs/last").config.moe is None
