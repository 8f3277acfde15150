"""Linear layers, and two with an activation between, with gradients written for what XLA makes of them.

Letters: B batch, L length, N = B*L tokens, D width, F hidden width of a feed-forward layer.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from clipmoe_jax.core.sharding import devices_in_use

Array = jax.Array

HIDDEN = "hidden"  # the name of what the first layer of a feed-forward layer makes, before the activation


class Linear(nn.Module):
    """A linear layer to `features`, computed in `dtype`. x (B, L, D) -> (B, L, features)."""

    features: int
    stddev: float
    dtype: jnp.dtype

    @nn.compact
    def weights(self, width: int) -> tuple[Array, Array]:
        """kernel (width, features) and bias (features,) in `dtype`."""
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), (width, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)

    def __call__(self, x: Array) -> Array:
        kernel, bias = self.weights(x.shape[-1])
        return _product(x.astype(self.dtype), kernel) + bias


class Mlp(nn.Module):
    """Linear, activation, linear. x (B, L, D) -> (B, L, D).

    chunk_rows: how many of the N rows are pulled back at a time, on one device; 0 is all.
    """

    hidden_dim: int
    activation: Callable[[Array], Array]
    dtype: jnp.dtype
    chunk_rows: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        c_fc = Linear(self.hidden_dim, (2 * width) ** -0.5, self.dtype, name="c_fc")
        c_proj = Linear(width, self.hidden_dim**-0.5, self.dtype, name="c_proj")
        if self.chunk_rows and devices_in_use() == 1:
            weights = *c_fc.weights(width), *c_proj.weights(self.hidden_dim)
            return _feed_forward(self.activation, self.chunk_rows, x.astype(self.dtype), *weights)
        return c_proj(self.activation(checkpoint_name(c_fc(x), HIDDEN)))


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x (B, L, F), kernel (F, D) -> (B, L, D).

    The kernel's gradient is x^T g as it stands. JAX's own is (g^T x)^T, for which XLA transposes the
    gradient of the stream on CPU, and computes the layer norms it comes through anew for each column:
    a quarter of a training step.
    """
    return x @ kernel


def _product_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _product_bwd(kept, g):
    """Of what is frozen no gradient is wanted: it is dead code, and with it what was kept for it."""
    x, kernel = kept
    return contract(g, kernel, g.ndim - 1, 1), contract(_rows(x), _rows(g), 0, 0)


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _feed_forward(
    activation: Callable[[Array], Array],
    chunk_rows: int,
    x: Array,
    fc_kernel: Array,
    fc_bias: Array,
    proj_kernel: Array,
    proj_bias: Array,
) -> Array:
    """What `Mlp` computes; of the hidden layer only what comes before the activation is ever kept.

    Its gradients go through a few rows at a time, from g to dx and into sums over the kernels: activations,
    and gradients as wide as they, stay in the cache. Autodiff on CPU keeps three arrays (N, F) of each block
    and makes two more.
    """
    return _feed_forward_fwd(activation, chunk_rows, x, fc_kernel, fc_bias, proj_kernel, proj_bias)[0]


def _feed_forward_fwd(activation, chunk_rows, x, fc_kernel, fc_bias, proj_kernel, proj_bias):
    h = checkpoint_name(x @ fc_kernel + fc_bias, HIDDEN)
    return activation(h) @ proj_kernel + proj_bias, (x, h, fc_kernel, proj_kernel)


def _feed_forward_bwd(activation, chunk_rows, kept, gradient):
    x, h, fc_kernel, proj_kernel = kept
    arrays = _rows(x), _rows(h), _rows(gradient)
    total_rows = len(arrays[0])
    chunk_rows = min(chunk_rows, total_rows)

    def add(row, num_rows, dx_and_sums):
        """The rows' gradients into dx; what they add to the gradients of kernels and bias into the sums."""
        dx, sums = dx_and_sums
        x, h, g = (lax.dynamic_slice_in_dim(array, row, num_rows) for array in arrays)
        activated, pullback = jax.vjp(activation, h)
        (dh,) = pullback(contract(g, proj_kernel, 1, 1))
        dx = lax.dynamic_update_slice_in_dim(dx, contract(dh, fc_kernel, 1, 1), row, axis=0)
        return dx, jax.tree.map(jnp.add, sums, weight_gradients(x, dh, activated, g))

    shapes = fc_kernel.shape, h.shape[-1:], proj_kernel.shape
    zeros = jnp.zeros_like(arrays[0]), tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    num_chunks, rest = divmod(total_rows, chunk_rows)
    found = lax.fori_loop(0, num_chunks, lambda i, found: add(i * chunk_rows, chunk_rows, found), zeros)
    dx, sums = add(total_rows - rest, rest, found) if rest else found
    dkernel, dbias, dproj_kernel = (total.astype(fc_kernel.dtype) for total in sums)
    return dx.reshape(x.shape), dkernel, dbias, dproj_kernel, arrays[2].sum(axis=0)


_feed_forward.defvjp(_feed_forward_fwd, _feed_forward_bwd)


def _rows(x: Array) -> Array:
    """(B, L, D) -> (N, D)."""
    return x.reshape(-1, x.shape[-1])


def weight_gradients(x: Array, dh: Array, activated: Array, g: Array) -> tuple[Array, Array, Array]:
    """What rows add to the gradients of a feed-forward layer's fc_kernel, fc_bias and proj_kernel.

    x (N, D), dh (N, F) the gradient before the activation, activated (N, F), g (N, D); kernels in float32.
    """
    return contract(x, dh, 0, 0, jnp.float32), dh.sum(axis=0), contract(activated, g, 0, 0, jnp.float32)


def contract(a: Array, b: Array, axis: int, other: int, dtype: jnp.dtype | None = None) -> Array:
    """The product over an axis of a and one of b; dtype: of the sums, None is theirs."""
    return lax.dot_general(a, b, (((axis,), (other,)), ((), ())), preferred_element_type=dtype)
