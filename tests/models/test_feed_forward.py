"""The feed-forward layer: against autodiff of the plain formula, whole, in chunks, gated and with dropout."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import grid

from clipmoe_jax.models.dropout import DROPPED, Dropout
from clipmoe_jax.models.feed_forward import FeedForward, Mlp, Weights, gelu, quick_gelu

B, L, D, F = 2, 13, 8, 12
X, TARGET = jax.random.normal(jax.random.key(0), (2, B, L, D))


def mlp(chunk_rows, activation=quick_gelu, dtype=jnp.float32):
    return Mlp(F, activation, jnp.dtype(dtype), chunk_rows)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(mlp(0).init, jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), shapes)


def plain(params, x, activation):
    h = activation(x @ params["c_fc"]["kernel"] + params["c_fc"]["bias"])
    return h @ params["c_proj"]["kernel"] + params["c_proj"]["bias"]


def test_the_first_values_of_parameters_do_not_depend_on_chunks():
    whole, chunked = (mlp(rows).init(jax.random.key(0), X) for rows in (0, 5))
    chex.assert_trees_all_equal(whole, chunked)


@pytest.mark.parametrize("activation", grid(quick_gelu, rest=[gelu]))
@pytest.mark.parametrize("chunk_rows", grid(0, 5, rest=[1, 13, 25, 26, 100]))
def test_values_and_gradients_equal_autodiff(params, chunk_rows, activation):
    """All rows at once; chunks that divide the 26 rows, that leave some over, that are more than all."""

    def value_and_gradients(run):
        y, pull_back = jax.vjp(run, params, X)
        return y, pull_back(TARGET)

    found = value_and_gradients(lambda params, x: mlp(chunk_rows, activation).apply({"params": params}, x))
    expected = value_and_gradients(lambda params, x: plain(params, x, activation))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-4)


def test_gradient_of_chunks_is_no_sum_of_padded_arrays(params):
    """Of 8,320 rows of 64 values such a sum ended JAX 0.10 on CPUs with a segmentation fault."""
    text = str(jax.make_jaxpr(jax.grad(lambda x: mlp(5).apply({"params": params}, x).sum()))(X))
    assert "concatenate[" in text and " pad[" not in text


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_gated_values_and_gradients_equal_autodiff(params, rate):
    """With dropout the mask is that of the values; nothing but the hidden activations tells it."""
    x, target, gates = X[0], TARGET[0], jax.random.uniform(jax.random.key(1), (L, 1))
    layer = FeedForward(quick_gelu, Dropout(rate, np.array([2654435769, 42], np.uint32)))
    kept = layer.expand(x, Weights.of_params(params)) > DROPPED / 2
    assert kept.all() if rate == 0 else 0.5 < kept.mean() < 1

    def run(params, x, gates):
        return layer(x, Weights.of_params(params), gates)

    def expected(params, x, gates):
        def activation(h):
            return jnp.where(kept, quick_gelu(h) / (1 - rate), 0) * gates

        return plain(params, x, activation)

    y, pull_back = jax.vjp(run, params, x, gates)
    expected_y, expected_pull_back = jax.vjp(expected, params, x, gates)
    chex.assert_trees_all_close(
        (y, pull_back(target)), (expected_y, expected_pull_back(target)), rtol=1e-5, atol=1e-5
    )


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
    """Each body: two products forward, two for the input's gradient, two more where the kernels train."""

    def num_products(argnums):
        def value(params, x):
            return jnp.sum(jnp.sin(mlp(chunk_rows).apply({"params": params}, x)))

        return jax.jit(jax.grad(value, argnums)).lower(params, X).compile().as_text().count(" dot(")

    assert num_products(1) == 4 * bodies
    assert num_products((0, 1)) == 6 * bodies
