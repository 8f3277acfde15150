"""Experts, each on the rows that are routed to it: grouped feed-forward layers.

Letters: R rows sorted by expert, E experts, D width, F expert hidden width.

Contract of a grouped feed-forward layer `(rows, gates, group_sizes, experts, hidden) -> y`:
  rows (R, D); gates (R, 1) float32; group_sizes (E,) int32, of consecutive rows for one expert each,
  which leave the spare rows it asks for (`make_grouped_mlp`) over. y (R, D) is gate * expert(row) without
  proj_bias. For the rows left over y is undefined, NaN perhaps, and so are the gradients of rows and gates;
  what goes in for them, and comes back as the gradient of y, has to be finite.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from clipmoe_jax.models.linear import HIDDEN, contract, weight_gradients

Array = jax.Array

# Rows of one product on CPU: wide blocks while a group lasts, narrow ones for its end. Wide blocks alone
# leave the last one half empty; narrow ones alone pack the kernel anew too often (benchmarks/moe_block.py).
WIDE_BLOCK, NARROW_BLOCK = 256, 64

# Rows of one product on GPU, at most; not measured. Of a fixed number of blocks up to E are too many: small
# ones waste less. Large ones fill a GPU (ViT-L/14's second product has 128 tiles of 128 x 128, an H100 132
# processors) and copy an expert's kernels seldom.
GPU_BLOCK = 2048

# Values of ComputeConfig.grouped_mlp (`make_grouped_mlp`).
GROUPED_MLPS = ("blocks", "fixed_blocks", "ragged_dot", "tokamax")

# Rows that tokamax's kernels for Hopper want a multiple of.
TOKAMAX_ROWS = 128


class Experts(NamedTuple):
    """Stacked feed-forward layers."""

    fc_kernel: Array  # (E, D, F)
    fc_bias: Array  # (E, F)
    proj_kernel: Array  # (E, F, D)
    proj_bias: Array  # (E, D)


class Hidden(NamedTuple):
    """What happens between the two layers of an expert: dropout, activation, and the gate.

    What is dropped out is marked in h, by -inf, so that a gradient needs no mask kept or drawn again. (An h
    that overflows to -inf counts as dropped out; an activation of it tends to 0.)
    dropout_words: (W,) uint32, those of a random key; None will do where dropout_rate is 0.
    """

    activation: Callable[[Array], Array]
    dropout_words: Array | None = None
    dropout_rate: float = 0.0

    def __call__(self, h: Array, gates: Array) -> Array:
        """h (N, ..., F), gates (N, ..., 1) float32 -> as h."""
        return _gated(self._replace(dropout_words=None), h, self.draw(h.shape), gates)

    def draw(self, shape: tuple[int, ...], first_row: Array | int = 0) -> Array | None:
        """Which units are kept of the rows from first_row on, bool (rows, ..., F), or None if all are."""
        if self.dropout_rate == 0:
            return None
        return random_bits(self.dropout_words, shape, first_row) >= jnp.uint32(self.dropout_rate * 2**32)

    def gate(self, marked: Array, gates: Array) -> Array:
        """What a call computes, of h as `mark` returns it.

        The product is float32: a token's gates sum to 1, so that the router learns from the difference of
        their gradients, which nearly equal experts would lose in half precision.
        """
        if self.dropout_rate == 0:
            return (self.activation(marked) * gates).astype(marked.dtype)
        kept = marked != -jnp.inf  # a NaN is kept, to be seen
        h = self.activation(jnp.where(kept, marked, 0)) / (1 - self.dropout_rate)
        return (jnp.where(kept, h, 0) * gates).astype(marked.dtype)


def random_bits(words: Array, shape: tuple[int, ...], first_row: Array | int) -> Array:
    """uint32 of the shape (rows, ...), the same for a row whatever rows are asked for with it.

    MurmurHash3's 32-bit finalizer, once for each word, of a unit's number: a tenth of the operations of
    `jax.random.bits`, so that dropout costs next to nothing (benchmarks/LOG.md).
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bits = jnp.uint32(first_row) * jnp.uint32(strides[0])
    for axis, stride in enumerate(strides):
        bits += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    for word in words:
        bits ^= word
        bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
        bits ^= bits >> 16
    return bits


def mark(h: Array, kept: Array | None) -> Array:
    """h, -inf where it is not kept."""
    return h if kept is None else jnp.where(kept, h, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(hidden: Hidden, h: Array, kept: Array | None, gates: Array) -> Array:
    return hidden.gate(mark(h, kept), gates)


def _gated_fwd(hidden, h, kept, gates):
    marked = checkpoint_name(mark(h, kept), HIDDEN)
    return hidden.gate(marked, gates), (marked, gates)


def _gated_bwd(hidden, residuals, g):
    """From what goes in alone: activations are computed again."""
    dh, dgates = jax.vjp(hidden.gate, *residuals)[1](g)
    return dh, None, dgates


_gated.defvjp(_gated_fwd, _gated_bwd)


def ragged_dot(
    rows: Array,
    gates: Array,
    group_sizes: Array,
    experts: Experts,
    hidden: Hidden,
    *,
    dot: Callable[[Array, Array, Array], Array],
    all_grouped: bool,
) -> Array:
    """By two grouped products. dot: `lax.ragged_dot` or one like it; all_grouped: no rows are left over."""
    h = dot(rows, experts.fc_kernel, group_sizes)
    expert_of_row = _count_until(jnp.cumsum(group_sizes), jnp.arange(len(rows)))
    # A product, which XLA fuses with what follows: a gather would write as many biases as h has values.
    one_hot = jax.nn.one_hot(expert_of_row, len(group_sizes), dtype=h.dtype)
    h = h + jnp.dot(one_hot, experts.fc_bias, precision=lax.Precision.HIGHEST)
    if not all_grouped:  # a kernel may leave them as they were in memory, here and in their gradient
        h = jnp.where((expert_of_row < len(group_sizes))[:, None], h, 0)
    return dot(hidden(h, gates), experts.proj_kernel, group_sizes)


# Steps on blocks that cover all groups in order: `fold(step, carry, sums, R, group_sizes, stacked)` -> carry,
# sums by `step(carry, expert, stacked[expert], first_row, rows_of_block)` -> carry, parts. sums[expert], from
# zero, is the sum of the parts of its blocks.
Step = Callable[[Any, Array, Any, Array, int], tuple[Any, Any]]
Fold = Callable[[Step, Any, Any, int, Array, Any], tuple[Any, Any]]


def blocks(
    rows: Array, gates: Array, group_sizes: Array, experts: Experts, hidden: Hidden, *, fold: Fold
) -> Array:
    """Both layers of an expert on one block of rows after the other.

    Only h before the activation outlives a block, and only where there is a gradient to come. The gradient
    goes through the same blocks, from dy to d(rows) and into sums over the kernels.

    The last block of a group runs over into the next group's rows, and the next group, written later,
    overwrites what it left there; so groups need neither masks nor padding between them. Only the sums leave
    out what is not the group's.

    fold: `_as_needed`, or `_fixed_number` of so many rows.
    """
    words, hidden = hidden.dropout_words, hidden._replace(dropout_words=None)
    return _blocks(hidden, fold, words, rows, gates, group_sizes, *experts[:3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(hidden, fold, words, rows, gates, group_sizes, *stacked):
    """`stacked`: the first three of Experts."""
    return _forward(hidden, fold, words, rows, gates, group_sizes, stacked, keep=False)[0]


def _blocks_fwd(hidden, fold, words, rows, gates, group_sizes, *stacked):
    y, marked = _forward(hidden, fold, words, rows, gates, group_sizes, stacked, keep=True)
    return y, (rows, gates, group_sizes, stacked, checkpoint_name(marked, HIDDEN))


def _forward(hidden, fold, words, rows, gates, group_sizes, stacked, keep: bool):
    """y, and if asked for h with its marks, else None."""
    hidden = hidden._replace(dropout_words=words)

    def block(outputs, expert, weights, row, num_rows):
        fc_kernel, fc_bias, proj_kernel = weights
        x, gate = _slice((rows, gates), row, num_rows)
        h = x @ fc_kernel + fc_bias
        h = mark(h, hidden.draw(h.shape, row))
        y = hidden.gate(h, gate) @ proj_kernel
        return _update(outputs, (y, h if keep else None), row), ()

    # Not zeros: those of all layers depend on nothing, and XLA makes them at once where a step begins.
    marked = lax.empty((len(rows), stacked[0].shape[2]), rows.dtype) if keep else None
    outputs = lax.empty(rows.shape, rows.dtype), marked
    return fold(block, outputs, (), len(rows), group_sizes, stacked)[0]


def _blocks_bwd(hidden, fold, residuals, dy):
    # Where the experts are frozen their sums are dead code and XLA drops them.
    rows, gates, group_sizes, stacked, marked = residuals
    arrays, ends = (rows, gates, dy, marked), jnp.cumsum(group_sizes)

    def block(gradients, expert, weights, row, num_rows):
        fc_kernel, _, proj_kernel = weights
        x, gate, g, h = _slice(arrays, row, num_rows)
        activated, pullback = jax.vjp(hidden.gate, h, gate)
        dh, dgate = pullback(contract(g, proj_kernel, 1, 1))
        gradients = _update(gradients, (contract(dh, fc_kernel, 1, 1), dgate), row)
        of_group = (row + jnp.arange(num_rows) < ends[expert])[:, None]
        dh, g = jnp.where(of_group, dh, 0), jnp.where(of_group, g, 0)
        return gradients, weight_gradients(x, dh, activated, g)

    gradients = tuple(lax.empty(a.shape, a.dtype) for a in (rows, gates))
    sums = tuple(jnp.zeros(w.shape, jnp.float32) for w in stacked)
    (drows, dgates), sums = fold(block, gradients, sums, len(rows), group_sizes, stacked)
    dstacked = (total.astype(w.dtype) for total, w in zip(sums, stacked, strict=True))
    return None, drows, dgates, None, *dstacked


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _slice(arrays: Any, row: Array, num_rows: int) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, row, num_rows), arrays)


def _update(arrays: Any, parts: Any, row: Array) -> Any:
    return jax.tree.map(lambda a, part: lax.dynamic_update_slice_in_dim(a, part, row, axis=0), arrays, parts)


def _count_until(ends: Array, places: Array) -> Array:
    """How many ends lie at or before each place: ends (E,) in order, places (P,) -> (P,)."""
    return jnp.searchsorted(ends, places, side="right", method="compare_all")


def _at(stacked: Any, expert: Array) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), stacked)


def _as_needed(
    step: Step, carry: Any, sums: Any, num_rows: int, group_sizes: Array, stacked: Any
) -> tuple[Any, Any]:
    """As many wide and narrow blocks as each group needs, in loops whose length depends on group_sizes."""
    wide, starts = min(WIDE_BLOCK, num_rows), jnp.cumsum(group_sizes) - group_sizes

    def group(carry, expert):
        own, start, size = _at(stacked, expert), starts[expert], group_sizes[expert]

        def cover(carry_and_sums, start, rows, count):
            def block(i, carry_and_sums):
                carry, parts = step(carry_and_sums[0], expert, own, start + i * rows, rows)
                return carry, jax.tree.map(jnp.add, carry_and_sums[1], parts)

            return lax.fori_loop(0, count, block, carry_and_sums)

        zeros = jax.tree.map(lambda total: jnp.zeros_like(total[0]), sums)
        carry_and_sums = cover((carry, zeros), start, wide, size // wide)
        done = size // wide * wide
        narrow = (size - done + NARROW_BLOCK - 1) // NARROW_BLOCK
        return cover(carry_and_sums, start + done, NARROW_BLOCK, narrow)

    return lax.scan(group, carry, jnp.arange(len(group_sizes)))


def _fixed_number(
    step: Step, carry: Any, sums: Any, num_rows: int, group_sizes: Array, stacked: Any, *, block_rows: int
) -> tuple[Any, Any]:
    """As many blocks of block_rows as any group_sizes may need; those too many fall on rows left over.

    For GPU, where each turn of a loop whose length depends on data waits for the host. Slots of experts that
    another device holds count as well.
    """
    num_slots, num_experts = num_rows - block_rows, len(group_sizes)
    counts, starts = (group_sizes + block_rows - 1) // block_rows, jnp.cumsum(group_sizes) - group_sizes
    ends = jnp.cumsum(counts)
    numbers = jnp.arange(num_slots // block_rows + num_experts)
    experts = _count_until(ends, numbers).clip(max=num_experts - 1)
    rows = starts[experts] + (numbers - (ends - counts)[experts]) * block_rows
    rows = rows.clip(max=num_slots)

    def body(carry_and_sums, block):
        (carry, sums), (expert, row) = carry_and_sums, block
        carry, parts = step(carry, expert, _at(stacked, expert), row, block_rows)
        return (carry, jax.tree.map(lambda total, part: total.at[expert].add(part), sums, parts)), None

    return lax.scan(body, (carry, sums), (experts, rows))[0]


def grouped_mlps(platform: str) -> list[str]:
    """Those of GROUPED_MLPS that a platform (`sharding.platform`) has, its own first.

    `lax.ragged_dot` has a kernel of its own on TPU. On CPU and GPU XLA expands it to a product of every row
    with every kernel (openxla/xla pull request 45996): for them blocks, of a number that follows the groups
    or is fixed. tokamax, where it is installed, trains on TPUs and Hopper GPUs: its kernels for others have
    no gradient.
    """
    return {
        "cpu": ["blocks", "fixed_blocks"],
        "tpu": ["ragged_dot", "fixed_blocks", "tokamax"],
    }.get(platform, ["fixed_blocks", "tokamax"])


def _tokamax_ragged_dot() -> Callable[[Array, Array, Array], Array]:
    import tokamax

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # or it takes the arguments of whatever program this is for its own
    return tokamax.ragged_dot


def make_grouped_mlp(
    name: str, num_slots: int, num_experts: int, *, all_grouped: bool
) -> tuple[Callable[[Array, Array, Array, Experts, Hidden], Array], int]:
    """The grouped feed-forward layer of GROUPED_MLPS for so many slots, and how many spare rows it wants.
    all_grouped: every slot is of a group. Raises ValueError if the name is none of GROUPED_MLPS.
    """
    if name not in GROUPED_MLPS:
        raise ValueError(f"grouped_mlp={name!r} is not known: choose one of {', '.join(GROUPED_MLPS)}")
    if name == "ragged_dot":
        return functools.partial(ragged_dot, dot=lax.ragged_dot, all_grouped=all_grouped), 0
    if name == "tokamax":
        spare_rows = -num_slots % TOKAMAX_ROWS
        all_grouped = all_grouped and spare_rows == 0
        return functools.partial(ragged_dot, dot=_tokamax_ragged_dot(), all_grouped=all_grouped), spare_rows
    if name == "blocks":
        return functools.partial(blocks, fold=_as_needed), NARROW_BLOCK
    block_rows = GPU_BLOCK  # or less, where more than a quarter were too many
    while block_rows > NARROW_BLOCK and 4 * block_rows * num_experts > num_slots:
        block_rows //= 2
    return functools.partial(blocks, fold=functools.partial(_fixed_number, block_rows=block_rows)), block_rows
