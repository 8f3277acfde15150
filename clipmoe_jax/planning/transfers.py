"""Bytes that devices send each other in a training step, from where parameters and batches lie, and the time
they take.

Letters: n devices of a group.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.accelerators import Accelerator
from clipmoe_jax.dmu.phases import PlannedPhase, placed_params
from clipmoe_jax.models import flops
from clipmoe_jax.models.transformer import first_moe_layer, num_visited_experts
from clipmoe_jax.planning.abstract import FLOAT_BYTES, device_bytes, text_config

# Parameters that are not cast to the type of activations where they are used. (Nor are vectors, mostly.)
USED_IN_FLOAT32 = r".*/moe/router/\w+|text/token_embedding/embedding|text/positional_embedding"


class Transfer(NamedTuple):
    """Bytes that one device sends in a step over axes of the mesh, and receives as many of."""

    axes: tuple[str, ...]
    what: str
    operation: str
    num_bytes: float


def plan_transfers(mesh: AbstractMesh, phase: PlannedPhase) -> list[Transfer]:
    """Returns what a device sends in one step on the usual rings: (n - 1) / n of what is gathered or
    scattered, twice that of what is reduced to all."""
    return [
        *_features(mesh, phase),
        *_parameters_and_gradients(mesh, phase),
        *_tokens(mesh, phase),
    ]


def _on_rings(
    mesh: AbstractMesh, axes: Sequence[str], what: str, operation: str, num_bytes: float, times: int = 1
) -> Iterator[Transfer]:
    """Yields the transfer of `times` num_bytes over those axes that are split, if there are any."""
    axes = [axis for axis in axes if mesh.shape[axis] > 1]
    n = math.prod(mesh.shape[axis] for axis in axes)
    if n > 1 and num_bytes * times:
        sent = times * num_bytes * (n - 1) / n * (2 if operation == "all-reduce" else 1)
        yield Transfer(tuple(axes), what, operation, sent)


def _num_forward_passes(phase: PlannedPhase) -> int:
    recomputes = phase.compute.remat != "none"
    return 1 + recomputes + (phase.hyperparameters.accumulation_steps > 1)


def _features(mesh: AbstractMesh, phase: PlannedPhase) -> Iterator[Transfer]:
    size = phase.hyperparameters.batch_size * phase.architecture.embed_dim * FLOAT_BYTES
    yield from _on_rings(mesh, sharding.BATCH_AXES, "features of captions", "all-gather", size)
    yield from _on_rings(mesh, sharding.BATCH_AXES, "their gradient", "all-reduce", size)


def _parameters_and_gradients(mesh: AbstractMesh, phase: PlannedPhase) -> Iterator[Transfer]:
    leaves = trees.flatten(placed_params(mesh, phase.architecture, phase.adapters))
    trains = trees.match_rules(phase.rules, list(leaves))
    itemsize = jnp.dtype(phase.compute.dtype).itemsize
    microbatches = phase.hyperparameters.accumulation_steps

    def as_made(name: str, num_bytes: float) -> float:
        """Returns the bytes of a float32 leaf's gradient in the type in which products make it."""
        in_float32 = leaves[name].ndim == 1 or re.fullmatch(USED_IN_FLOAT32, name)
        return num_bytes if in_float32 else num_bytes / FLOAT_BYTES * itemsize

    split = {name: leaf for name, leaf in leaves.items() if "fsdp" in leaf.sharding.spec}
    whole = {name: mesh.shape["fsdp"] * device_bytes(leaf) for name, leaf in split.items()}
    gathered = _num_forward_passes(phase) * sum(whole.values())
    if phase.compute.remat == "dots":  # backward only those that pull a gradient back
        pulls = flops.input_gradients(phase.architecture, trains)
        gathered -= sum(size for name, size in whole.items() if name.rpartition("/")[0] not in pulls)
    # Every microbatch gathers parameters and scatters gradients; what is reduced to all is their float32 sum.
    size = gathered / FLOAT_BYTES * itemsize
    yield from _on_rings(mesh, ["fsdp"], "parameters", "all-gather", size, microbatches)
    scattered = sum(as_made(name, size) for name, size in whole.items() if trains[name])
    yield from _on_rings(mesh, ["fsdp"], "gradients", "reduce-scatter", scattered, microbatches)
    reduced: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for name, leaf in leaves.items():
        if trains[name]:
            spec = leaf.sharding.spec
            axes = tuple(a for a in sharding.BATCH_AXES if mesh.shape[a] > 1 and a not in spec)
            size = device_bytes(leaf)
            reduced[axes] += size if microbatches > 1 else as_made(name, size)
    for axes, size in reduced.items():
        yield from _on_rings(mesh, axes, "gradients", "all-reduce", size)


def _tokens(mesh: AbstractMesh, phase: PlannedPhase) -> Iterator[Transfer]:
    """Yields what tokens on their way to experts of other devices make."""
    config, compute, moe = phase.architecture, phase.compute, phase.architecture.moe
    if moe is None:
        return
    trains = trees.match_rules(phase.rules, list(trees.flatten(placed_params(mesh, config, phase.adapters))))
    experts_train = any(yes for name, yes in trains.items() if "/moe/c_fc/" in name)
    shared_train = any(yes for name, yes in trains.items() if "/moe/" not in name)
    itemsize = jnp.dtype(compute.dtype).itemsize
    passes, recomputes = _num_forward_passes(phase), compute.remat != "none"
    pairs_of_group = phase.hyperparameters.batch_size // mesh.size * mesh.shape["expert"]
    num_visited = num_visited_experts(moe, compute.router_gradient)
    text = text_config(config)
    for what, tower, length in (
        ("patches", config.vision, config.vision.grid**2 + 1),
        ("words", text, text.context_length),
    ):
        num_blocks = tower.num_layers - first_moe_layer(tower.num_layers, moe)
        # Tokens of each block's experts; those of the last feed-forward layer are one of each sequence.
        every, pooled = np.full(num_blocks, length), np.array([length] * (num_blocks - 1) + [1])
        # Of each layer of experts: its tokens; those whose gates no layer of the block has sent before; its
        # outputs' width; whether it is the first of a block.
        layers = [(pooled, pooled, tower.width, not moe.has_attention)]
        if moe.has_attention:
            layers = [
                (every, every, 3 * tower.width, True),
                (every, 0 * every, tower.width, False),
                (pooled, pooled * (pooled < every), tower.width, False),
            ]
        sizes: dict[tuple[str, str], float] = collections.defaultdict(float)
        for tokens, of_new_gates, out_width, is_first in layers:
            tokens, of_new_gates = pairs_of_group * tokens, pairs_of_group * of_new_gates
            x, y = (tokens * width * itemsize for width in (tower.width, out_width))
            # Where the first MoE block is the first to train, its inputs need no gradient.
            to_inputs = slice(0 if shared_train or not is_first else 1, None)
            if compute.dispatch == "capacity":
                own = tokens / mesh.shape["expert"]
                slots = compute.capacity_factor * num_visited * own
                rows = np.minimum(np.ceil(slots / moe.num_experts), own)
                there, back = (moe.num_experts * rows * w * itemsize for w in (tower.width, out_width))
                to_outputs = slice(0 if shared_train or experts_train or not is_first else 1, None)
                size = passes * there.sum() + (passes - recomputes) * back.sum()
                size += there[to_inputs].sum() + back[to_outputs].sum()
                sizes[f"{what} to experts and back", "all-to-all"] += size
                continue
            gates, new_gates = (n.sum() * num_visited * FLOAT_BYTES for n in (tokens, of_new_gates))
            sizes[f"{what}, gates, ids", "all-gather"] += passes * (x.sum() + 2 * new_gates)
            sizes[f"{what}' outputs", "reduce-scatter"] += (passes - recomputes) * y.sum()
            sizes[f"gradients of {what}' outputs", "all-gather"] += y.sum()
            sizes[f"gradients of {what}, gates", "reduce-scatter"] += x[to_inputs].sum() + gates
        for (name, operation), size in sizes.items():
            yield from _on_rings(mesh, ["expert"], name, operation, size)


def transfer_seconds(device: Accelerator, mesh: AbstractMesh, transfer: Transfer) -> float:
    """Returns the seconds that a transfer takes at the vendor's bandwidths, if nothing else is under way.

    Within a domain bytes go over its links. Rings that reach further leave each domain through the network
    ports of all their members in it, an equal part through each, while the others go over the links: the
    slower of the two counts. Neighbours in the order of the mesh share a domain.
    """
    members, inside, left = 1, 1, device.domain
    for axis in reversed(sharding.BATCH_AXES):
        near = min(mesh.shape[axis], left)
        left //= near
        if axis in transfer.axes:
            members, inside = members * mesh.shape[axis], inside * near
    seconds = transfer.num_bytes / (device.link / 2) if inside > 1 else 0.0
    if members > inside:
        seconds = max(seconds, transfer.num_bytes / inside / (device.network / 2))
    return seconds
