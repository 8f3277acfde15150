"""Adapters: the model they leave as it was, the one they fold to, and what trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.core import trees
from clipmoe_jax.dmu.recipe import TRAIN_ADAPTERS, TRAIN_NEW_COLUMNS
from clipmoe_jax.train.adapters import Adapters, add_adapters, fold_adapters

KERNELS = ["text/resblocks_0/attn/in_proj/kernel", "visual/resblocks_1/mlp/c_fc/kernel"]
PARAMS = trees.unflatten(
    {
        KERNELS[0]: jnp.arange(12.0).reshape(4, 3),
        KERNELS[1]: jnp.ones((5, 2)),
        "visual/conv1/kernel": jnp.ones((2, 2)),
        "text/ln_final/scale": jnp.ones(4),
    }
)


@pytest.fixture(scope="module")
def adapted():
    return add_adapters(PARAMS, jax.random.key(0), Adapters(rank=2))


def test_adapters_stand_beside_attention_and_feed_forward_kernels(adapted):
    shapes = {name: leaf.shape for name, leaf in trees.flatten(adapted).items() if "lora" in name}
    assert shapes == {
        "text/resblocks_0/attn/in_proj/lora_a": (4, 2),
        "text/resblocks_0/attn/in_proj/lora_b": (2, 3),
        "visual/resblocks_1/mlp/c_fc/lora_a": (5, 2),
        "visual/resblocks_1/mlp/c_fc/lora_b": (2, 2),
    }
    trainable, _ = trees.partition(adapted, TRAIN_ADAPTERS)
    assert set(trees.flatten(trainable)) == set(shapes)


def test_fresh_adapters_change_nothing(adapted):
    jax.tree.map(np.testing.assert_array_equal, fold_adapters(adapted), PARAMS)


def test_params_without_adapters_fold_to_themselves():
    assert fold_adapters(PARAMS) == PARAMS


def test_folded_kernel_is_w_plus_a_b(adapted):
    leaves = trees.flatten(adapted)
    leaves["visual/resblocks_1/mlp/c_fc/lora_b"] = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    folded = trees.flatten(fold_adapters(trees.unflatten(leaves)))
    a = np.asarray(leaves["visual/resblocks_1/mlp/c_fc/lora_a"])
    np.testing.assert_allclose(folded[KERNELS[1]], 1 + a @ [[1, 2], [3, 4]], rtol=1e-6)
    np.testing.assert_array_equal(folded[KERNELS[0]], leaves[KERNELS[0]])
    assert folded.keys() == trees.flatten(PARAMS).keys()


def test_new_columns_of_a_router_train_apart_and_fold_to_its_last():
    kernel = jnp.arange(15.0).reshape(3, 5)
    params = trees.unflatten(
        {"text/resblocks_0/moe/router/kernel": kernel, "text/ln_final/scale": jnp.ones(4)}
    )
    split = add_adapters(params, jax.random.key(0), Adapters(columns=2))
    jax.tree.map(np.testing.assert_array_equal, fold_adapters(split), params)
    trainable, frozen = trees.partition(split, TRAIN_NEW_COLUMNS)
    np.testing.assert_array_equal(*trees.flatten(trainable).values(), kernel[:, 3:])
    np.testing.assert_array_equal(frozen["text"]["resblocks_0"]["moe"]["router"]["kernel"], kernel[:, :3])
    # Frozen routers stay float32 where other frozen matrices do not.
    assert jax.tree.all(
        jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, trees.cast_matrices(frozen, "bfloat16"))
    )
