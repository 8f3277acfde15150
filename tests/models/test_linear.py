"""Feed-forward layers pulled back a few rows at a time, against autodiff of the layer as a whole."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.models.linear import Mlp
from clipmoe_jax.models.transformer import gelu, quick_gelu

B, L, D, F = 2, 13, 8, 12
X, TARGET = jax.random.normal(jax.random.key(0), (2, B, L, D))


def mlp(chunk_rows, activation=quick_gelu, dtype=jnp.float32):
    return Mlp(F, activation, jnp.dtype(dtype), chunk_rows)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(mlp(0).init, jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes)


def test_the_first_values_of_parameters_do_not_depend_on_chunks():
    whole, chunked = (mlp(rows).init(jax.random.key(0), X) for rows in (0, 5))
    chex.assert_trees_all_equal(whole, chunked)


@pytest.mark.parametrize("activation", [quick_gelu, gelu])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 25, 26, 100])
def test_values_and_gradients(params, chunk_rows, activation):
    """Chunks that divide the 26 rows, that leave some over, that are more than all."""

    def value_and_gradients(chunk_rows):
        def value(params, x):
            y = mlp(chunk_rows, activation).apply({"params": params}, x)
            return jnp.sum(y * TARGET), y

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(params, X)

    chex.assert_trees_all_close(value_and_gradients(chunk_rows), value_and_gradients(0), rtol=1e-5, atol=1e-4)


def test_kernels_in_bfloat16_add_up_in_float32(params):
    """2,048 rows in chunks of 8: sums in bfloat16 would stop growing."""
    x = jnp.ones((1, 2048, D), jnp.bfloat16)

    def gradient(chunk_rows, dtype):
        layer = mlp(chunk_rows, lambda h: h, dtype)
        return jax.grad(lambda p: layer.apply({"params": p}, x).astype(jnp.float32).sum())(params)

    found, expected = gradient(8, jnp.bfloat16), gradient(0, jnp.float32)
    for layer in ("c_fc", "c_proj"):
        wanted = expected[layer]["kernel"]
        np.testing.assert_allclose(
            found[layer]["kernel"], wanted, rtol=0.03, atol=0.02 * np.abs(wanted).max()
        )


@pytest.mark.parametrize(("chunk_rows", "bodies"), [(0, 1), (8, 2)], ids=["whole", "chunks and a rest"])
def test_frozen_kernels_cost_no_gradient(params, chunk_rows, bodies):
    """Two products forward, two for the input's gradient, and two more where the kernels train."""

    def num_products(argnums):
        def value(params, x):
            return jnp.sum(jnp.sin(mlp(chunk_rows).apply({"params": params}, x)))

        return jax.jit(jax.grad(value, argnums)).lower(params, X).compile().as_text().count(" dot(")

    assert num_products(1) == 2 + 2 * bodies
    assert num_products((0, 1)) == 2 + 4 * bodies
