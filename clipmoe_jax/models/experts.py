"""Experts on rows of tokens that are sorted by expert: grouped feed-forward or linear layers.

Letters: R sorted rows, E experts, D width, F expert hidden width, O output width (D of feed-forward layers).

Contract of a grouped feed-forward layer `(rows, gates, group_sizes, experts, feed_forward) -> y`:
  rows (R, D); gates (R, 1) float32; group_sizes (E,) int32: how many consecutive rows each expert has. Rows
  after those of the last group are spare; `make_grouped_mlp` says how many there have to be, and of what
  number group sizes are multiples: the dispatch fills groups up with rows that no slot reads. y (R, O) is
  gate * expert(row) without proj_bias. In spare rows y and the gradients of rows and gates are undefined and
  may be NaN; the inputs there must be finite. The gradient of y must be 0 in rows that no slot reads.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from clipmoe_jax.models.dropout import Dropout
from clipmoe_jax.models.feed_forward import HIDDEN, FeedForward, Weights

Array = jax.Array

# Rows of one product on CPU: wide blocks as long as a group fills them, narrow ones for the rest. Wide blocks
# alone leave the last one half empty; narrow ones alone pack the kernel too often (benchmarks/moe_block.py).
WIDE_BLOCK, NARROW_BLOCK = 256, 64

# The most rows of one product on GPU. A fixed number of blocks has up to E too many, so small blocks waste
# less. Large blocks fill a GPU and copy an expert's kernels less often: a layer of ViT-L/14 takes an H100
# 2.8 ms with 2,048 rows, 3.3 with 1,024, 4.6 with 512 (benchmarks/results/h100.jsonl).
GPU_BLOCK = 2048

# Values of ComputeConfig.grouped_mlp by platform. `lax.ragged_dot` is one kernel on TPU alone: on CPU and GPU
# XLA expands it to a product of every row with every kernel (openxla/xla pull request 45996).
GROUPED_MLPS = {
    "cpu": "blocks",
    "gpu": "fixed_blocks",
    "cuda": "fixed_blocks",
    "hopper": "tiles",
    "tpu": "ragged_dot",
}


def default_grouped_mlp(platform: str, dtype: str) -> str:
    """Returns the value of GROUPED_MLPS for a platform (`sharding.platform`): tiles are of half precision."""
    return GROUPED_MLPS["cuda" if platform == "hopper" and dtype == "float32" else platform]


GroupedMlp = Callable[[Array, Array, Array, Weights, FeedForward], Array]


def make_grouped_mlp(
    name: str, num_slots: int, experts: Weights, *, all_grouped: bool
) -> tuple[GroupedMlp, int, int]:
    """Returns a grouped feed-forward layer for `num_slots` routed slots; the spare rows that it needs; the
    number of which its group sizes must be multiples.

    all_grouped: every slot belongs to a group. "tiles" are "fixed_blocks" for experts that its kernels do not
    fit (`grouped_dot.fits`). Raises ValueError if `name` is no value of GROUPED_MLPS.
    """
    num_experts = len(experts.proj_kernel)
    if name == "ragged_dot":
        return functools.partial(ragged_dot, all_grouped=all_grouped), 0, 1
    if name == "blocks":
        return functools.partial(blocks, scan_blocks=_as_needed), NARROW_BLOCK, 1
    if name == "tiles":
        from clipmoe_jax.models import grouped_dot  # Pallas takes a quarter of a second

        if all(grouped_dot.fits(kernel) for kernel in experts[::2] if kernel is not None):
            most = num_slots + num_experts * (grouped_dot.ROWS - 1)
            return tiles, -most % grouped_dot.ROWS, grouped_dot.ROWS
        name = "fixed_blocks"
    if name == "fixed_blocks":
        block_rows = GPU_BLOCK  # less where over a quarter of the rows would be wasted
        while block_rows > NARROW_BLOCK and 4 * block_rows * num_experts > num_slots:
            block_rows //= 2
        scan_blocks = functools.partial(_fixed_number, block_rows=block_rows)
        return functools.partial(blocks, scan_blocks=scan_blocks), block_rows, 1
    names = ", ".join(dict.fromkeys(GROUPED_MLPS.values()))
    raise ValueError(f"grouped_mlp={name!r} is not known: choose one of {names}")


def ragged_dot(
    rows: Float[Array, "R D"],
    gates: Float[Array, "R 1"],
    group_sizes: Int[Array, " E"],
    experts: Weights,
    feed_forward: FeedForward,
    *,
    all_grouped: bool,
) -> Float[Array, "R O"]:
    """Runs the experts by two grouped products. all_grouped: there are no spare rows."""
    expert_of_row = _count_until(jnp.cumsum(group_sizes), jnp.arange(len(rows)))

    def apply(x, kernel, bias):
        y = lax.ragged_dot(x, kernel, group_sizes)
        if bias is None:
            return y
        # A product, which XLA fuses with what follows; a gather would write as many biases as y has values.
        one_hot = jax.nn.one_hot(expert_of_row, len(group_sizes), dtype=y.dtype)
        y = y + jnp.dot(one_hot, bias, precision=lax.Precision.HIGHEST)
        if all_grouped:
            return y
        # A kernel may leave spare rows of y, and of its gradient, as they were in memory.
        return jnp.where((expert_of_row < len(group_sizes))[:, None], y, 0)

    return feed_forward(rows, experts._replace(proj_bias=None), gates, apply=apply)


def tiles(
    rows: Float[Array, "R D"],
    gates: Float[Array, "R 1"],
    group_sizes: Int[Array, " E"],
    experts: Weights,
    feed_forward: FeedForward,
) -> Float[Array, "R O"]:
    """Runs the experts by two products of tiles, each of which belongs to one expert."""
    from clipmoe_jax.models import grouped_dot

    first_rows = jnp.arange(0, len(rows), grouped_dot.ROWS)
    tile_expert = _count_until(jnp.cumsum(group_sizes), first_rows).astype(jnp.int32)

    def apply(x, kernel, bias):
        y = grouped_dot.grouped_dot(x, kernel, tile_expert)
        if bias is None:
            return y
        # Of float32, so that its gradient is summed over tiles in float32.
        of_tiles = jnp.take(bias.astype(jnp.float32), tile_expert, axis=0, mode="fill", fill_value=0)
        of_tiles = of_tiles.astype(y.dtype)
        return (y.reshape(len(tile_expert), -1, y.shape[1]) + of_tiles[:, None]).reshape(y.shape)

    return feed_forward(rows, experts._replace(proj_bias=None), gates, apply=apply)


# Runs `step(carry, expert, weights, first_row, num_rows) -> (carry, terms)` on blocks of rows that cover all
# groups in order. `scan(step, carry, sums, R, group_sizes, experts)` returns the last carry and the sums;
# sums[expert] is the sum, from zero, of the terms of the expert's blocks.
Step = Callable[[Any, Array, Weights, Array, int], tuple[Any, Any]]
ScanBlocks = Callable[[Step, Any, Any, int, Array, Weights], tuple[Any, Any]]


def blocks(
    rows: Float[Array, "R D"],
    gates: Float[Array, "R 1"],
    group_sizes: Int[Array, " E"],
    experts: Weights,
    feed_forward: FeedForward,
    *,
    scan_blocks: ScanBlocks,
) -> Float[Array, "R O"]:
    """Runs both layers of an expert on one block of rows after the other.

    Only the hidden activations before the activation function outlive a block, and only where a gradient is
    to come. The backward pass goes through the same blocks, from dy to d(rows) and into sums over the
    kernels. JAX cannot differentiate the loops, whose length depends on data; benchmarks/LOG.md says what one
    block after the other saves.

    The last block of a group runs over into the rows of the next group, which is written later and overwrites
    them. So groups need neither masks nor padding between them, except in the sums.

    scan_blocks: `_as_needed`, or `_fixed_number` of blocks of a size.
    """
    rate, words = feed_forward.dropout
    feed_forward = feed_forward._replace(dropout=feed_forward.dropout._replace(words=None))
    experts = experts._replace(proj_bias=None)
    return _blocks(feed_forward, scan_blocks, words if rate else None, rows, gates, group_sizes, experts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(feed_forward, scan_blocks, words, rows, gates, group_sizes, experts):
    return _forward(feed_forward, scan_blocks, words, rows, gates, group_sizes, experts, keep=False)[0]


def _blocks_fwd(feed_forward, scan_blocks, words, rows, gates, group_sizes, experts):
    y, h = _forward(feed_forward, scan_blocks, words, rows, gates, group_sizes, experts, keep=True)
    return y, (rows, gates, group_sizes, experts, None if h is None else checkpoint_name(h, HIDDEN))


def _forward(feed_forward, scan_blocks, words, rows, gates, group_sizes, experts, keep: bool):
    """Returns y and, if `keep`, the hidden activations, else None; None where these are the rows."""
    feed_forward = feed_forward._replace(dropout=feed_forward.dropout._replace(words=words))

    def block(outputs, expert, weights, row, num_rows):
        x, gate = _slice((rows, gates), row, num_rows)
        h_block = feed_forward.expand(x, weights, row)
        y = feed_forward.contract(h_block, weights, gate)
        return _update(outputs, (y, None if h is None else h_block), row), ()

    # Not zeros: those of all layers depend on nothing, so XLA would make them all where a step begins.
    h = None
    if keep and experts.fc_kernel is not None:
        h = lax.empty((len(rows), experts.fc_kernel.shape[2]), rows.dtype)
    outputs = lax.empty((len(rows), experts.proj_kernel.shape[2]), rows.dtype), h
    return scan_blocks(block, outputs, (), len(rows), group_sizes, experts)[0]


def _blocks_bwd(feed_forward, scan_blocks, residuals, dy):
    rows, gates, group_sizes, experts, h = residuals
    no_dropout = feed_forward._replace(dropout=Dropout())  # expand's gradient, which no dropped value reaches
    ends = jnp.cumsum(group_sizes)

    def block(gradients, expert, weights, row, num_rows):
        x, gate, g = _slice((rows, gates, dy), row, num_rows)
        h_block = x if h is None else _slice(h, row, num_rows)
        # Rows of the next group must not reach the sums; what they leave in `gradients` is overwritten.
        g = jnp.where((row + jnp.arange(num_rows) < ends[expert])[:, None], g, 0)
        _, contract_vjp = jax.vjp(feed_forward.contract, h_block, weights, gate)
        dh, of_contract, dgate = contract_vjp(g)
        _, expand_vjp = jax.vjp(no_dropout.expand, x, weights)
        dx, of_expand = expand_vjp(dh)
        # Where the experts are frozen XLA drops these terms as dead code.
        return _update(gradients, (dx, dgate), row), jax.tree.map(jnp.add, of_contract, of_expand)

    gradients = tuple(lax.empty(a.shape, a.dtype) for a in (rows, gates))
    sums = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), experts)
    (drows, dgates), sums = scan_blocks(block, gradients, sums, len(rows), group_sizes, experts)
    return None, drows, dgates, None, jax.tree.map(lambda total, w: total.astype(w.dtype), sums, experts)


_blocks.defvjp(_blocks_fwd, _blocks_bwd)


def _slice(arrays: Any, row: Array, num_rows: int) -> Any:
    return _as_bits(lambda a: lax.dynamic_slice_in_dim(a, row, num_rows), arrays)


def _update(arrays: Any, parts: Any, row: Array) -> Any:
    def update(a: Array, part: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(a, part, row, axis=0)

    return _as_bits(update, arrays, parts)


def _as_bits(function: Callable[..., Array], *trees: Any) -> Any:
    """Maps trees of arrays by a function that moves values, those of bfloat16 as integers.

    XLA on CPU would move them as float32, and convert the outputs of all rows to it and back in each block.
    On GPUs it makes no difference.
    """

    def move(*arrays: Array) -> Array:
        if arrays[0].dtype != jnp.bfloat16:
            return function(*arrays)
        bits = (lax.bitcast_convert_type(a, jnp.uint16) for a in arrays)
        return lax.bitcast_convert_type(function(*bits), arrays[0].dtype)

    return jax.tree.map(move, *trees)


def _count_until(ends: Array, places: Array) -> Array:
    """Returns how many ends lie at or before each place. ends (E,) in order, places (P,) -> (P,) int32."""
    return jnp.searchsorted(ends, places, side="right", method="compare_all")


def _of_expert(experts: Weights, expert: Array) -> Weights:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, expert, keepdims=False), experts)


def _as_needed(
    step: Step, carry: Any, sums: Any, num_rows: int, group_sizes: Array, experts: Weights
) -> tuple[Any, Any]:
    """Runs as many wide and narrow blocks as each group needs: loops whose length depends on group_sizes."""
    starts, num_slots = jnp.cumsum(group_sizes) - group_sizes, num_rows - NARROW_BLOCK

    def group(carry, expert):
        # XLA on CPU slices bfloat16 as float32, and would convert all kernels outside of the loop.
        expert, kept_inside = lax.optimization_barrier((expert, experts))
        weights, start, size = _of_expert(kept_inside, expert), starts[expert], group_sizes[expert]

        def cover(carry_and_sums, start, rows, count):
            def block(i, carry_and_sums):
                carry, terms = step(carry_and_sums[0], expert, weights, start + i * rows, rows)
                return carry, jax.tree.map(jnp.add, carry_and_sums[1], terms)

            return lax.fori_loop(0, count, block, carry_and_sums)

        zeros = jax.tree.map(lambda total: jnp.zeros_like(total[0]), sums)
        carry_and_sums, done = (carry, zeros), 0
        # Not where there are fewer slots: no group could fill one, and as a block of all rows depends on no
        # turn of its loop, XLA would compute it before the loop, for each expert.
        if num_slots >= WIDE_BLOCK:
            carry_and_sums = cover(carry_and_sums, start, WIDE_BLOCK, size // WIDE_BLOCK)
            done = size // WIDE_BLOCK * WIDE_BLOCK
        narrow = (size - done + NARROW_BLOCK - 1) // NARROW_BLOCK
        return cover(carry_and_sums, start + done, NARROW_BLOCK, narrow)

    return lax.scan(group, carry, jnp.arange(len(group_sizes)))


def _fixed_number(
    step: Step,
    carry: Any,
    sums: Any,
    num_rows: int,
    group_sizes: Array,
    experts: Weights,
    *,
    block_rows: int,
) -> tuple[Any, Any]:
    """Runs as many blocks as any group_sizes may need; blocks too many fall on the spare rows.

    For GPU, where each turn of a loop whose length depends on data waits for the host. Slots of experts that
    another device holds count as well.
    """
    num_slots, num_experts = num_rows - block_rows, len(group_sizes)
    counts, starts = (group_sizes + block_rows - 1) // block_rows, jnp.cumsum(group_sizes) - group_sizes
    ends = jnp.cumsum(counts)
    numbers = jnp.arange(num_slots // block_rows + num_experts)
    expert_of_block = _count_until(ends, numbers).clip(max=num_experts - 1)
    first_rows = starts[expert_of_block] + (numbers - (ends - counts)[expert_of_block]) * block_rows
    first_rows = first_rows.clip(max=num_slots)

    def body(state):
        i, carry, sums = state
        expert = expert_of_block[i]
        carry, terms = step(carry, expert, _of_expert(experts, expert), first_rows[i], block_rows)
        return i + 1, carry, jax.tree.map(lambda total, term: total.at[expert].add(term), sums, terms)

    # Under remat a scan's partial evaluation would take what a block computes from h alone out of the loop,
    # and write it for all rows.
    return lax.while_loop(lambda state: state[0] < len(numbers), body, (0, carry, sums))[1:]
