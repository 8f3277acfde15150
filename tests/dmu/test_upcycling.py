"""Upcycling: equal experts are the dense model, and expert e is tree e's FFN in every block."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import grid, quick

from clipmoe_jax.core import trees
from clipmoe_jax.dmu.upcycling import extend_experts, reinitialize_experts, stack_experts
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.moe import route
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

E, K = 4, 2
DENSE = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=16, patch_size=8, width=16, num_layers=2, head_width=8),
    text=TextConfig(vocab_size=20, context_length=6, width=16, num_layers=2, head_width=8),
)
KEY = jax.random.key(0)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(config)
    )


def with_other_mlps(params, e):
    """The same tree with every FFN leaf filled with e."""
    leaves = trees.flatten(params)
    return trees.unflatten(
        {name: np.full_like(leaf, e) if "/mlp/" in name else leaf for name, leaf in leaves.items()}
    )


@pytest.fixture(scope="module")
def dense():
    return random_params(DENSE)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 16, 16, 3)).astype(np.float32), rng.integers(1, 20, (3, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def dense_features(dense, inputs):
    return jax.jit(Clip(DENSE).apply)({"params": dense}, *inputs)


UPCYCLED = {
    "dense": (None, ComputeConfig(dispatch="dense")),
    "ragged": (None, ComputeConfig(dispatch="ragged")),
    "capacity": (None, ComputeConfig(dispatch="capacity", capacity_factor=E / K)),
    "the last block alone": (1, ComputeConfig()),
}


@pytest.mark.parametrize(("num_moe_layers", "run"), quick(UPCYCLED, "the last block alone"))
def test_equal_experts_are_the_dense_model(dense, inputs, dense_features, num_moe_layers, run):
    """Whatever the routers say: the gates of a token add up to one."""
    params = stack_experts([dense] * E, KEY, num_moe_layers=num_moe_layers, router_stddev=1.0)
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K, num_moe_layers))
    outputs = jax.jit(Clip(config, run).apply)({"params": params}, *inputs)
    for name in ("image_features", "text_features"):
        np.testing.assert_allclose(outputs[name], dense_features[name], rtol=1e-5, atol=1e-5)
    chosen = np.argsort(-outputs["text_aux"]["router_logits"], axis=-1)[..., :K]
    assert len(np.unique(chosen)) == E  # the tokens do go to all experts


def test_expert_e_is_tree_e_in_every_block_of_twelve():
    """Blocks in the order of their numbers: 10 and 11 stand between 1 and 2 when sorted as words."""
    vision = dataclasses.replace(DENSE.vision, num_layers=12)
    base = random_params(dataclasses.replace(DENSE, vision=vision))
    leaves = trees.flatten(base)
    numbered = [
        trees.unflatten({name: leaf + e if "/mlp/" in name else leaf for name, leaf in leaves.items()})
        for e in range(E)
    ]
    stacked = trees.flatten(stack_experts(numbered, KEY))
    for i in range(12):
        for leaf in ("c_fc/kernel", "c_fc/bias", "c_proj/kernel", "c_proj/bias"):
            experts = stacked[f"visual/resblocks_{i}/moe/{leaf}"]
            for e in range(E):
                np.testing.assert_array_equal(experts[e], leaves[f"visual/resblocks_{i}/mlp/{leaf}"] + e)


def test_two_moe_layers_of_twelve_are_the_last_two_blocks():
    vision = dataclasses.replace(DENSE.vision, num_layers=12)
    base = random_params(dataclasses.replace(DENSE, vision=vision))
    names = trees.flatten(stack_experts([base, base], KEY, num_moe_layers=2)).keys()
    moe = {name.split("/")[1] for name in names if name.startswith("visual") and "/moe/" in name}
    mlp = {name.split("/")[1] for name in names if name.startswith("visual") and "/mlp/" in name}
    assert moe == {"resblocks_10", "resblocks_11"}
    assert mlp == {f"resblocks_{i}" for i in range(10)}


@pytest.mark.parametrize("num_moe_layers", grid(1, 5, rest=[None, 2]))
def test_stacked_tree_has_the_shapes_of_the_moe_model(dense, num_moe_layers):
    params = stack_experts([dense] * E, KEY, num_moe_layers=num_moe_layers)
    expected = abstract_params(dataclasses.replace(DENSE, moe=MoeConfig(E, K, num_moe_layers)))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


def test_dense_blocks_and_shared_leaves_are_those_of_the_base(dense):
    others = [with_other_mlps(dense, e) for e in range(1, E)]
    params = trees.flatten(stack_experts([dense, *others], KEY, num_moe_layers=1))
    for name, leaf in trees.flatten(dense).items():
        if "resblocks_1/mlp" not in name:
            np.testing.assert_array_equal(params[name], leaf, err_msg=name)


def test_routers_of_deviation_0_send_all_tokens_to_the_first_experts(dense):
    params = stack_experts([dense] * E, KEY, router_stddev=0.0)
    for name, leaf in trees.flatten(params).items():
        if "router" in name:
            gates, expert_ids = route(jnp.ones((2, 3, 16)) @ leaf, 2)
            np.testing.assert_array_equal(expert_ids, np.broadcast_to([0, 1], expert_ids.shape))
            np.testing.assert_allclose(gates, 0.5)


def test_routers_are_drawn_by_the_key(dense):
    def routers(key, stddev=0.02):
        leaves = trees.flatten(stack_experts([dense] * E, key, router_stddev=stddev))
        return np.stack([leaf for name, leaf in leaves.items() if "router" in name])

    drawn = routers(KEY, 0.5)
    assert drawn.shape == (4, 16, E)  # 2 towers of 2 blocks, all of width 16
    # 256 numbers: their standard deviation is within 0.5 / sqrt(512) = 0.022 of 0.5, four times that is safe.
    np.testing.assert_allclose(drawn.std(), 0.5, atol=4 * 0.022)
    assert len(np.unique(drawn)) == drawn.size  # no two routers, and no two rows, are the same
    np.testing.assert_array_equal(routers(KEY), routers(KEY))
    assert not np.array_equal(routers(KEY), routers(jax.random.key(1)))


def test_stacking_does_not_change_its_inputs(dense):
    before = jax.tree.map(np.copy, dense)
    stack_experts([dense] * 2, KEY)
    jax.tree.map(np.testing.assert_array_equal, dense, before)


def changed(params, name, value):
    leaves = dict(trees.flatten(params))
    leaves[name] = value
    return trees.unflatten(leaves)


def test_shared_leaf_that_differs_is_named_with_its_largest_difference(dense):
    other = np.copy(dense["text"]["ln_final"]["scale"])
    other[3] += 0.25
    other[5] -= 1.5
    trees_of_params = [dense, dense, changed(dense, "text/ln_final/scale", other)]
    message = r"text/ln_final/scale of tree 2 is not the base's \(largest difference 1.5\)"
    with pytest.raises(ValueError, match=message):
        stack_experts(trees_of_params, KEY)


def test_logit_scale_that_differs_is_named(dense):
    other = changed(dense, "logit_scale", np.float32(dense["logit_scale"] + 2))
    with pytest.raises(ValueError, match=r"logit_scale of tree 1 is not the base's \(largest difference 2\)"):
        stack_experts([dense, other], KEY)


@pytest.mark.parametrize("swap", [False, True], ids=["the base has it", "the base lacks it"])
def test_leaf_that_one_tree_lacks_is_named(dense, swap):
    pair = [dense, changed(dense, "visual/adapter", np.zeros(2))]
    with pytest.raises(ValueError, match="tree 1 and the base .* first that differs is visual/adapter"):
        stack_experts(pair[::-1] if swap else pair, KEY)


def test_leaf_of_another_shape_is_named(dense):
    name = "visual/resblocks_1/mlp/c_fc/bias"
    with pytest.raises(ValueError, match=rf"{name} is \(9,\) in tree 1, \(64,\) in the base"):
        stack_experts([dense, changed(dense, name, np.zeros(9))], KEY)


@pytest.mark.parametrize("expert_layers", ["feed_forward", "attention_and_feed_forward"])
def test_extended_mixture_has_the_old_one_and_the_added_models(dense, expert_layers):
    """In the last block alone; the one before stays the base's."""
    of_experts = ("/mlp/",) if expert_layers == "feed_forward" else ("/mlp/", "/attn/")
    leaves = trees.flatten(dense)
    added = trees.unflatten({n: leaf + any(map(n.__contains__, of_experts)) for n, leaf in leaves.items()})
    options = {"num_moe_layers": 1, "expert_layers": expert_layers}
    old = stack_experts([dense] * E, KEY, **options)
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K, 1, 0.0, expert_layers))
    extended = trees.flatten(extend_experts(old, config, [added, dense], KEY, router_stddev=0.0))
    bigger = dataclasses.replace(DENSE, moe=MoeConfig(E + 2, K, 1, 0.0, expert_layers))
    shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract_params(bigger)).items()}
    assert {name: leaf.shape for name, leaf in extended.items()} == shapes
    for name, leaf in trees.flatten(old).items():
        if name.endswith("router/kernel"):
            np.testing.assert_array_equal(extended[name][:, :E], leaf)
            mean = np.mean(leaf, axis=1, keepdims=True)
            np.testing.assert_allclose(extended[name][:, E:], np.tile(mean, 2), atol=1e-7)
        elif "/moe/" in name:
            np.testing.assert_array_equal(extended[name][:E], leaf)
            np.testing.assert_array_equal(extended[name][E:], [leaf[0] + 1, leaf[0]])
        else:
            np.testing.assert_array_equal(extended[name], leaf)


def test_added_model_that_shares_too_little_is_named(dense):
    old = stack_experts([dense] * E, KEY)
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K))
    other = changed(dense, "visual/resblocks_0/attn/out_proj/bias", np.ones(16, np.float32))
    with pytest.raises(
        ValueError, match="attn/out_proj/bias of tree 1 .* in their feed-forward layers alone"
    ):
        extend_experts(old, config, [other], KEY)


@pytest.mark.parametrize("num_moe_layers", [None, 1])
def test_extracted_expert_is_the_dense_model_it_came_from(dense, num_moe_layers):
    """Bit for bit where every block is MoE; blocks that are not are the base's."""
    leaves, rng = trees.flatten(dense), np.random.default_rng(2)
    models = [dense] + [
        trees.unflatten(
            {
                name: rng.normal(size=leaf.shape).astype(leaf.dtype) if "/mlp/" in name else leaf
                for name, leaf in leaves.items()
            }
        )
        for _ in range(1, E)
    ]
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K, num_moe_layers))
    stacked = stack_experts(models, KEY, num_moe_layers=num_moe_layers)
    for e, model in enumerate(models):
        of_expert, params = expert_as_dense(stacked, config, e)
        found, expected = trees.flatten(params), trees.flatten(model)
        assert of_expert == DENSE and found.keys() == expected.keys()
        for name, leaf in expected.items():
            base = num_moe_layers == 1 and "/resblocks_0/" in name
            wanted = leaves[name] if base else leaf
            assert found[name].dtype == wanted.dtype
            np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def test_expert_out_of_range_is_refused(dense):
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K))
    stacked = stack_experts([dense] * E, KEY)
    for e in (-1, E):
        with pytest.raises(ValueError, match=f"there is no expert {e}: choose one of 0 to 3"):
            expert_as_dense(stacked, config, e)
    with pytest.raises(ValueError, match="expert 1 of a dense model was asked for"):
        expert_as_dense(dense, DENSE, 1)


def test_active_parameters_count_the_selected_experts_alone(dense):
    # An FFN of width 16: 16 * 64 + 64 + 64 * 16 + 16 = 2128, a router 16 * 4 = 64. Two towers of two blocks.
    config = dataclasses.replace(DENSE, moe=MoeConfig(E, K))
    params = stack_experts([dense] * E, KEY)
    shared = trees.count_parameters(dense) - 4 * 2128
    assert trees.count_parameters(params) == shared + 4 * (4 * 2128 + 64)
    assert count_active_parameters(params, config) == shared + 4 * (2 * 2128 + 64)


def test_all_parameters_of_a_dense_model_are_active(dense):
    assert count_active_parameters(dense, DENSE) == sum(
        math.prod(leaf.shape) for leaf in jax.tree.leaves(dense)
    )


# Wide enough for statistics: 64 hidden units of 16 + 1 + 16 weights.
SHARE, HIDDEN = 0.25, 64


@pytest.fixture(scope="module")
def redrawn(dense):
    """(copies of one model, the same with a quarter of the hidden units drawn anew)."""
    shifted = jax.tree.map(lambda leaf: leaf + np.float32(2), dense)  # a mean that is not 0
    copies = stack_experts([shifted] * E, KEY, num_moe_layers=1)
    return trees.flatten(copies), trees.flatten(reinitialize_experts(copies, KEY, share=SHARE))


def units_that_differ(redrawn, block, leaf) -> np.ndarray:
    """(E, F) bool: whether any weight of a hidden unit was drawn."""
    before, after = (np.asarray(leaves[f"{block}/moe/{leaf}"]) for leaves in redrawn)
    changed = before != after
    return {
        "c_fc/kernel": lambda: changed.any(axis=1),
        "c_fc/bias": lambda: changed,
        "c_proj/kernel": lambda: changed.any(axis=2),
    }[leaf]()


BLOCKS = ("visual/resblocks_1", "text/resblocks_1")


@pytest.mark.parametrize("block", BLOCKS)
def test_given_share_of_hidden_units_is_redrawn_in_each_expert(redrawn, block):
    units = units_that_differ(redrawn, block, "c_fc/kernel")
    np.testing.assert_array_equal(units.sum(axis=1), [SHARE * HIDDEN] * E)
    for leaf in ("c_fc/bias", "c_proj/kernel"):  # the same units
        np.testing.assert_array_equal(units_that_differ(redrawn, block, leaf), units)
    for one in range(E):
        for other in range(one):
            assert (units[one] != units[other]).any()


def test_redrawn_unit_has_all_its_weights_redrawn_and_others_none(redrawn):
    before, after = redrawn
    for name in before:
        changed = np.mean(np.asarray(before[name]) != np.asarray(after[name]))
        drawn = "/moe/" in name and name.endswith(("c_fc/kernel", "c_fc/bias", "c_proj/kernel"))
        assert changed == (SHARE if drawn else 0), name


@pytest.mark.parametrize("leaf", ["c_fc/kernel", "c_proj/kernel"])
def test_redrawn_weights_keep_mean_and_deviation(redrawn, leaf):
    before, after = (np.asarray(leaves[f"{BLOCKS[0]}/moe/{leaf}"]) for leaves in redrawn)
    for e in range(E):
        drawn = before[e] != after[e]  # 16 units of 16 weights: 256 numbers
        old, new = before[e][drawn], after[e][drawn]
        # Standard errors: of a mean 0.3 / 16 = 0.019, of a deviation 0.3 / sqrt(512) = 0.013; four times.
        np.testing.assert_allclose(new.mean(), old.mean(), atol=4 * 0.019)
        np.testing.assert_allclose(new.std(), old.std(), atol=4 * 0.013)
        assert len(np.unique(new)) == new.size and abs(np.corrcoef(old, new)[0, 1]) < 4 / 16


def test_redrawn_units_depend_on_the_key_alone(redrawn):
    copies, after = redrawn
    copies = trees.unflatten(copies)
    again, other = (
        trees.flatten(reinitialize_experts(copies, key, share=SHARE)) for key in (KEY, jax.random.key(1))
    )
    name = f"{BLOCKS[1]}/moe/c_fc/kernel"
    np.testing.assert_array_equal(again[name], after[name])
    assert not np.array_equal(other[name], after[name])
