"""Features of a data set: the same however its captions reach the model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.core import accelerators, distributed, sharding, trees
from clipmoe_jax.data.loader import DecodedPairs
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder, make_encode
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, normalize_features
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

CONFIG = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=1, head_width=8),
    text=TextConfig(context_length=64, width=16, num_layers=1, head_width=8),
)


def test_captions_that_share_rows_have_the_same_features(scenes, monkeypatch):
    """43 records in batches of 16 on 8 devices; of the last batch two devices have no caption."""
    model, mesh, records = Clip(CONFIG), sharding.make_mesh(2, 2, 2), Records(scenes)
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 64), jnp.int32)
    params = sharding.init_params(
        mesh, lambda key: model.init(key, images, tokens)["params"], jax.random.key(0)
    )
    encoder = Encoder(model, params, mesh, batch_size=16)
    pairs = DecodedPairs(records, Tokenizer(64), 32, packs=True)
    expected = encoder.pairs(pairs, stop=43)
    with encoder.open(pairs, stop=43, num_text_shards=8) as batches:  # to compile costs more than it saves
        assert {np.shape(batch["text"]) for batch in batches} == {(16, 64)}
    monkeypatch.setattr(accelerators, "flops_of_compilation", lambda: 1.0)
    found = encoder.pairs(pairs, stop=43)
    for tower in ("image", "text"):
        assert expected[tower].shape == (43, 16)
        np.testing.assert_allclose(found[tower], expected[tower], atol=1e-5)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(distributed.Preempted, match="^encoding: "):
        patch.setattr(distributed, "preempted", lambda: True)  # an evaluation stops between batches
        encoder.texts(np.zeros((3, 64), np.int32))
    with encoder.open(pairs, stop=43, num_text_shards=8) as batches:
        assert [len(batch["text"].tokens) for batch in batches] == [
            8,
            8,
            8,
        ]  # a row a device, of two captions


@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_a_batch_have_the_features_of_the_batch(transposed):
    """Of 11 images of 5 tokens and 7 captions of 64, 16 wide: 4 parts of 3 images, 7 of one caption."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 32, 32, 3), np.uint8)
    tokens = rng.integers(1, 49406, (7, 64)).astype(np.int32)
    whole = Clip(CONFIG, ComputeConfig())
    params = whole.init(jax.random.key(0), images[:1], tokens[:1])["params"]
    held = trees.transpose_kernels(params) if transposed else params
    parted = Clip(CONFIG, ComputeConfig(encoded_values=3 * 5 * 16))
    loops = {}
    for method, inputs in (("encode_image", images), ("encode_text", tokens)):
        encode = make_encode(parted, method, transposed)
        expected = make_encode(whole, method)(params, inputs)
        np.testing.assert_allclose(encode(held, inputs), expected, atol=1e-5)
        [program] = jax.make_jaxpr(encode)(held, inputs).eqns
        [loops[method]] = (
            equation.params["length"]
            for equation in program.params["jaxpr"].eqns
            if equation.primitive.name == "scan"
        )
    assert loops == {"encode_image": 4, "encode_text": 7}


@pytest.mark.parametrize(("num_rows", "computed"), [(0, 0), (3, 3), (4, 6), (10, 11)])
def test_parts_without_a_row_that_counts_are_left_out(num_rows, computed):
    """Of 11 images in parts of 3: a small set of images costs what it has, and not a whole batch."""
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    model = Clip(CONFIG, ComputeConfig(encoded_values=3 * 5 * 16))
    params = model.init(jax.random.key(0), images[:1], np.zeros((1, 64), np.int32))["params"]
    encode = make_encode(model, "encode_image")
    whole, found = encode(params, images), encode(params, images, num_rows)
    np.testing.assert_allclose(found[:computed], whole[:computed], atol=1e-6)
    np.testing.assert_array_equal(found[computed:], 1)
    assert " conditional(" in encode.lower(params, images, num_rows).compile().as_text()


def test_an_encoder_computes_the_rows_that_it_is_given(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), np.uint8)
    model = Clip(CONFIG, ComputeConfig(encoded_values=3 * 5 * 16))
    params = model.init(jax.random.key(0), images[:1], np.zeros((1, 64), np.int32))["params"]
    computed = []

    def make(*arguments):
        def run(params, inputs, num_rows):
            computed.append(int(num_rows))
            return encode(params, inputs, num_rows)

        encode = make_encode(*arguments)
        return run

    monkeypatch.setattr("clipmoe_jax.evaluation.encoder.make_encode", make)
    encoder = Encoder(model, params, sharding.make_mesh(devices=jax.devices()[:1]), batch_size=16)
    expected = normalize_features(make_encode(model, "encode_image")(params, images))
    np.testing.assert_allclose(encoder.images(images), expected, atol=1e-6)
    valid = np.isin(np.arange(16), [0, 7, 9])
    batch = {"image": images[:16], "valid": valid}
    np.testing.assert_allclose(encoder.batches([batch], ["image"])["image"], expected[:16][valid], atol=1e-6)
    assert computed == [16, 5, 10]


@pytest.mark.parametrize(
    ("method", "inputs"),
    [("encode_image", np.ones((1, 32, 32, 3), np.uint8)), ("encode_text", np.ones((1, 64), np.int32))],
)
def test_kernels_that_are_held_transposed_are_not_copied_for_one_input(method, inputs):
    """Of the last block one row goes through the feed-forward layer; the kernels are most of what is read."""
    model = Clip(CONFIG, ComputeConfig(mlp_chunk_rows=4))
    params = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3)), np.zeros((1, 64), np.int32))["params"]
    held, encode = trees.transpose_kernels(params), make_encode(model, method, transposed=True)
    text = encode.lower(held, inputs).compile().as_text()
    assert "mlp____c_fc____kernel" in text
    assert not re.search(r"transpose\w*fusion\S* = \S+ fusion\(\S*mlp____\w+kernel", text)
    np.testing.assert_allclose(encode(held, inputs), make_encode(model, method)(params, inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "inputs", "error"),
    [
        (
            "encode_image",
            np.zeros((9, 24, 24, 3), np.uint8),
            r"images have shape \(9, 24, 24, 3\); this",
        ),
        ("encode_image", np.zeros((9, 8), np.int32), r"images have shape \(9, 8\); this model takes"),
        ("encode_text", np.zeros((9, 65), np.int32), "tokens have length 65; this model takes at most 64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_as_they_are(method, inputs, error):
    config = CONFIG if method == "encode_text" else dataclasses.replace(CONFIG, text=None)
    encode = make_encode(Clip(config, ComputeConfig(encoded_values=1)), method)
    with pytest.raises(ValueError, match=error):
        encode({"logit_scale": np.float32(0)}, inputs)


def test_rows_that_share_a_capacity_stay_together():
    model = Clip(
        dataclasses.replace(CONFIG, moe=MoeConfig(4, 2)), ComputeConfig(dispatch="capacity", encoded_values=1)
    )
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    params = model.init(jax.random.key(0), images[:1], np.zeros((1, 64), np.int32))["params"]
    expected, _ = jax.jit(functools.partial(model.apply, method="encode_image"))({"params": params}, images)
    np.testing.assert_array_equal(make_encode(model, "encode_image")(params, images), expected)


def test_nothing_has_features_without_rows():
    encoder = Encoder(Clip(CONFIG), {}, sharding.make_mesh(), batch_size=16)
    for features in (
        encoder.texts(np.zeros((0, 64), np.int32)),
        encoder.images(np.zeros((0, 32, 32, 3), np.uint8)),
    ):
        assert features.shape == (0, 16) and features.dtype == np.float32
