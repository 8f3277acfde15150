"""Bytes that a training step holds on each device, from shapes traced over an abstract mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from clipmoe_jax.core import trees
from clipmoe_jax.dmu.phases import PlannedPhase, placed_params
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig
from clipmoe_jax.models.transformer import ComputeConfig, num_visited_experts
from clipmoe_jax.planning.abstract import (
    FLOAT_BYTES,
    abstract_batch,
    device_bytes,
    held_params,
    text_config,
    traceable,
)
from clipmoe_jax.train.adapters import Adapters, fold_adapters
from clipmoe_jax.train.step import abstract_state

USABLE_MEMORY = 0.9  # of a device's; the rest is left to the program and to fragmentation
# Of the similarity matrix the loss holds at once the logits and the gradients through its two log-sums.
SIMILARITY_COPIES = 3


class Memory(NamedTuple):
    """Bytes on one device, at the peak of a step.

    copies: matrices in the type they are multiplied in, and whole where fsdp splits them (with remat XLA
    gathers them again for the backward pass). activations: kept for the backward pass, an upper bound
    (`kept_bytes`). loss: of the similarity matrix.
    """

    params: float
    optimizer: float
    gradients: float
    copies: float
    activations: float
    loss: float


class Tower(NamedTuple):
    """A tower of a phase's model, in a form that has a hash. name: a key of METHODS."""

    name: str
    mesh: AbstractMesh
    config: ClipConfig
    compute: ComputeConfig
    adapters: Adapters
    rules: tuple[tuple[str, bool], ...]


def plan_memory(mesh: AbstractMesh, phase: PlannedPhase) -> Memory:
    """Returns the bytes that a step of a phase holds on each device."""
    config, compute = phase.architecture, phase.compute
    trainable, frozen = held_params(mesh, phase)
    state = abstract_state(mesh, phase.hyperparameters, trainable)
    pairs_of_device = (
        phase.hyperparameters.batch_size // phase.hyperparameters.accumulation_steps // mesh.size
    )
    towers = [Tower(name, mesh, config, compute, phase.adapters, tuple(phase.rules)) for name in METHODS]
    kept = {tower.name: kept_bytes(tower) for tower in towers}
    of_pair = sum(kept.values())
    if phase.short_length:
        of_pair += kept["text"] * phase.short_length / text_config(config).context_length
    recomputes = compute.remat != "none"
    if recomputes or _keeps_few(compute):  # one block at a time is there in full
        depths = {"image": config.vision.num_layers, "text": text_config(config).num_layers}
        of_pair += max(_residual_bytes(tower, "none") / depths[tower.name] for tower in towers)
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


def choose_remat(remat: str, mesh: AbstractMesh, phases: Iterable[PlannedPhase], usable_bytes: float) -> str:
    """Returns what `compute.remat` stands for: with "auto" the backward pass computes nothing again if every
    phase's step fits into nine tenths of a device's memory so, else all but products ("dots").

    phases: as planned with "none". usable_bytes: of a device, infinite on a CPU.
    """
    if remat != "auto":
        return remat
    kinds = {phase.step_key: phase for phase in phases}.values()
    most = USABLE_MEMORY * usable_bytes
    return "none" if math.isinf(most) or all(sum(plan_memory(mesh, p)) < most for p in kinds) else "dots"


def similarity_bytes(batch_size: int, num_devices: int) -> float:
    """Returns what a device holds at once of the similarity matrix of a global batch."""
    return SIMILARITY_COPIES * FLOAT_BYTES * batch_size**2 / num_devices


def kept_bytes(tower: Tower) -> float:
    """Returns an upper bound of the bytes that a tower keeps for the backward pass, for each pair.

    With remat="none" XLA still fuses norms and activations into what reads them: it keeps what "dots" does,
    and the inputs of the layers that train. So where cuDNN attends; elsewhere scores are kept too, and all
    residuals count.
    """
    if not _keeps_few(tower.compute):
        return _residual_bytes(tower, tower.compute.remat)
    return _residual_bytes(tower, "dots") + _input_bytes(tower)


def _keeps_few(compute: ComputeConfig) -> bool:
    """Whether remat="none" is known to keep less than all residuals."""
    return compute.remat == "none" and compute.attention == "cudnn"


def _input_bytes(tower: Tower) -> float:
    """The bytes of what the kernels that train are multiplied by, for one pair."""
    _, mesh, config, compute, adapters, rules = tower
    leaves = trees.flatten(placed_params(mesh, config, adapters))
    trained = flops.trained_layers(trees.match_rules(rules, list(leaves)))
    slots, num_bytes = slots_held(mesh, config, compute), 0.0
    for layer in flops.layers(config, {"image": "visual", "text": "text"}[tower.name], slots=slots):
        if layer.name in trained and (kernel := leaves.get(f"{layer.name}/kernel")) is not None:
            itemsize = FLOAT_BYTES if layer.name.endswith("/router") else jnp.dtype(compute.dtype).itemsize
            num_bytes += layer.flops / (2 * kernel.shape[-1]) * itemsize
    return num_bytes


def slots_held(mesh: AbstractMesh, config: ClipConfig, compute: ComputeConfig) -> float:
    """Returns how many rows experts have room for, for each token of a device."""
    if config.moe is None:
        return 0
    num_experts = config.moe.num_experts
    num_visited = num_visited_experts(config.moe, compute.router_gradient)
    if compute.dispatch == "dense":
        return num_experts
    if compute.dispatch == "capacity":
        return min(num_experts, compute.capacity_factor * num_visited)
    return min(num_experts, num_visited * mesh.shape["expert"])  # tokens are gathered, and nothing is dropped


@functools.cache
def _residual_bytes(tower: Tower, remat: str) -> float:
    """The bytes of the residuals of `jax.vjp` of a tower for each pair of a device: those of two pairs less
    those of one."""
    name, mesh, config, compute, adapters, rules = tower
    # The spare rows of blocks of a fixed number would count more among few pairs than among many.
    compute = dataclasses.replace(traceable(compute), grouped_mlp="ragged_dot", remat=remat)
    trainable, frozen = trees.partition(placed_params(mesh, config, adapters), rules)
    encode = _encoder(config, compute, name)

    def residuals(trainable, frozen, inputs):
        return jax.vjp(lambda t: encode(fold_adapters(trees.merge(t, frozen)), inputs), trainable)[1]

    def total(num_pairs: int) -> int:
        inputs = abstract_batch(mesh, config, num_pairs)[name]
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
