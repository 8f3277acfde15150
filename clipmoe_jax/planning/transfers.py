"""What travels between devices in a training step, worked out from where parameters and batches lie, and how
long it takes.

Letters: n devices of a group.
"""

import collections
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.accelerators import Accelerator
from clipmoe_jax.models import flops
from clipmoe_jax.models.transformer import first_moe_layer
from clipmoe_jax.planning.abstract import FLOAT_BYTES, device_bytes, placed_params
from clipmoe_jax.planning.trainings import Training

# Parameters that are not cast to the type of activations where they are used. (Nor are vectors, mostly.)
USED_IN_FLOAT32 = r".*/moe/router/kernel|text/token_embedding/embedding|text/positional_embedding"


class Transfer(NamedTuple):
    """What one device sends in a step over an axis of the mesh, and receives as much of."""

    axes: tuple[str, ...]
    what: str
    operation: str
    num_bytes: float


def plan_transfers(mesh: AbstractMesh, training: Training) -> list[Transfer]:
    """What a device sends in one step on the usual rings: (n - 1) / n of what is gathered or scattered, twice
    that of what is reduced to all."""
    config, compute, phase = training.config, training.compute, training.phase
    leaves = trees.flatten(placed_params(mesh, config))
    trains = trees.match_rules(training.rules, list(leaves))
    itemsize = jnp.dtype(compute.dtype).itemsize
    recomputes = compute.remat != "none"
    microbatches = phase.accumulation_steps
    passes = 1 + recomputes + (microbatches > 1)  # forward ones
    found = []

    def add(axes: Sequence[str], what: str, operation: str, num_bytes: float, times: int) -> None:
        axes = [axis for axis in axes if mesh.shape[axis] > 1]
        n = math.prod(mesh.shape[axis] for axis in axes)
        if n > 1 and num_bytes * times:
            sent = times * num_bytes * (n - 1) / n * (2 if operation == "all-reduce" else 1)
            found.append(Transfer(tuple(axes), what, operation, sent))

    def as_made(name: str, num_bytes: float) -> float:
        """Of a float32 leaf's bytes those of its gradient as products make it."""
        in_float32 = leaves[name].ndim == 1 or re.fullmatch(USED_IN_FLOAT32, name)
        return num_bytes if in_float32 else num_bytes / FLOAT_BYTES * itemsize

    features = phase.batch_size * config.embed_dim * FLOAT_BYTES
    add(sharding.BATCH_AXES, "features of captions", "all-gather", features, 1)
    add(sharding.BATCH_AXES, "their gradient", "all-reduce", features, 1)

    split = {name: leaf for name, leaf in leaves.items() if "fsdp" in leaf.sharding.spec}
    whole = {name: mesh.shape["fsdp"] * device_bytes(leaf) for name, leaf in split.items()}
    gathered = passes * sum(whole.values())
    if compute.remat == "dots":  # backward only those that pull a gradient back
        pulls = flops.input_gradients(config, trains)
        gathered -= sum(size for name, size in whole.items() if name.rpartition("/")[0] not in pulls)
    # Every microbatch gathers parameters and scatters gradients; what is reduced to all is their float32 sum.
    add(["fsdp"], "parameters", "all-gather", gathered / FLOAT_BYTES * itemsize, microbatches)
    scattered = sum(as_made(name, size) for name, size in whole.items() if trains[name])
    add(["fsdp"], "gradients", "reduce-scatter", scattered, microbatches)
    replicated = collections.Counter()
    for name, leaf in leaves.items():
        if trains[name]:
            spec = leaf.sharding.spec
            axes = tuple(a for a in sharding.BATCH_AXES if mesh.shape[a] > 1 and a not in spec)
            size = device_bytes(leaf)
            replicated[axes] += size if microbatches > 1 else as_made(name, size)
    for axes, size in replicated.items():
        add(axes, "gradients", "all-reduce", size, 1)

    if config.moe:
        experts_train = any(yes for name, yes in trains.items() if "/moe/c_fc/" in name)
        shared_train = any(yes for name, yes in trains.items() if "/moe/" not in name)
        group = phase.batch_size // mesh.size * mesh.shape["expert"]  # pairs
        for what, tower, length in (
            ("patches", config.vision, (config.vision.image_size // config.vision.patch_size) ** 2 + 1),
            ("words", config.text, config.text.context_length),
        ):
            blocks = tower.num_layers - first_moe_layer(tower.num_layers, config.moe)
            num_selected = config.moe.num_selected_experts
            tokens = group * np.array([length] * (blocks - 1) + [1])  # of each block; the last computes one
            x = tokens * tower.width * itemsize
            gates = tokens.sum() * num_selected * FLOAT_BYTES
            # Where the first MoE block is the first to train, its inputs need no gradient.
            to_inputs = slice(0 if shared_train else 1, None)
            if compute.dispatch == "capacity":
                num_experts, own = config.moe.num_experts, tokens / mesh.shape["expert"]
                rows = np.minimum(np.ceil(compute.capacity_factor * num_selected * own / num_experts), own)
                buffers = num_experts * rows * tower.width * itemsize
                to_outputs = slice(0 if shared_train or experts_train else 1, None)
                sent = (2 * passes - recomputes) * buffers.sum()
                sent += buffers[to_inputs].sum() + buffers[to_outputs].sum()
                add(["expert"], f"{what} to experts and back", "all-to-all", sent, 1)
                continue
            add(["expert"], f"{what}, gates, ids", "all-gather", x.sum() + 2 * gates, passes)
            add(["expert"], f"{what}' outputs", "reduce-scatter", x.sum(), passes - recomputes)
            add(["expert"], f"gradients of {what}' outputs", "all-gather", x.sum(), 1)
            scattered = x[to_inputs].sum() + gates
            add(["expert"], f"gradients of {what}, gates", "reduce-scatter", scattered, 1)
    return found


def transfer_seconds(device: Accelerator, mesh: AbstractMesh, transfer: Transfer) -> float:
    """How long a transfer takes at the vendor's bandwidths, where nothing else is under way.

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
