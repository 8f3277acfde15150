"""Captions that share rows are to the text tower what they are alone."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import grid

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.data.packing import pack, place_captions
from clipmoe_jax.models.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    abstract_params,
    positions_in_segments,
    text_mask,
)
from clipmoe_jax.models.inputs import PackedText
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.train import losses

DENSE = ClipConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=16, patch_size=8, width=32, num_layers=1, head_width=16),
    text=TextConfig(vocab_size=50, context_length=10, width=32, num_layers=2, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1))
SEQUENCE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1, sequence_share=2.0))
END_TOKEN_7 = dataclasses.replace(DENSE, text=dataclasses.replace(DENSE.text, eos_token_id=7))
# Where captions end, and what they were placed as: 10; 7 and 3; 4. A gap is left between the second row's.
ENDS, PLACED = (9, 3, 1, 5), (10, 4, 3, 7)


def captions(end_token=49) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(8, 47, (4, 10)).astype(np.int32)
    for row, end in zip(tokens, ENDS, strict=True):
        row[0], row[end], row[end + 1 :] = 48, end_token, 0
    return tokens


def packed(tokens, copies=1) -> PackedText:
    """`copies` units, each of all four captions, in three rows."""
    places = place_captions(copies * PLACED, copies, 10)
    assert places.num_rows == 3
    return pack(np.tile(tokens, (copies, 1)), np.array(copies * ENDS) + 1, places, copies)


@functools.cache
def random_params(config):
    rng = np.random.default_rng(1)
    leaves = trees.flatten(abstract_params(config))
    return trees.unflatten(
        {n: jnp.asarray(rng.normal(n.endswith("scale"), 0.3, leaf.shape), "f4") for n, leaf in leaves.items()}
    )


def encode(config, text, **compute):
    model = Clip(config, ComputeConfig(**compute))
    apply = jax.jit(lambda params, text: model.apply({"params": params}, text, method="encode_text"))
    return apply(random_params(config), text)


def test_positions_count_from_the_start_of_a_segment():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0, 3], [1] * 8, [0] * 8, [1, 0, 2, 0, 3, 3, 3, 3]])
    expected = [[0, 1, 2, 0, 1, 0, 1, 0], [*range(8)], [*range(8)], [0, 0, 0, 0, 0, 1, 2, 3]]
    assert positions_in_segments(segments).tolist() == expected


@pytest.mark.parametrize("attention", grid("chunked", rest=["xla"]))
@pytest.mark.parametrize(
    ("config", "dispatch"),
    grid(
        (END_TOKEN_7, "ragged"),
        (SEQUENCE, "ragged"),
        rest=[(DENSE, "ragged"), (MOE, "ragged"), (MOE, "dense"), (SEQUENCE, "dense")],
    ),
    ids=["end token 7", "sequence", "dense", "MoE, ragged", "MoE, dense", "sequence, dense"],
)
def test_features_and_router_logits_are_those_of_a_caption_a_row(config, dispatch, attention):
    end_token = config.text.eos_token_id or 49
    tokens = captions(end_token)
    text, compute = packed(tokens), {"dispatch": dispatch, "attention": attention}
    expected, aux = encode(config, tokens, **compute)
    found, aux_of_rows = encode(config, text, **compute)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if config.moe:
        logits = aux_of_rows["router_logits"].swapaxes(1, 2).reshape(30, 4)  # of one block
        for i, end in enumerate(ENDS):
            own = logits[text.ends[i] - end : text.ends[i] + 1]
            np.testing.assert_allclose(own, aux["router_logits"][i, 0, : end + 1], rtol=1e-5, atol=1e-5)
        balance = float(losses.load_balance(aux["router_logits"], 2, text_mask(tokens)))
        of_rows = float(losses.load_balance(aux_of_rows["router_logits"], 2, text_mask(text)))
        assert of_rows == pytest.approx(balance, rel=1e-5) and balance > 1.001


def test_the_mask_is_of_segments():
    text = packed(captions())
    np.testing.assert_array_equal(text_mask(text), text.segments > 0)
    assert text_mask(text).sum() == sum(ENDS) + 4


@pytest.mark.parametrize("config", grid(SEQUENCE, rest=[MOE]), ids=["sequence", "token"])
def test_gradients_are_those_of_a_caption_a_row(config):
    model, params = Clip(config), random_params(config)
    target = jax.random.normal(jax.random.key(0), (4, 24))

    @jax.jit
    def gradient(params, text):
        def loss(params):
            return jnp.sum(model.apply({"params": params}, text, method="encode_text")[0] * target)

        return jax.grad(loss)(params)["text"]

    tokens = captions()
    expected = gradient(params, tokens)
    chex.assert_trees_all_close(gradient(params, packed(tokens)), expected, rtol=1e-4, atol=1e-4)


def test_every_device_looks_its_own_captions_up():
    """Eight devices, a unit each: nothing travels."""
    mesh, tokens = sharding.make_mesh(2, 2, 2), captions()
    params = jax.device_put(random_params(DENSE), sharding.replicated(mesh))
    run = jax.jit(lambda params, text: Clip(DENSE).apply({"params": params}, text, method="encode_text")[0])
    with jax.set_mesh(mesh):
        text = sharding.put_batch(mesh, {"text": packed(tokens, copies=8)})["text"]
        compiled, found = run.lower(params, text).compile(), run(params, text)
    words = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    assert not any(word in compiled.as_text() for word in words)
    expected, _ = encode(DENSE, tokens)
    np.testing.assert_allclose(found, np.tile(expected, (8, 1)), rtol=1e-5, atol=1e-5)
