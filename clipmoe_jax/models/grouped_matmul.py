"""Products of consecutive groups of rows with a matrix each.

Letters: R rows sorted by group, E groups (experts), D and F widths.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Rows of one product in the blocked CPU kernel: wide blocks while a group lasts, narrow ones for its end.
# Wide blocks alone leave the last one half empty; narrow ones alone pack the kernel anew too often
# (benchmarks/moe_block.py).
WIDE_BLOCK, NARROW_BLOCK = 256, 64


@jax.custom_vjp
def blocked_matmul(x: Array, kernels: Array, biases: Array | None, group_sizes: Array) -> Array:
    """Multiplies consecutive groups of rows by a matrix each and adds its bias, in blocks of rows.

    x (R, D), kernels (E, D, F), biases (E, F) or None, group_sizes (E,) int32 -> (R, F) in x's dtype, where
    the groups leave at least NARROW_BLOCK rows of x over; what comes out for those is undefined but finite.
    """
    return _multiply_blocks(x, kernels, group_sizes, biases, contract_axis=0)


def _blocked_matmul_fwd(x, kernels, biases, group_sizes):
    return blocked_matmul(x, kernels, biases, group_sizes), (x, kernels, biases, group_sizes)


def _blocked_matmul_bwd(residuals, g):
    # Each gradient by itself: where the experts are frozen the last two are dead code and XLA drops them.
    x, kernels, biases, group_sizes = residuals
    dx = _multiply_blocks(g, kernels, group_sizes, contract_axis=1)
    dkernels = _kernel_gradient(x, g, group_sizes).astype(kernels.dtype)
    if biases is None:
        return dx, dkernels, None, None
    in_group = jax.nn.one_hot(_expert_of_rows(group_sizes, x.shape[0]), len(biases), dtype=g.dtype)
    return dx, dkernels, jnp.einsum("re,rf->ef", in_group, g).astype(biases.dtype), None


blocked_matmul.defvjp(_blocked_matmul_fwd, _blocked_matmul_bwd)


def _expert_of_rows(group_sizes: Array, num_rows: int) -> Array:
    """(E,) -> (R,) int32; E for the rows that no group has."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def ragged_dot(x: Array, kernels: Array, biases: Array | None, group_sizes: Array) -> Array:
    """What `blocked_matmul` computes, by `lax.ragged_dot`."""
    y = lax.ragged_dot(x, kernels, group_sizes)
    if biases is None:
        return y
    # A row of no expert gets zero, and its gradient goes nowhere.
    return y + biases.at[_expert_of_rows(group_sizes, x.shape[0])].get(mode="fill", fill_value=0)


# `lax.ragged_dot` is a kernel of its own on TPU. On CPU and GPU XLA expands it to a product of every row with
# every kernel, E times the work: blocks are for CPU, and on GPU dense dispatch does less.
GROUPED_MATMULS = {"blocks": blocked_matmul, "ragged_dot": ragged_dot}


def _multiply_blocks(
    x: Array, kernels: Array, group_sizes: Array, biases: Array | None = None, *, contract_axis: int
) -> Array:
    """Only as many products as the groups need. x (R, D or F), kernels (E, D, F), one axis contracted.

    The last block of a group runs over into the next group's rows, and the next group, written later,
    overwrites what it left there; so blocks need neither masks nor padding between groups.
    """

    def multiply_group(e, out):
        kernel = lax.dynamic_index_in_dim(kernels, e, keepdims=False)

        def multiply_block(row, num_rows, out):
            rows = lax.dynamic_slice_in_dim(x, row, num_rows)
            y = lax.dot_general(rows, kernel, (((1,), (contract_axis,)), ((), ())))
            y = y if biases is None else y + biases[e]
            return lax.dynamic_update_slice_in_dim(out, y, row, axis=0)

        return _for_each_block(x.shape[0], group_sizes, e, multiply_block, out)

    out = jnp.zeros((x.shape[0], kernels.shape[2 - contract_axis]), x.dtype)
    return lax.fori_loop(0, kernels.shape[0], multiply_group, out)


def _kernel_gradient(x: Array, g: Array, group_sizes: Array) -> Array:
    """Sum of outer products over each group. x (R, D), g (R, F) -> (E, D, F) float32."""
    ends = jnp.cumsum(group_sizes)

    def group_gradient(e):
        def add_block(row, num_rows, total):
            mine = (row + jnp.arange(num_rows) < ends[e])[:, None]
            xs = jnp.where(mine, lax.dynamic_slice_in_dim(x, row, num_rows), 0)
            gs = lax.dynamic_slice_in_dim(g, row, num_rows)
            return total + lax.dot_general(
                xs, gs, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        zeros = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
        return _for_each_block(x.shape[0], group_sizes, e, add_block, zeros)

    return lax.map(group_gradient, jnp.arange(group_sizes.shape[0]))


def _for_each_block(
    num_rows: int, group_sizes: Array, e: Array, step: Callable[..., Array], carry: Array
) -> Array:
    """Folds `step(first_row, block_rows, carry)` over the blocks that cover group e of `num_rows` rows."""
    wide = min(WIDE_BLOCK, num_rows)
    start, size = jnp.cumsum(group_sizes)[e] - group_sizes[e], group_sizes[e]
    num_wide = size // wide
    carry = lax.fori_loop(0, num_wide, lambda i, c: step(start + i * wide, wide, c), carry)
    start, rest = start + num_wide * wide, size - num_wide * wide
    num_narrow = (rest + NARROW_BLOCK - 1) // NARROW_BLOCK
    return lax.fori_loop(0, num_narrow, lambda i, c: step(start + i * NARROW_BLOCK, NARROW_BLOCK, c), carry)
