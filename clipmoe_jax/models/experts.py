"""Experts, each on the rows that are routed to it: grouped feed-forward layers.

Letters: R rows sorted by expert, E experts, D width, F expert hidden width.

Contract of a grouped feed-forward layer `(rows, gates, group_sizes, experts, hidden) -> y`:
  rows (R, D); gates (R, 1) in rows' dtype; group_sizes (E,) int32, of consecutive rows for one expert each,
  which leave at least NARROW_BLOCK rows over. y (R, D) is gate * expert(row) without proj_bias; what comes
  out for the rows left over is undefined but finite, and so is their gradient, zero where that of y is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from clipmoe_jax.models.linear import HIDDEN, contract, weight_gradients

Array = jax.Array

# Rows of one product in the blocked CPU kernel: wide blocks while a group lasts, narrow ones for its end.
# Wide blocks alone leave the last one half empty; narrow ones alone pack the kernel anew too often
# (benchmarks/moe_block.py).
WIDE_BLOCK, NARROW_BLOCK = 256, 64


class Experts(NamedTuple):
    """Stacked feed-forward layers."""

    fc_kernel: Array  # (E, D, F)
    fc_bias: Array  # (E, F)
    proj_kernel: Array  # (E, F, D)
    proj_bias: Array  # (E, D)


class Hidden(NamedTuple):
    """What happens between the two layers of an expert: activation, dropout, and the gate.

    dropout_key: None where nothing is dropped out.
    """

    activation: Callable[[Array], Array]
    dropout_key: Array | None = None
    dropout_rate: float = 0.0

    def __call__(self, h: Array, gates: Array) -> Array:
        """h (N, ..., F), gates (N, ..., 1) -> as h."""
        return _gated(self._replace(dropout_key=None), h, self.draw(h.shape), gates)

    def draw(self, shape: tuple[int, ...], block: Array | None = None) -> Array | None:
        """Which units are kept, bool; each block has its own."""
        if self.dropout_key is None:
            return None
        key = self.dropout_key if block is None else jax.random.fold_in(self.dropout_key, block)
        return jax.random.bernoulli(key, 1 - self.dropout_rate, shape)

    def gate(self, h: Array, kept: Array | None, gates: Array) -> Array:
        """What a call computes, of units that are known to be kept; None is all."""
        h = self.activation(h)
        if kept is not None:
            h = jnp.where(kept, h / (1 - self.dropout_rate), 0)
        return h * gates


_gated = jax.custom_vjp(Hidden.gate, nondiff_argnums=(0,))


def _gated_fwd(hidden, *arguments):
    return hidden.gate(*arguments), arguments


def _gated_bwd(hidden, arguments, g):
    """From the arguments alone: activations are computed again."""
    h, kept, gates = arguments
    dh, dgates = jax.vjp(lambda h, gates: hidden.gate(h, kept, gates), h, gates)[1](g)
    return dh, None, dgates


_gated.defvjp(_gated_fwd, _gated_bwd)


def ragged_dot(rows: Array, gates: Array, group_sizes: Array, experts: Experts, hidden: Hidden) -> Array:
    """By two `lax.ragged_dot`."""
    h = lax.ragged_dot(rows, experts.fc_kernel, group_sizes)
    # A row of no expert gets zero, and its gradient goes nowhere.
    expert_of_row = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows)), side="right")
    h = h + experts.fc_bias.at[expert_of_row].get(mode="fill", fill_value=0)
    return lax.ragged_dot(hidden(checkpoint_name(h, HIDDEN), gates), experts.proj_kernel, group_sizes)


def blocks(rows: Array, gates: Array, group_sizes: Array, experts: Experts, hidden: Hidden) -> Array:
    """Both layers of an expert on one block of rows after the other, on CPU.

    Only as many products as the groups need, and nothing as wide as F leaves the cache but, where there is a
    gradient to come, h before the activation and a byte for each mask. The gradient goes through the same
    blocks, from dy to d(rows) and into sums over the kernels.

    The last block of a group runs over into the next group's rows, and the next group, written later,
    overwrites what it left there; so groups need neither masks nor padding between them. Only the sums leave
    out what is not the group's.
    """
    key, hidden = hidden.dropout_key, hidden._replace(dropout_key=None)
    return _blocks(hidden, key, rows, gates, group_sizes, *experts[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(hidden, key, rows, gates, group_sizes, *weights):
    """`weights`: the first three of Experts."""
    return _forward(hidden, key, rows, gates, group_sizes, weights, keep=False)[0]


def _blocks_fwd(hidden, key, rows, gates, group_sizes, *weights):
    y, *kept = _forward(hidden, key, rows, gates, group_sizes, weights, keep=True)
    return y, (rows, gates, group_sizes, weights, checkpoint_name(kept, HIDDEN))


def _forward(hidden, key, rows, gates, group_sizes, weights, keep: bool):
    """y, and if asked for h and the mask, else None."""
    hidden, shape = hidden._replace(dropout_key=key), (len(rows), weights[0].shape[2])
    h_zeros = jnp.zeros(shape, rows.dtype) if keep else None
    mask_zeros = jnp.zeros(shape, bool) if keep and key is not None else None

    def group(e, outputs):
        fc_kernel, fc_bias, proj_kernel = (lax.dynamic_index_in_dim(w, e, keepdims=False) for w in weights)

        def block(row, num_rows, outputs):
            x, gate = _slice((rows, gates), row, num_rows)
            h = x @ fc_kernel + fc_bias
            mask = hidden.draw(h.shape, row)
            y = hidden.gate(h, mask, gate) @ proj_kernel
            return _update(outputs, (y, h, mask) if keep else (y, None, None), row)

        return _for_each_block(len(rows), group_sizes, e, block, outputs)

    return lax.fori_loop(0, len(group_sizes), group, (jnp.zeros_like(rows), h_zeros, mask_zeros))


def _blocks_bwd(hidden, residuals, dy):
    # Where the experts are frozen their sums are dead code and XLA drops them.
    rows, gates, group_sizes, weights, kept = residuals
    arrays, ends = (rows, gates, dy, *kept), jnp.cumsum(group_sizes)

    def group(gradients, e):
        fc_kernel, fc_bias, proj_kernel = (lax.dynamic_index_in_dim(w, e, keepdims=False) for w in weights)

        def block(row, num_rows, gradients_and_sums):
            gradients, sums = gradients_and_sums
            x, gate, g, h, mask = _slice(arrays, row, num_rows)
            activated, pullback = jax.vjp(lambda h, gate: hidden.gate(h, mask, gate), h, gate)
            dh, dgate = pullback(contract(g, proj_kernel, 1, 1))
            gradients = _update(gradients, (contract(dh, fc_kernel, 1, 1), dgate), row)
            mine = (row + jnp.arange(num_rows) < ends[e])[:, None]
            dh, g = jnp.where(mine, dh, 0), jnp.where(mine, g, 0)
            return gradients, jax.tree.map(jnp.add, sums, weight_gradients(x, dh, activated, g))

        zeros = tuple(jnp.zeros(w.shape[1:], jnp.float32) for w in weights)
        return _for_each_block(len(rows), group_sizes, e, block, (gradients, zeros))

    zeros = jnp.zeros_like(rows), jnp.zeros_like(gates)
    (drows, dgates), sums = lax.scan(group, zeros, jnp.arange(len(group_sizes)))
    dweights = (total.astype(w.dtype) for total, w in zip(sums, weights, strict=True))
    return None, drows, dgates, None, *dweights


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _slice(arrays: Any, row: Array, num_rows: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, num_rows), arrays)


def _update(arrays: Any, parts: Any, row: Array) -> Any:
    return jax.tree.map(lambda a, part: lax.dynamic_update_slice_in_dim(a, part, row, axis=0), arrays, parts)


def _for_each_block(
    num_rows: int, group_sizes: Array, e: Array, step: Callable[[Array, int, Any], Any], carry: Any
) -> Any:
    """Folds `step(first_row, block_rows, carry)` over the blocks that cover group e of `num_rows` rows."""
    wide = min(WIDE_BLOCK, num_rows)
    start, size = jnp.cumsum(group_sizes)[e] - group_sizes[e], group_sizes[e]
    num_wide = size // wide
    carry = lax.fori_loop(0, num_wide, lambda i, c: step(start + i * wide, wide, c), carry)
    start, rest = start + num_wide * wide, size - num_wide * wide
    num_narrow = (rest + NARROW_BLOCK - 1) // NARROW_BLOCK
    return lax.fori_loop(0, num_narrow, lambda i, c: step(start + i * NARROW_BLOCK, NARROW_BLOCK, c), carry)


# `lax.ragged_dot` is a kernel of its own on TPU. On CPU and GPU XLA expands it to a product of every row with
# every kernel, E times the work: blocks are for CPU, and on GPU dense dispatch does less.
GROUPED_MLPS = {"blocks": blocks, "ragged_dot": ragged_dot}
