"""Three ways to run the experts that a router chose, under one contract.

Letters: N tokens, D width, F expert hidden width, O output width (D of feed-forward layers), E experts, K
selected experts, R rows sorted by expert (N*K routed slots and some spare rows), C rows of an expert's
buffer.

Contract of a dispatch function `(x, gates, expert_ids, experts, feed_forward) -> (y, dropped)`:
  x (N, D); gates (N, K) float32; expert_ids (N, K) int32, where an id of E means "not an expert of this
  device" to dense and ragged and contributes nothing; experts are stacked `Weights`.
  y (N, O) in x's dtype is sum_k gates[n, k] * expert_{ids[n, k]}(x[n]); dropped (N,) int32 counts the routed
  slots of each token that were dropped, zero except under `capacity`.
Dense and ragged multiply the hidden activations by the gate (`FeedForward.contract` says why).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from clipmoe_jax.models.experts import make_grouped_mlp
from clipmoe_jax.models.feed_forward import FeedForward, Weights

Array = jax.Array
Dispatch = Callable[[Array, Array, Array, Weights, FeedForward], tuple[Array, Array]]

# The name under which remat finds where each token goes, a thousandth of the size of its activations.
ROUTING = "routing"


def make_dispatch(
    name: str, capacity_factor: float, grouped_mlp: str, expert_axis: str | None = None
) -> Dispatch:
    """Returns the dispatch function "dense", "ragged" or "capacity".

    expert_axis: inside shard_map, the mesh axis that splits the experts. grouped_mlp: a value of
    GROUPED_MLPS, which `ragged` runs the experts by.
    """
    if name == "capacity":
        return functools.partial(capacity, capacity_factor=capacity_factor, expert_axis=expert_axis)
    if name not in ("dense", "ragged"):
        raise ValueError(f"dispatch={name!r} is not known: choose 'dense', 'ragged' or 'capacity'")
    local = dense
    if name == "ragged":
        local = functools.partial(ragged, grouped_mlp=grouped_mlp, all_grouped=expert_axis is None)
    return local if expert_axis is None else functools.partial(gathered, local=local, expert_axis=expert_axis)


def dense(
    x: Float[Array, "N D"],
    gates: Float[Array, "N K"],
    expert_ids: Int[Array, "N K"],
    experts: Weights,
    feed_forward: FeedForward,
) -> tuple[Float[Array, "N O"], Int[Array, " N"]]:
    """Runs every expert on every token: E/K times the work, no gather. The reference."""
    combine_weights = gates_of_experts(gates, expert_ids, experts.proj_kernel.shape[0])

    def apply(x, kernel, bias):
        if x.ndim == 2:  # to the hidden activations of every expert
            return jnp.einsum("nd,edf->nef", x, kernel) + bias
        return jnp.einsum("nef,efd->nd", x, kernel)

    no_bias = experts._replace(proj_bias=None)
    inputs = x if experts.fc_kernel is not None else x[:, None]  # as the hidden activations of every expert
    y = feed_forward(inputs, no_bias, combine_weights[:, :, None], apply=apply)
    y += _gated_bias(combine_weights, experts)
    return y, jnp.zeros(x.shape[0], jnp.int32)


def ragged(
    x: Float[Array, "N D"],
    gates: Float[Array, "N K"],
    expert_ids: Int[Array, "N K"],
    experts: Weights,
    feed_forward: FeedForward,
    *,
    grouped_mlp: str,
    all_grouped: bool,
) -> tuple[Float[Array, "N O"], Int[Array, " N"]]:
    """Sorts the routed slots by expert and runs each expert on its rows. Exact.

    grouped_mlp: a value of GROUPED_MLPS. all_grouped: no id is E.
    """
    (num_tokens, num_selected), num_experts = expert_ids.shape, experts.proj_kernel.shape[0]
    run_groups, spare_rows, multiple = make_grouped_mlp(
        grouped_mlp, num_tokens * num_selected, experts, all_grouped=all_grouped
    )
    order, position, group_sizes = _sort_by_expert(expert_ids.reshape(-1), num_experts, multiple, spare_rows)
    order, position, group_sizes = (checkpoint_name(a, ROUTING) for a in (order, position, group_sizes))

    def mask_undefined(rows):
        """Zeroes the rows of no expert here, and their gradient. (No slot takes a value from spare rows.)"""
        if all_grouped:
            return rows
        return jnp.where(jnp.arange(len(rows))[:, None] < group_sizes.sum(), rows, 0)

    token_rows = position.reshape(num_tokens, num_selected)
    rows = mask_undefined(_rows_from_tokens(x, order, token_rows))
    row_gates = mask_undefined(_rows_from_tokens(gates.reshape(-1, 1), order, position[:, None]))
    y = mask_undefined(run_groups(rows, row_gates, group_sizes, experts, feed_forward))
    y = _tokens_from_rows(y, order, token_rows)
    y += _gated_bias(gates_of_experts(gates, expert_ids, num_experts), experts)
    return y, jnp.zeros(num_tokens, jnp.int32)


def capacity(
    x: Float[Array, "N D"],
    gates: Float[Array, "N K"],
    expert_ids: Int[Array, "N K"],
    experts: Weights,
    feed_forward: FeedForward,
    *,
    capacity_factor: float,
    expert_axis: str | None = None,
) -> tuple[Float[Array, "N O"], Int[Array, " N"]]:
    """Gives each expert a buffer of C = ceil(capacity_factor * N * K / E) rows and drops what overflows.

    First choices of all tokens take their places before second choices (GShard, arXiv 2006.16668).
    A factor of at least E / K never drops. expert_axis: inside shard_map, the mesh axis that splits the
    experts. The buffers travel to them and back, and N counts a device's own tokens, so what is dropped
    depends on the number of devices.
    """
    num_tokens, num_selected = expert_ids.shape
    num_devices = 1 if expert_axis is None else lax.axis_size(expert_axis)
    num_experts = num_devices * experts.proj_kernel.shape[0]
    rows = math.ceil(capacity_factor * num_tokens * num_selected / num_experts)
    rows = min(rows, num_tokens)
    slot_expert = expert_ids.T.reshape(-1)  # all first choices, then all second choices
    chosen, counts = _count(slot_expert, num_experts)
    place = jnp.sum(jnp.where(chosen, counts - 1, 0), axis=0)
    kept = place < rows
    destination = jnp.where(kept, slot_expert * rows + place, num_experts * rows)

    slot_token = jnp.tile(jnp.arange(num_tokens), num_selected)
    buffers = jnp.zeros((num_experts * rows, x.shape[1]), x.dtype)
    buffers = buffers.at[destination].set(x[slot_token], mode="drop", unique_indices=True)
    buffers = buffers.reshape(num_experts, rows, -1)
    if expert_axis is not None:  # (E, C, D) of a device's tokens to (E / n, n * C, D) of its experts
        buffers = lax.all_to_all(buffers, expert_axis, 0, 1, tiled=True)

    def apply(x, kernel, bias):
        return x @ kernel + bias[:, None]  # (E, C, D) and (E, D, F), or back

    y = feed_forward(buffers, experts, jnp.ones((*buffers.shape[:2], 1)), apply=apply)
    if expert_axis is not None:
        y = lax.all_to_all(y, expert_axis, 1, 0, tiled=True)

    y = y.reshape(num_experts * rows, -1).at[destination].get(mode="fill", fill_value=0)
    y = y.reshape(num_selected, num_tokens, -1)
    y = jnp.einsum("knd,nk->nd", y, gates).astype(x.dtype)
    dropped = (~kept).reshape(num_selected, num_tokens).sum(axis=0, dtype=jnp.int32)
    return y, dropped


def gathered(
    x: Float[Array, "N D"],
    gates: Float[Array, "N K"],
    expert_ids: Int[Array, "N K"],
    experts: Weights,
    feed_forward: FeedForward,
    *,
    local: Dispatch,
    expert_axis: str,
) -> tuple[Float[Array, "N O"], Int[Array, " N"]]:
    """Runs an exact dispatch over a mesh axis that splits the experts, inside shard_map.

    Each device gathers the tokens of its group and runs the experts it holds (`local`: dense or ragged) on
    the slots routed to them; the partial sums are added and scattered back. An all-to-all that drops nothing
    would need buffers of N rows for every expert and so move E / n times as much (docs/scaling.md).
    """
    num_here, num_selected = experts.proj_kernel.shape[0], expert_ids.shape[1]
    x, gates, expert_ids = (lax.all_gather(a, expert_axis, tiled=True) for a in (x, gates, expert_ids))
    expert_ids = expert_ids - lax.axis_index(expert_axis) * num_here
    here = (expert_ids >= 0) & (expert_ids < num_here)
    expert_ids = jnp.where(here, expert_ids, num_here)
    if num_here < num_selected:  # no token has more slots here than there are experts
        one_hot = jax.nn.one_hot(expert_ids, num_here, dtype=gates.dtype)
        gates = jnp.einsum("nk,nke->ne", gates, one_hot)
        expert_ids = jnp.where(one_hot.any(axis=1), jnp.arange(num_here), num_here)
    outputs = local(x, gates, expert_ids, experts, feed_forward)
    return jax.tree.map(lambda a: lax.psum_scatter(a, expert_axis, tiled=True), outputs)


def gates_of_experts(gates: Array, expert_ids: Array, num_experts: int) -> Array:
    """Returns each expert's gate, (..., K) -> (..., E) float32: 0 where not selected and for an id of E."""
    return jnp.einsum("...k,...ke->...e", gates, jax.nn.one_hot(expert_ids, num_experts, dtype=gates.dtype))


def _gated_bias(combine_weights: Array, experts: Weights) -> Array:
    """Returns the sum of the experts' proj_bias by gate, (N, E) -> (N, O); the gates' gradient is float32."""
    bias = experts.proj_bias
    assert bias is not None
    y = lax.platform_dependent(
        combine_weights, bias.astype(jnp.float32), cuda=_sum_of_products, default=jnp.matmul
    )
    return y.astype(bias.dtype)


def _sum_of_products(gates: Array, bias: Array) -> Array:
    """Returns gates @ bias, (N, E) and (E, O) -> (N, O), as a sum, which XLA computes where it adds outputs.
    For a product it keeps float32 arrays (N, O), three of them in a training step."""
    return jnp.sum(gates[:, :, None] * bias, axis=1)


def _count(
    slot_expert: Int[Array, " slots"], num_experts: int
) -> tuple[Bool[Array, "E slots"], Int[Array, "E slots"]]:
    """Returns which slots are each expert's, and how many of its slots there are up to and with each slot."""
    chosen = slot_expert == jnp.arange(num_experts)[:, None]
    return chosen, jnp.cumsum(chosen, axis=1, dtype=jnp.int32)


def _sort_by_expert(
    slot_expert: Int[Array, " slots"], num_experts: int, multiple: int, spare_rows: int
) -> tuple[Int[Array, " R"], Int[Array, " slots"], Int[Array, " E"]]:
    """Gives each slot a row, those of an expert in order, each expert's first row being a multiple.

    Returns the slot of each row, len(slot_expert) where none is, and past the experts' rows that or a slot of
    no expert; the row of each slot, a number past the last row for a slot of no expert; and how many rows
    each expert has, a multiple.

    By counting, up to some 64 experts: XLA sorts in a kernel for each of some fourteen steps on GPUs, and
    pair by pair on CPUs.
    """
    slots = jnp.arange(len(slot_expert))
    num_rows = len(slots) + num_experts * (multiple - 1) + spare_rows
    chosen, counts = _count(slot_expert, num_experts)
    group_sizes = counts[:, -1] + -counts[:, -1] % multiple
    before_first = jnp.cumsum(group_sizes) - group_sizes - 1
    position = jnp.sum(jnp.where(chosen, before_first[:, None] + counts, 0), axis=0)
    position = jnp.where(slot_expert < num_experts, position, num_rows + slots)
    if num_rows == len(slots):  # as on TPUs, where a scatter of single numbers is slow
        order = jnp.argsort(position)
    else:
        order = jnp.full(num_rows, len(slots)).at[position].set(slots, mode="drop", unique_indices=True)
    return order, position, group_sizes


@jax.custom_vjp
def _rows_from_tokens(x: Array, order: Array, position: Array) -> Array:
    """Gathers each sorted row's token. x (N, D), order (R,) slots, position (N, K) rows -> (R, D).

    This and the next function are each other's transposes. Both gather, where autodiff would scatter, which
    is serial on CPU; neither makes an array (N, K, D), which TPUs pad fourfold (benchmarks/LOG.md).
    """
    return jnp.take(x, order // position.shape[1], axis=0, mode="clip")


def _rows_from_tokens_fwd(x, order, position):
    return _rows_from_tokens(x, order, position), (order, position)


def _rows_from_tokens_bwd(residuals, g):
    return _tokens_from_rows(g, *residuals), None, None


_rows_from_tokens.defvjp(_rows_from_tokens_fwd, _rows_from_tokens_bwd)


@jax.custom_vjp
def _tokens_from_rows(rows: Array, order: Array, position: Array) -> Array:
    """Sums each token's rows, without spare rows. rows (R, D) -> (N, D)."""
    del order
    slots = [jnp.take(rows, of_slot, axis=0, mode="clip").astype(jnp.float32) for of_slot in position.T]
    return functools.reduce(jnp.add, slots).astype(rows.dtype)


def _tokens_from_rows_fwd(rows, order, position):
    return _tokens_from_rows(rows, order, position), (order, position)


def _tokens_from_rows_bwd(residuals, g):
    order, position = residuals  # no token reads the other rows: their gradient is 0
    rows = jnp.take(g, order // position.shape[1], axis=0, mode="fill", fill_value=0)
    return rows, None, None


_tokens_from_rows.defvjp(_tokens_from_rows_fwd, _tokens_from_rows_bwd)
