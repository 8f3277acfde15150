"""Experts of whole blocks, attention and feed-forward layers: values by hand, one model from several."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from grids import grid

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.dmu.upcycling import stack_experts
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.models.feed_forward import quick_gelu
from clipmoe_jax.models.moe import MoeBlock
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

E, K, D, F = 4, 2, 8, 12
LAYERS = "attention_and_feed_forward"
DENSE = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=16, num_layers=2, head_width=8),
    text=TextConfig(vocab_size=40, context_length=10, width=16, num_layers=2, head_width=8),
)
LIKE_MOE = {"sequence_share": 2.0, "expert_layers": LAYERS}
MOE = dataclasses.replace(DENSE, moe=MoeConfig(E, K, **LIKE_MOE))
EXACT = {
    "dense": {"dispatch": "dense"},
    "ragged": {"dispatch": "ragged"},
    "ragged by fixed blocks": {"dispatch": "ragged", "grouped_mlp": "fixed_blocks"},
    "ragged by ragged_dot": {"dispatch": "ragged", "grouped_mlp": "ragged_dot"},
    "ragged by tiles": {"dispatch": "ragged", "grouped_mlp": "tiles"},
    "capacity": {"dispatch": "capacity", "capacity_factor": E / K},  # which never drops
}
REST = ["dense", *(name for name in EXACT if name.startswith("ragged by"))]
NAMES = grid("ragged", "capacity", rest=REST)
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 16, 16, 3)).astype("f4")
TOKENS = np.sort(RNG.integers(1, 40, (8, 10)), axis=1).astype("i4")


@pytest.fixture(autouse=True)
def written_out_tiles(monkeypatch):
    tiles.write_out(monkeypatch)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype("f4"), abstract_params(config))


def of_another_stage(params, seed):
    """Attention and feed-forward layers of its own, everything else the base's."""
    rng = np.random.default_rng(seed)
    leaves = dict(trees.flatten(params))
    for name, leaf in leaves.items():
        if "/mlp/" in name or "/attn/" in name:
            leaves[name] = leaf + rng.normal(0, 0.2, leaf.shape).astype("f4")
    return trees.unflatten(leaves)


def features(config, params, **compute):
    outputs = jax.jit(Clip(config, ComputeConfig(**compute)).apply)({"params": params}, IMAGES, TOKENS)
    return outputs["image_features"], outputs["text_features"]


@pytest.fixture(scope="module")
def stages():
    base = random_params(DENSE)
    return [base, *(of_another_stage(base, seed) for seed in range(1, E))]


@pytest.mark.parametrize("name", NAMES)
def test_equal_experts_are_the_dense_model(stages, name):
    """Whatever the routers say."""
    params = stack_experts([stages[0]] * E, jax.random.key(0), **LIKE_MOE, router_stddev=1.0)
    found = features(MOE, params, **EXACT[name])
    chex.assert_trees_all_close(found, features(DENSE, stages[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("e", grid(2, rest=[0, 1, 3]))
def test_tokens_that_choose_one_expert_alone_have_the_features_of_its_model(stages, e):
    """Routers of zeros choose the first expert."""
    ordered = [stages[e], *(stages[f] for f in range(E) if f != e)]
    params = stack_experts(ordered, jax.random.key(0), **LIKE_MOE, router_stddev=0.0)
    one = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, num_selected_experts=1))
    found = features(one, params)
    chex.assert_trees_all_close(found, features(DENSE, stages[e]), rtol=1e-4, atol=1e-4)


def test_stacked_tree_has_the_shapes_of_the_model_and_gives_each_expert_back(stages):
    params = stack_experts(stages, jax.random.key(0), **LIKE_MOE)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(MOE))
    for e, stage in enumerate(stages):
        config, of_expert = expert_as_dense(params, MOE, e)
        assert config == DENSE
        jax.tree.map(np.testing.assert_array_equal, of_expert, stage)


def test_blocks_before_the_last_stay_those_of_the_base(stages):
    params = stack_experts(stages, jax.random.key(0), num_moe_layers=1, **LIKE_MOE)
    last = dataclasses.replace(MOE, moe=dataclasses.replace(MOE.moe, num_moe_layers=1))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, abstract_params(last))
    first = "visual/resblocks_0/attn/in_proj/kernel"
    np.testing.assert_array_equal(trees.flatten(params)[first], trees.flatten(stages[0])[first])


def test_other_leaves_that_differ_are_refused(stages):
    leaves = dict(trees.flatten(stages[1]))
    leaves["text/resblocks_1/ln_2/bias"] = leaves["text/resblocks_1/ln_2/bias"] + 1
    stack = [stages[0], trees.unflatten(leaves)]
    with pytest.raises(ValueError, match="text/resblocks_1/ln_2/bias of tree 1.*attention and feed-forward"):
        stack_experts(stack, jax.random.key(0), **LIKE_MOE)
    with pytest.raises(ValueError, match="/attn/.* of tree 1.*may differ in their feed-forward layers alone"):
        stack_experts(stages, jax.random.key(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", grid("in_proj", rest=["out_proj"]))
def test_a_projection_is_the_sum_of_its_experts_by_gate(name, layer):
    x = jax.random.normal(jax.random.key(1), (2, 5, D))
    block = MoeBlock(E, K, F, quick_gelu, **EXACT[name])
    logits = jax.random.normal(jax.random.key(2), (2, 5, E))
    params = block.init(jax.random.key(0), layer, x, logits, method="project")["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    y, dropped = block.apply({"params": params}, layer, x, logits, method="project")
    kernel, bias = (np.asarray(params[layer][leaf], np.float64) for leaf in ("kernel", "bias"))
    expected = np.zeros(y.shape)
    for b, position in np.ndindex(2, 5):
        probabilities = np.exp(np.asarray(logits[b, position], np.float64))
        chosen = np.argsort(-probabilities)[:K]
        for e in chosen:
            of_expert = np.asarray(x[b, position], np.float64) @ kernel[e] + bias[e]
            expected[b, position] += probabilities[e] / probabilities[chosen].sum() * of_expert
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dropped, [0, 0])


def loss_of(config, **compute):
    model = Clip(config, ComputeConfig(**compute))

    def loss(params, images, tokens):
        outputs = model.apply({"params": params}, images, tokens)
        return jnp.mean(jnp.sin(outputs["image_features"] + outputs["text_features"]).sum(-1))

    return loss


@pytest.fixture(scope="module")
def params(stages):
    return stack_experts(stages, jax.random.key(0), **LIKE_MOE, router_stddev=0.5)


@pytest.fixture(scope="module")
def expected(params):
    return jax.jit(jax.value_and_grad(loss_of(MOE, dispatch="dense")))(params, IMAGES, TOKENS)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "dense"])
def test_values_and_gradients_equal_the_dense_dispatch(params, expected, name):
    """Of every leaf, with respect to both towers."""
    found = jax.jit(jax.value_and_grad(loss_of(MOE, **EXACT[name])))(params, IMAGES, TOKENS)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("sizes", grid(((2, 1, 4),), rest=[((8, 1, 1),), ((2, 2, 2),)]))
@pytest.mark.parametrize("name", grid("ragged", rest=["dense", "capacity", "ragged by ragged_dot"]))
def test_sharded_equals_one_device(params, expected, name, sizes):
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.param_shardings(mesh, params))
        inputs = jax.device_put((IMAGES, TOKENS), sharding.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(loss_of(MOE, **EXACT[name])))(placed, *inputs)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=2e-5)


def test_straight_through_keeps_values_and_reaches_every_router(params, expected):
    loss = loss_of(MOE, router_gradient="all")
    value, gradients = jax.jit(jax.value_and_grad(loss))(params, IMAGES, TOKENS)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for name, leaf in trees.flatten(gradients).items():
        if "router" in name:
            assert np.abs(leaf).sum(axis=0).min() > 0, name


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="expert_layers='attention': choose one of feed_forward, "):
        MoeConfig(expert_layers="attention")
