"""Bytes that a training step holds on each device, from shapes traced over an abstract mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from clipmoe_jax.core import trees
from clipmoe_jax.dmu.phases import PlannedPhase, placed_params
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig
from clipmoe_jax.models.transformer import ComputeConfig
from clipmoe_jax.planning.abstract import (
    FLOAT_BYTES,
    abstract_batch,
    device_bytes,
    held_params,
    text_config,
    traceable,
)
from clipmoe_jax.train.adapters import fold_adapters
from clipmoe_jax.train.step import abstract_state

# Of the similarity matrix the loss holds at once the logits and the gradients through its two log-sums.
SIMILARITY_COPIES = 3


class Memory(NamedTuple):
    """Bytes on one device, at the peak of a step.

    copies: matrices in the type they are multiplied in, and whole where fsdp splits them (with remat XLA
    gathers them again for the backward pass). activations: kept for the backward pass. Both are upper
    bounds: XLA recomputes what is cheap. loss: of the similarity matrix.
    """

    params: float
    optimizer: float
    gradients: float
    copies: float
    activations: float
    loss: float


def plan_memory(mesh: AbstractMesh, phase: PlannedPhase) -> Memory:
    """Returns the bytes that a step of a phase holds on each device."""
    config, compute = phase.architecture, phase.compute
    params = placed_params(mesh, config, phase.adapters)
    trainable, frozen = held_params(mesh, phase)
    state = abstract_state(mesh, phase.hyperparameters, trainable)
    pairs_of_device = (
        phase.hyperparameters.batch_size // phase.hyperparameters.accumulation_steps // mesh.size
    )
    of_pair = sum(kept_bytes(mesh, config, compute, params, phase.rules, tower) for tower in METHODS)
    if phase.short_length:
        of_text = kept_bytes(mesh, config, compute, params, phase.rules, "text")
        of_pair += of_text * phase.short_length / text_config(config).context_length
    recomputes = compute.remat != "none"
    if recomputes:  # one block at a time is there in full
        whole = dataclasses.replace(compute, remat="none")
        of_pair += max(
            kept_bytes(mesh, config, whole, params, phase.rules, tower) / depth
            for tower, depth in (
                ("image", config.vision.num_layers),
                ("text", text_config(config).num_layers),
            )
        )
    copies = 0
    for leaf in jax.tree.leaves((trainable, frozen)):
        gathered = mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec and not recomputes else 1
        if leaf.dtype != compute.dtype or gathered > 1:
            copies += gathered * device_bytes(leaf) / leaf.dtype.itemsize * jnp.dtype(compute.dtype).itemsize
    return Memory(
        params=device_bytes((trainable, frozen)),
        optimizer=device_bytes(state.opt_state),
        gradients=device_bytes(trainable),
        copies=copies,
        activations=of_pair * pairs_of_device,
        loss=similarity_bytes(phase.hyperparameters.batch_size, mesh.size),
    )


def similarity_bytes(batch_size: int, num_devices: int) -> float:
    """Returns what a device holds at once of the similarity matrix of a global batch."""
    return SIMILARITY_COPIES * FLOAT_BYTES * batch_size**2 / num_devices


def kept_bytes(
    mesh: AbstractMesh,
    config: ClipConfig,
    compute: ComputeConfig,
    params: trees.Params,
    rules: trees.Rules,
    tower: str,
) -> float:
    """Returns the bytes that a tower's forward pass keeps for the backward pass, for each pair of a device:
    the residuals of `jax.vjp` of two pairs less those of one.

    tower: a key of METHODS.
    """
    # The spare rows of blocks of a fixed number would count more among few pairs than among many.
    compute = dataclasses.replace(traceable(compute), grouped_mlp="ragged_dot")
    trainable, frozen = trees.partition(params, rules)
    encode = _encoder(config, compute, tower)

    def residuals(trainable, frozen, inputs):
        return jax.vjp(lambda t: encode(fold_adapters(trees.merge(t, frozen)), inputs), trainable)[1]

    def total(num_pairs: int) -> int:
        inputs = abstract_batch(mesh, config, num_pairs)[tower]
        with jax.sharding.use_abstract_mesh(mesh):
            leaves = jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, inputs))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return (total(2 * mesh.size) - total(mesh.size)) / mesh.size


@functools.cache
def _encoder(config: ClipConfig, compute: ComputeConfig, tower: str) -> Callable[[Any, Any], Any]:
    def encode(params, inputs):
        rngs = {"dropout": jax.random.key(0)}
        return Clip(config, compute).apply(
            {"params": params}, inputs, False, method=METHODS[tower], rngs=rngs
        )

    return encode
