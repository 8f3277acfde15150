"""The two towers: the parameters they have, what they make of their inputs, and what they refuse."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive, grid, quick

from clipmoe_jax.core import trees
from clipmoe_jax.dmu.recipe import TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.models import transformer
from clipmoe_jax.models.clip import (
    VARIANTS,
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    abstract_params,
    text_mask,
)
from clipmoe_jax.models.feed_forward import ACTIVATIONS
from clipmoe_jax.models.inputs import MEAN, STD
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig, apply_blocks

DENSE = ClipConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=16, patch_size=8, width=64, num_layers=2, head_width=16),
    text=TextConfig(vocab_size=50, context_length=10, width=32, num_layers=2, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1))
CONFIGS = {"dense": DENSE, "MoE in the last block": MOE}
BATCH = 4


@pytest.fixture(scope="module")
def inputs():
    """uint8 images, and captions that end at positions 9, 3, 1 and 5 with the highest id."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    tokens = rng.integers(1, 47, (BATCH, 10)).astype(np.int32)
    for row, end in zip(tokens, (9, 3, 1, 5), strict=True):
        row[0], row[end], row[end + 1 :] = 48, 49, 0
    return images, tokens


@pytest.fixture(scope="module", params=quick(CONFIGS, "MoE in the last block"))
def config(request):
    return request.param


def random_params(config):
    """Random in every leaf: fresh biases are zeros, which would hide mistakes."""
    leaves = trees.flatten(abstract_params(config))
    rng = np.random.default_rng(1)
    return trees.unflatten(
        {
            name: jnp.asarray(rng.normal(name.endswith("scale"), 0.1, leaf.shape), jnp.float32)
            for name, leaf in leaves.items()
        }
    )


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@functools.cache
def jitted(config, compute, method=None):
    model = Clip(config, compute)
    return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs, method=method))


def apply(config, params, inputs, **compute):
    """Both towers' features and aux."""
    return jitted(config, ComputeConfig(**compute))(params, *inputs)


def encode(tower, config, params, array):
    """One tower's features."""
    return jitted(config, ComputeConfig(), f"encode_{tower}")(params, array)[0]


@pytest.fixture(scope="module")
def outputs(config, params, inputs):
    return apply(config, params, inputs)


def block_shapes(prefix, width):
    return {
        f"{prefix}/attn/in_proj/bias": (3 * width,),
        f"{prefix}/attn/in_proj/kernel": (width, 3 * width),
        f"{prefix}/attn/out_proj/bias": (width,),
        f"{prefix}/attn/out_proj/kernel": (width, width),
        f"{prefix}/ln_1/bias": (width,),
        f"{prefix}/ln_1/scale": (width,),
        f"{prefix}/ln_2/bias": (width,),
        f"{prefix}/ln_2/scale": (width,),
    }


SHARED = {
    "logit_scale": (),
    "text/ln_final/bias": (32,),
    "text/ln_final/scale": (32,),
    "text/positional_embedding": (10, 32),
    "text/text_projection": (32, 24),
    "text/token_embedding/embedding": (50, 32),
    "visual/class_embedding": (64,),
    "visual/conv1/kernel": (8, 8, 3, 64),
    "visual/ln_post/bias": (64,),
    "visual/ln_post/scale": (64,),
    "visual/ln_pre/bias": (64,),
    "visual/ln_pre/scale": (64,),
    "visual/positional_embedding": (2 * 2 + 1, 64),
    "visual/proj": (64, 24),
    **block_shapes("text/resblocks_0", 32),
    **block_shapes("text/resblocks_1", 32),
    **block_shapes("visual/resblocks_0", 64),
    **block_shapes("visual/resblocks_1", 64),
    "text/resblocks_0/mlp/c_fc/bias": (128,),
    "text/resblocks_0/mlp/c_fc/kernel": (32, 128),
    "text/resblocks_0/mlp/c_proj/bias": (32,),
    "text/resblocks_0/mlp/c_proj/kernel": (128, 32),
    "visual/resblocks_0/mlp/c_fc/bias": (256,),
    "visual/resblocks_0/mlp/c_fc/kernel": (64, 256),
    "visual/resblocks_0/mlp/c_proj/bias": (64,),
    "visual/resblocks_0/mlp/c_proj/kernel": (256, 64),
}
DENSE_SHAPES = SHARED | {
    "text/resblocks_1/mlp/c_fc/bias": (128,),
    "text/resblocks_1/mlp/c_fc/kernel": (32, 128),
    "text/resblocks_1/mlp/c_proj/bias": (32,),
    "text/resblocks_1/mlp/c_proj/kernel": (128, 32),
    "visual/resblocks_1/mlp/c_fc/bias": (256,),
    "visual/resblocks_1/mlp/c_fc/kernel": (64, 256),
    "visual/resblocks_1/mlp/c_proj/bias": (64,),
    "visual/resblocks_1/mlp/c_proj/kernel": (256, 64),
}
MOE_SHAPES = SHARED | {
    "text/resblocks_1/moe/c_fc/bias": (4, 128),
    "text/resblocks_1/moe/c_fc/kernel": (4, 32, 128),
    "text/resblocks_1/moe/c_proj/bias": (4, 32),
    "text/resblocks_1/moe/c_proj/kernel": (4, 128, 32),
    "text/resblocks_1/moe/router/kernel": (32, 4),
    "visual/resblocks_1/moe/c_fc/bias": (4, 256),
    "visual/resblocks_1/moe/c_fc/kernel": (4, 64, 256),
    "visual/resblocks_1/moe/c_proj/bias": (4, 64),
    "visual/resblocks_1/moe/c_proj/kernel": (4, 256, 64),
    "visual/resblocks_1/moe/router/kernel": (64, 4),
}


@pytest.mark.parametrize(("architecture", "shapes"), [(DENSE, DENSE_SHAPES), (MOE, MOE_SHAPES)], ids=CONFIGS)
def test_param_tree(architecture, shapes):
    leaves = trees.flatten(abstract_params(architecture))
    assert {name: leaf.shape for name, leaf in leaves.items()} == shapes
    assert all(leaf.dtype == jnp.float32 for leaf in leaves.values())


# OpenAI's checkpoints have so many; 336 pixels are 24 * 24 - 16 * 16 = 320 more positions of width 1024.
PARAMETERS = {
    "ViT-B/32": 151_277_313,
    "ViT-B/16": 149_620_737,
    "ViT-L/14": 427_616_513,
    "ViT-L/14@336": 427_616_513 + 320 * 1024,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_openais_variants_have_their_number_of_parameters(name):
    assert VARIANTS.keys() == PARAMETERS.keys()
    assert trees.count_parameters(abstract_params(VARIANTS[name])) == PARAMETERS[name]


def test_more_moe_layers_than_blocks_means_every_block():
    clipped = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=7))
    everywhere = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))
    chex.assert_trees_all_equal_shapes(abstract_params(clipped), abstract_params(everywhere))
    assert not any("mlp" in name for name in trees.flatten(abstract_params(everywhere)))


def test_uint8_images_equal_normalised_floats(config, params, inputs, outputs):
    images, _ = inputs
    found = encode("image", config, params, (images / np.float32(255) - MEAN) / STD)
    np.testing.assert_allclose(found, outputs["image_features"], rtol=1e-5, atol=1e-5)


def test_text_features_do_not_depend_on_what_follows_the_end(config, params, inputs, outputs):
    _, tokens = inputs
    other = np.where(text_mask(tokens), tokens, 7)
    assert not np.array_equal(other, tokens)
    found = encode("text", config, params, other)
    np.testing.assert_allclose(found, outputs["text_features"], rtol=1e-5, atol=1e-5)


def test_text_features_do_not_depend_on_the_length_of_the_padding(config, params, inputs, outputs):
    _, tokens = inputs
    found = encode("text", config, params, tokens[1:, :6])  # captions 1 to 3 end at 5 at the latest
    np.testing.assert_allclose(found, outputs["text_features"][1:], rtol=1e-5, atol=1e-5)


def test_text_features_depend_on_every_token_before_the_end(config, params, inputs, outputs):
    """Row i is caption 0, which ends at 9, with another token at position i."""
    _, tokens = inputs
    changed = np.repeat(tokens[:1], 9, axis=0)
    np.fill_diagonal(changed, 47)  # the captions' tokens are below 47 or start and end
    difference = encode("text", config, params, changed) - outputs["text_features"][0]
    assert np.all(np.max(np.abs(difference), axis=1) > 1e-4)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_features_of_an_input_do_not_depend_on_its_batch(config, params, inputs, outputs, tower):
    alone = encode(tower, config, params, inputs[tower == "text"][2:3])
    np.testing.assert_allclose(alone, outputs[f"{tower}_features"][2:3], rtol=1e-5, atol=1e-5)


def test_text_mask_by_hand():
    tokens = jnp.array([[48, 5, 49, 0], [48, 49, 0, 0], [48, 5, 6, 49]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(text_mask(tokens), np.array(expected, bool))


def test_towers_alone_equal_both(config, params, inputs, outputs):
    for tower, array in zip(("image", "text"), inputs, strict=True):
        features, aux = jitted(config, ComputeConfig(), f"encode_{tower}")(params, array)
        np.testing.assert_allclose(features, outputs[f"{tower}_features"], rtol=1e-5, atol=1e-5)
        assert aux.keys() == outputs[f"{tower}_aux"].keys()


def test_aux_is_of_the_moe_blocks_alone(config, outputs):
    for tower, length in (("image", 5), ("text", 10)):
        aux = outputs[f"{tower}_aux"]
        if config.moe is None:
            assert aux == {}
        else:
            assert aux["router_logits"].shape == (BATCH, 1, length, 4)
            np.testing.assert_array_equal(aux["dropped_slots"], np.zeros((BATCH, 1)))


@pytest.mark.parametrize("remat", grid("dots", rest=["full"]))
@pytest.mark.parametrize(
    ("dispatch", "grouped_mlp", "chunk_rows"),
    grid(("ragged", "blocks", 3), rest=[("ragged", "fixed_blocks", 0), ("dense", "blocks", 0)]),
)
def test_recomputed_blocks_give_the_same_values_and_gradients(
    inputs, dispatch, grouped_mlp, remat, chunk_rows
):
    """Of a dense and a MoE block, with expert dropout."""
    params = random_params(MOE)

    def value_and_gradient(remat, chunk_rows):
        compute = ComputeConfig(
            remat=remat,
            dispatch=dispatch,
            grouped_mlp=grouped_mlp,
            mlp_chunk_rows=chunk_rows,
            expert_dropout_rate=0.25,
        )

        def value(text_params):
            variables = {"params": params | {"text": text_params}}
            rngs = {"dropout": jax.random.key(0)}
            features, _ = Clip(MOE, compute).apply(
                variables, inputs[1], False, method="encode_text", rngs=rngs
            )
            return jnp.sum(jnp.sin(features))

        return jax.jit(jax.value_and_grad(value))(params["text"])

    chex.assert_trees_all_close(
        value_and_gradient(remat, chunk_rows), value_and_gradient("none", 0), rtol=1e-4, atol=1e-5
    )


@exhaustive
@pytest.mark.parametrize("rules", [TRAIN_FFN, TRAIN_ROUTERS], ids=["ffn", "routers"])
def test_gradients_do_not_depend_on_what_else_trains(inputs, rules):
    """Of three blocks, which are traced once though the first has no gradient to pass on and the last
    computes less."""
    text = dataclasses.replace(DENSE.text, num_layers=3)
    moe = None if rules is TRAIN_FFN else MoeConfig(4, 2)
    config = dataclasses.replace(DENSE, text=text, moe=moe)
    params = random_params(config)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(compute, trainable, frozen):
        def value(trainable):
            variables = {"params": trees.merge(trainable, frozen)}
            features, _ = Clip(config, compute).apply(variables, inputs[1], method="encode_text")
            return jnp.sum(jnp.sin(features))

        return jax.grad(value)(trainable)

    every, _ = trees.partition(gradient(ComputeConfig(), params, {}), rules)
    for remat in ("none", "dots"):
        found = gradient(ComputeConfig(remat=remat), *trees.partition(params, rules))
        chex.assert_trees_all_close(found, every, rtol=1e-4, atol=1e-5)


@exhaustive
def test_calls_that_are_not_jitted_share_their_blocks(config, params, inputs, monkeypatch):
    """The second compiles nothing."""
    traced, attend = [], transformer.xla_attention
    monkeypatch.setattr(transformer, "xla_attention", lambda *a, **k: traced.append(1) or attend(*a, **k))
    model = Clip(dataclasses.replace(config, layer_norm_eps=2e-5))  # which no other test has traced
    model.apply({"params": params}, *inputs)
    of_the_first = len(traced)
    model.apply({"params": params}, *inputs)
    assert len(traced) == of_the_first > 0


class Blocks(nn.Module):
    """MoE blocks of one head, every position pooled."""

    num_layers: int
    compute: ComputeConfig

    @nn.compact
    def __call__(self, x, deterministic):
        return apply_blocks(
            x,
            jnp.arange(x.shape[1])[None],
            num_layers=self.num_layers,
            num_heads=1,
            mlp_width=64,
            activation="gelu",
            layer_norm_eps=1e-5,
            causal=False,
            moe=MoeConfig(2, 2),
            compute=self.compute,
            deterministic=deterministic,
        )[0]


@exhaustive
@pytest.mark.parametrize("remat", ["dots", "none"])
def test_blocks_that_are_alike_drop_out_differently(remat):
    """They are traced once. Attention adds nothing and experts very little: two blocks add the same, but for
    what is dropped out."""
    compute, key = ComputeConfig(remat=remat, expert_dropout_rate=0.5), jax.random.key(0)
    x = jnp.broadcast_to(jnp.array([1.0, -1.0] * 4), (1, 3, 8))
    block = Blocks(1, compute).init(key, x, True)["params"]["resblocks_0"]
    block["attn"]["out_proj"] = jax.tree.map(jnp.zeros_like, block["attn"]["out_proj"])
    block["moe"]["c_proj"] = jax.tree.map(lambda leaf: 1e-4 * leaf, block["moe"]["c_proj"])
    params = {"resblocks_0": block, "resblocks_1": block}

    def added(deterministic):
        """By the first block and by the second."""
        once, twice = (
            Blocks(num_layers, compute).apply({"params": params}, x, deterministic, rngs={"dropout": key})
            for num_layers in (1, 2)
        )
        return once - x[0], twice - once

    first, second = added(deterministic=True)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert jnp.abs(first).max() > 1e-5
    first, second = added(deterministic=False)
    assert jnp.abs(first - second).max() > 1e-5


def test_bfloat16_is_close_to_float32_and_gives_float32(config, params, inputs, outputs):
    found = apply(config, params, inputs, dtype="bfloat16")
    for name in ("image_features", "text_features"):
        assert found[name].dtype == jnp.float32
        error = np.linalg.norm(found[name] - outputs[name]) / np.linalg.norm(outputs[name])
        assert 1e-5 < error < 2e-2, name  # not zero either: it was computed in bfloat16


@pytest.mark.parametrize("dispatch", grid("ragged", rest=["dense", "capacity"]))
def test_gradients_in_bfloat16_are_close_to_those_in_float32(config, params, inputs, dispatch):
    """Products of either dtype have programs of their own on CPU."""

    def gradient(dtype):
        compute = ComputeConfig(dtype=dtype, attention="chunked", dispatch=dispatch)

        def value(params):
            outputs = Clip(config, compute).apply({"params": params}, *inputs)
            return sum(jnp.sum(jnp.sin(outputs[name])) for name in ("image_features", "text_features"))

        return jax.jit(jax.grad(value))(params)

    exact, found = (trees.flatten(gradient(dtype)) for dtype in ("float32", "bfloat16"))
    norm = np.linalg.norm([np.linalg.norm(leaf) for leaf in exact.values()])
    for name, leaf in exact.items():
        error = np.linalg.norm(found[name] - leaf)
        assert error < 0.03 * np.linalg.norm(leaf) + 1e-4 * norm, name


def test_activations_by_hand():
    # 1 * sigmoid(1.702) = 1 / (1 + 0.18232) and 1 * Phi(1), the normal distribution's.
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](jnp.array([1.0, 0.0])), [0.84580, 0], atol=1e-5)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.array([1.0, 0.0])), [0.84134, 0], atol=1e-5)


CONFIG_ERRORS = {
    "more selected than there are": (
        lambda: MoeConfig(4, 5),
        "num_selected_experts=5 must lie between 1 and num_experts=4",
    ),
    "none selected": (lambda: MoeConfig(4, 0), "num_selected_experts=0 must lie between"),
    "no MoE layer": (lambda: MoeConfig(4, 2, 0), "num_moe_layers=0 must be a whole number from 1 to"),
    "heads that do not fit": (
        lambda: ClipConfig(text=TextConfig(width=100)),
        "text.width=100 is not a multiple of text.head_width=64",
    ),
    "patches that do not fit": (
        lambda: ClipConfig(vision=VisionConfig(image_size=225)),
        "vision.image_size=225 is not a multiple of vision.patch_size=32",
    ),
    "images that are too large": (
        lambda: ClipConfig(vision=VisionConfig(image_size=1056)),
        "vision.image_size=1056 must be a whole number from 1 to 1,024",
    ),
    "too many patches": (
        lambda: ClipConfig(vision=VisionConfig(image_size=1024, patch_size=8)),
        "vision.patch_size=8 makes more than 4,096 patches of vision.image_size=1024",
    ),
    "captions that are too long": (
        lambda: ClipConfig(text=TextConfig(context_length=4097)),
        "text.context_length=4097 must be a whole number from 1 to 4,096",
    ),
    "unknown activation": (
        lambda: ClipConfig(activation="relu"),
        r"activation='relu': choose one of \['gelu', 'quick_gelu'\]",
    ),
}


@pytest.mark.parametrize(("make", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_configs_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("architecture", CONFIGS.values(), ids=CONFIGS)
def test_configs_survive_json(architecture):
    assert ClipConfig.from_dict(architecture.to_dict()) == architecture


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 3, 16, 16)], ids=["size", "channels first"])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}.*takes \(B, 16, 16, 3\)"):
        jax.eval_shape(
            lambda images: Clip(DENSE).init(jax.random.key(0), images, method="encode_image"),
            jnp.zeros(shape),
        )


def test_captions_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="tokens have length 11; this model takes at most 10"):
        jax.eval_shape(
            lambda tokens: Clip(DENSE).init(jax.random.key(0), tokens, method="encode_text"),
            jnp.zeros((1, 11), jnp.int32),
        )
