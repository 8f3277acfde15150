"""What a run will take, worked out without its devices: parameters, memory, FLOPs, time, and what travels.

Shapes come from tracing the very functions that train (`eval_shape`) over an abstract mesh, FLOPs from
models/flops.py, what travels from transfers.py.

Letters: B pairs of a global batch, b pairs of a device's part of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.accelerators import ACCELERATORS, Accelerator
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.transformer import ComputeConfig
from clipmoe_jax.planning.abstract import (
    FLOAT_BYTES,
    abstract_batch,
    device_bytes,
    held_params,
    lower_step,
    placed_params,
    traceable,
)
from clipmoe_jax.planning.trainings import Training, check_mesh, models_of, trainings
from clipmoe_jax.planning.transfers import Transfer, plan_transfers
from clipmoe_jax.train.step import abstract_state

# What the loss keeps at once of the similarity matrix: logits and the gradients through its two log-sums.
SIMILARITY_COPIES = 3


class Memory(NamedTuple):
    """Bytes on one device, at the peak of a step.

    copies: matrices in the type they are multiplied in, and whole where fsdp splits them (with remat XLA
    gathers them again for the backward pass). activations: kept for the backward pass. Both are upper
    bounds: XLA recomputes what is cheap.
    """

    params: float
    optimizer: float
    gradients: float
    copies: float
    activations: float
    loss: float


class StepPlan(NamedTuple):
    """One training step. flops: of a pair, as in the definition of MFU: nothing is counted twice that is
    computed again. again: how many times as much is computed."""

    flops: float
    again: float
    memory: Memory
    transfers: list[Transfer]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A line of the timetable."""

    name: str
    num_pairs: int
    flops: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of it; format.py makes it readable."""

    accelerator: Accelerator
    mesh: AbstractMesh
    mfu: float
    num_pairs: int
    models: dict[str, tuple[int, int, int]]  # name -> parameters, active ones, those on a device
    steps: dict[str, tuple[Training, StepPlan]]  # name of the first stage of a kind -> its step
    stages: list[Stage]


def make_plan(config: ConfigDict, accelerator: str, num_devices: int, mfu: float, num_pairs: int) -> Plan:
    """Plans a run of `num_pairs` training pairs on `num_devices` of an accelerator of ACCELERATORS.

    mfu: the share of the peak that the products of the model get. Raises ValueError for what could not run:
    batches that do not split over the devices, parameters that do not split over the mesh.
    """
    device = ACCELERATORS[accelerator]
    mesh = sharding.make_abstract_mesh(**config.mesh, num_devices=num_devices)
    dense, moe = models_of(config)
    models = {}
    for name, model in (("dense base", dense), (f"CLIP-MoE of {moe.moe.num_experts}", moe)):
        params = placed_params(mesh, model)
        active = count_active_parameters(params, model)
        here = device_bytes(params) // FLOAT_BYTES
        models[name] = trees.count_parameters(params), active, here

    steps, stages = {}, []

    def seconds(pairs: int, flops_of_pair: float) -> float:
        return pairs * flops_of_pair / (device.peak_flops * mfu * num_devices)

    embedding = flops.forward(dense)
    planned: dict[tuple, StepPlan] = {}
    for training in trainings(config, device.platform, num_pairs):
        check_mesh(mesh, training)
        if training.kind not in planned:
            lower_step(mesh, training, device.platform)
            planned[training.kind] = plan_step(mesh, training)
            steps[training.name] = training, planned[training.kind]
        if training.name.startswith("mcl_"):
            name = training.name.replace("mcl_", "embed_")
            stages.append(Stage(name, num_pairs, embedding, seconds(num_pairs, embedding)))
        pairs, of_pair = training.num_steps * training.phase.batch_size, planned[training.kind].flops
        stages.append(Stage(training.name, pairs, of_pair, seconds(pairs, of_pair)))
    return Plan(device, mesh, mfu, num_pairs, models, steps, stages)


def plan_step(mesh: AbstractMesh, training: Training) -> StepPlan:
    """FLOPs, memory and transfers of one training step."""
    config, compute, phase = training.config, training.compute, training.phase
    trains = trees.match_rules(training.rules, list(trees.flatten(placed_params(mesh, config))))
    model_flops = flops.forward_backward(config, trains)
    experts = slots_of_token(config, compute, mesh)
    computed = flops.forward_backward(config, trains, slots=experts)
    if training.short_length:
        of_text = functools.partial(
            flops.forward_backward, config, trains, training.short_length, towers=["text"]
        )
        model_flops, computed = model_flops + of_text(), computed + of_text(slots=experts)
    again = (compute.remat == "full") + (phase.accumulation_steps > 1)
    computed += flops.forward(config, slots=experts) * again + flops.scores(config) * (
        compute.remat == "dots"
    )
    return StepPlan(
        flops=model_flops,
        again=computed / model_flops,
        memory=plan_memory(mesh, training),
        transfers=plan_transfers(mesh, training),
    )


def slots_of_token(config: ClipConfig, compute: ComputeConfig, mesh: AbstractMesh) -> float:
    """How many experts compute on a token. What routing leaves empty of a GPU's blocks, up to a quarter, is
    left out."""
    if config.moe is None:
        return 0
    num_experts, num_selected = config.moe.num_experts, config.moe.num_selected_experts
    if compute.dispatch == "capacity":
        return min(num_experts, compute.capacity_factor * num_selected)
    if compute.grouped_mlp == "fixed_blocks":  # on all slots of the tokens that are gathered
        num_selected = min(num_experts, num_selected * mesh.shape["expert"])
    return num_experts if compute.dispatch == "dense" else num_selected


def plan_memory(mesh: AbstractMesh, training: Training) -> Memory:
    """Bytes on each device."""
    config, compute, phase = training.config, training.compute, training.phase
    params = placed_params(mesh, config)
    trainable, frozen = held_params(mesh, training)
    state = abstract_state(mesh, phase, trainable)
    part = phase.batch_size // phase.accumulation_steps // mesh.size
    kept = sum(kept_bytes(mesh, config, compute, params, training.rules, tower) for tower in METHODS)
    if training.short_length:
        of_text = kept_bytes(mesh, config, compute, params, training.rules, "text")
        kept += of_text * training.short_length / config.text.context_length
    recomputes = compute.remat != "none"
    if recomputes:  # one block at a time is there in full
        whole = dataclasses.replace(compute, remat="none")
        kept += max(
            kept_bytes(mesh, config, whole, params, training.rules, tower) / depth
            for tower, depth in (("image", config.vision.num_layers), ("text", config.text.num_layers))
        )
    copied = 0
    for leaf in jax.tree.leaves((trainable, frozen)):
        gathered = mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec and not recomputes else 1
        if leaf.dtype != compute.dtype or gathered > 1:
            copied += gathered * device_bytes(leaf) / leaf.dtype.itemsize * jnp.dtype(compute.dtype).itemsize
    return Memory(
        params=device_bytes((trainable, frozen)),
        optimizer=device_bytes(state.opt_state),
        gradients=device_bytes(trainable),
        copies=copied,
        activations=kept * part,
        loss=similarity_bytes(phase.batch_size, mesh.size),
    )


def similarity_bytes(batch_size: int, num_devices: int) -> float:
    """What a device holds at once of the similarity matrix of a global batch."""
    return SIMILARITY_COPIES * FLOAT_BYTES * batch_size**2 / num_devices


@functools.cache
def _encoder(config: ClipConfig, compute: ComputeConfig, tower: str) -> Callable[[Any, Any], Any]:
    def encode(params, inputs):
        rngs = {"dropout": jax.random.key(0)}
        return Clip(config, compute).apply(
            {"params": params}, inputs, False, method=METHODS[tower], rngs=rngs
        )

    return encode


def kept_bytes(
    mesh: AbstractMesh,
    config: ClipConfig,
    compute: ComputeConfig,
    params: trees.Params,
    rules: trees.Rules,
    tower: str,
) -> float:
    """Bytes for each pair of a device that a tower's forward pass keeps for the backward pass: what grows of
    the residuals of `jax.vjp` when the batch does."""
    # The spare rows of blocks of a fixed number would count more among few pairs than among many.
    compute = dataclasses.replace(traceable(compute), grouped_mlp="ragged_dot")
    trainable, frozen = trees.partition(params, rules)
    encode = _encoder(config, compute, tower)

    def residuals(trainable, frozen, inputs):
        return jax.vjp(lambda t: encode(trees.merge(t, frozen), inputs), trainable)[1]

    def total(num_pairs: int) -> int:
        inputs = abstract_batch(mesh, config, num_pairs)[tower]
        with jax.sharding.use_abstract_mesh(mesh):
            leaves = jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, inputs))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return (total(2 * mesh.size) - total(mesh.size)) / mesh.size
