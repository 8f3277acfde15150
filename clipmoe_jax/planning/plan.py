"""What a run will take, worked out without its devices: parameters, memory, FLOPs, time, and what travels.

Shapes come from tracing the very functions that train (`eval_shape`) over an abstract mesh, FLOPs from
models/flops.py, what travels from where parameters and batches lie.

Letters: B pairs of a global batch, b pairs of a device's part of it, n devices of a group.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from clipmoe_jax import checkpoints, sharding, trees
from clipmoe_jax.accelerators import ACCELERATORS, Accelerator
from clipmoe_jax.dmu.upcycling import count_active_parameters
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.encoder import METHODS
from clipmoe_jax.models.transformer import RunConfig, first_moe_layer
from clipmoe_jax.planning.trainings import Training, models_of, trainings
from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step

FLOAT_BYTES = 4
# Parameters that are not cast to the type of activations where they are used. (Nor are vectors, mostly.)
USED_IN_FLOAT32 = r".*/moe/router/kernel|text/token_embedding/embedding|text/positional_embedding"
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


class Transfer(NamedTuple):
    """What one device sends in a step over an axis of the mesh, and receives as much of."""

    axes: tuple[str, ...]
    what: str
    operation: str
    num_bytes: float


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
        try:
            sharding.check_batch(mesh, training.phase.batch_size, training.phase.accumulation_steps)
        except ValueError as error:
            raise ValueError(f"{training.name}: {error}") from error
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
    config, run, phase = training.config, training.run, training.phase
    trains = trees.match_rules(training.rules, list(trees.flatten(placed_params(mesh, config))))
    model_flops = flops.forward_backward(config, trains)
    experts = slots_of_token(config, run, mesh)
    computed = flops.forward_backward(config, trains, slots=experts)
    if training.short_length:
        of_text = functools.partial(
            flops.forward_backward, config, trains, training.short_length, towers=["text"]
        )
        model_flops, computed = model_flops + of_text(), computed + of_text(slots=experts)
    again = (run.remat == "full") + (phase.accumulation_steps > 1)
    computed += flops.forward(config, slots=experts) * again + flops.scores(config) * (run.remat == "dots")
    return StepPlan(
        flops=model_flops,
        again=computed / model_flops,
        memory=plan_memory(mesh, training),
        transfers=plan_transfers(mesh, training),
    )


def slots_of_token(config: ClipConfig, run: RunConfig, mesh: AbstractMesh) -> float:
    """How many experts compute on a token. What routing leaves empty of a GPU's blocks, up to a quarter, is
    left out."""
    if config.moe is None:
        return 0
    num_experts, num_selected = config.moe.num_experts, config.moe.num_selected_experts
    if run.dispatch == "capacity":
        return min(num_experts, run.capacity_factor * num_selected)
    if run.grouped_mlp == "fixed_blocks":  # on all slots of the tokens that are gathered
        num_selected = min(num_experts, num_selected * mesh.shape["expert"])
    return num_experts if run.dispatch == "dense" else num_selected


def plan_memory(mesh: AbstractMesh, training: Training) -> Memory:
    """Bytes on each device."""
    config, run, phase = training.config, training.run, training.phase
    params = placed_params(mesh, config)
    trainable, frozen = held_params(mesh, training)
    state = abstract_state(mesh, phase, trainable)
    part = phase.batch_size // phase.accumulation_steps // mesh.size
    kept = sum(kept_bytes(mesh, config, run, params, training.rules, tower) for tower in METHODS)
    if training.short_length:
        of_text = kept_bytes(mesh, config, run, params, training.rules, "text")
        kept += of_text * training.short_length / config.text.context_length
    recomputes = run.remat != "none"
    if recomputes:  # one block at a time is there in full
        whole = dataclasses.replace(run, remat="none")
        kept += max(
            kept_bytes(mesh, config, whole, params, training.rules, tower) / depth
            for tower, depth in (("image", config.vision.num_layers), ("text", config.text.num_layers))
        )
    copied = 0
    for leaf in jax.tree.leaves((trainable, frozen)):
        gathered = mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec and not recomputes else 1
        if leaf.dtype != run.dtype or gathered > 1:
            copied += gathered * device_bytes(leaf) / leaf.dtype.itemsize * jnp.dtype(run.dtype).itemsize
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
def _encoder(config: ClipConfig, run: RunConfig, tower: str) -> Callable[[Any, Any], Any]:
    def encode(params, inputs):
        rngs = {"dropout": jax.random.key(0)}
        return Clip(config, run).apply({"params": params}, inputs, False, method=METHODS[tower], rngs=rngs)

    return encode


def kept_bytes(
    mesh: AbstractMesh,
    config: ClipConfig,
    run: RunConfig,
    params: trees.Params,
    rules: trees.Rules,
    tower: str,
) -> float:
    """Bytes for each pair of a device that a tower's forward pass keeps for the backward pass: what grows of
    the residuals of `jax.vjp` when the batch does."""
    # The spare rows of blocks of a fixed number would count more among few pairs than among many.
    run = dataclasses.replace(_traceable(run), grouped_mlp="ragged_dot")
    trainable, frozen = trees.partition(params, rules)
    encode = _encoder(config, run, tower)

    def residuals(trainable, frozen, inputs):
        return jax.vjp(lambda t: encode(trees.merge(t, frozen), inputs), trainable)[1]

    def total(num_pairs: int) -> int:
        inputs = abstract_batch(mesh, config, num_pairs)[tower]
        with jax.sharding.use_abstract_mesh(mesh):
            leaves = jax.tree.leaves(jax.eval_shape(residuals, trainable, frozen, inputs))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    return (total(2 * mesh.size) - total(mesh.size)) / mesh.size


def plan_transfers(mesh: AbstractMesh, training: Training) -> list[Transfer]:
    """What a device sends in one step on the usual rings: (n - 1) / n of what is gathered or scattered, twice
    that of what is reduced to all."""
    config, run, phase = training.config, training.run, training.phase
    leaves = trees.flatten(placed_params(mesh, config))
    trains = trees.match_rules(training.rules, list(leaves))
    itemsize = jnp.dtype(run.dtype).itemsize
    recomputes = run.remat != "none"
    passes = 1 + recomputes + (phase.accumulation_steps > 1)  # forward ones
    found = []

    def add(axes: Sequence[str], what: str, operation: str, num_bytes: float, times: int) -> None:
        axes = [axis for axis in axes if mesh.shape[axis] > 1]
        n = math.prod(mesh.shape[axis] for axis in axes)
        if n > 1 and num_bytes * times:
            sent = times * num_bytes * (n - 1) / n * (2 if operation == "all-reduce" else 1)
            found.append(Transfer(tuple(axes), what, operation, sent))

    def as_gradient(name: str, num_bytes: float) -> float:
        """Of a float32 leaf's bytes those of its gradient as it travels: as products make it, or where
        microbatches are accumulated their sum, once."""
        in_float32 = leaves[name].ndim == 1 or re.fullmatch(USED_IN_FLOAT32, name)
        if in_float32 or phase.accumulation_steps > 1:
            return num_bytes
        return num_bytes / FLOAT_BYTES * itemsize

    features = phase.batch_size * config.embed_dim * FLOAT_BYTES
    add(sharding.BATCH_AXES, "features of captions", "all-gather", features, 1)
    add(sharding.BATCH_AXES, "their gradient", "all-reduce", features, 1)

    split = {name: leaf for name, leaf in leaves.items() if "fsdp" in leaf.sharding.spec}
    whole = {name: mesh.shape["fsdp"] * device_bytes(leaf) for name, leaf in split.items()}
    gathered = passes * sum(whole.values())
    if run.remat == "dots":  # backward only those that pull a gradient back
        pulls = flops.input_gradients(config, trains)
        gathered -= sum(size for name, size in whole.items() if name.rpartition("/")[0] not in pulls)
    add(["fsdp"], "parameters", "all-gather", gathered / FLOAT_BYTES * itemsize, 1)
    scattered = sum(as_gradient(name, size) for name, size in whole.items() if trains[name])
    add(["fsdp"], "gradients", "reduce-scatter", scattered, 1)
    replicated = collections.Counter()
    for name, leaf in leaves.items():
        if trains[name]:
            spec = leaf.sharding.spec
            axes = tuple(a for a in sharding.BATCH_AXES if mesh.shape[a] > 1 and a not in spec)
            replicated[axes] += as_gradient(name, device_bytes(leaf))
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
            if run.dispatch == "capacity":
                num_experts, own = config.moe.num_experts, tokens / mesh.shape["expert"]
                rows = np.minimum(np.ceil(run.capacity_factor * num_selected * own / num_experts), own)
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


def lower_step(mesh: AbstractMesh, training: Training, platform: str) -> None:
    """Lowers the step for a platform over devices that are not here: whatever is wrong with it raises now."""
    step, arguments = abstract_step(mesh, dataclasses.replace(training, run=_traceable(training.run)))
    with jax.sharding.use_abstract_mesh(mesh):
        step.trace(*arguments).lower(lowering_platforms=(platform,))


def _traceable(run: RunConfig) -> RunConfig:
    """cuDNN's attention cannot be traced without CUDA's libraries; XLA's keeps more."""
    return dataclasses.replace(run, attention="xla") if run.attention == "cudnn" else run


def abstract_step(
    mesh: Mesh | AbstractMesh, training: Training
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The jitted step of a training, and its arguments as shapes with their shardings."""
    trainable, frozen = held_params(mesh, training)
    loss = LossConfig(0.1, 0.01, short_caption_weight=float(training.short_length > 0))
    step = make_train_step(Clip(training.config, training.run), loss, training.phase)
    everywhere = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rate, key = (jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.float32, key.dtype))
    batch = abstract_batch(mesh, training.config, training.phase.batch_size)
    if training.short_length:
        shape = training.phase.batch_size, training.short_length
        batch["short_text"] = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.batch_sharding(mesh))
    return step, (abstract_state(mesh, training.phase, trainable), frozen, batch, rate, key)


def held_params(mesh: Mesh | AbstractMesh, training: Training) -> tuple[dict, dict]:
    """(trainable, frozen) as placed shapes, the frozen ones of the type that `train.loop.fit` gives them."""
    trainable, frozen = trees.partition(placed_params(mesh, training.config), training.rules)
    cast = jax.eval_shape(functools.partial(trees.cast_matrices, dtype=training.frozen_dtype), frozen)
    return trainable, jax.tree.map(lambda leaf, held: leaf.update(dtype=held.dtype), frozen, cast)


def abstract_batch(
    mesh: Mesh | AbstractMesh, config: ClipConfig, num_pairs: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `num_pairs`, split over the mesh."""
    size, where = config.vision.image_size, sharding.batch_sharding(mesh)
    return {
        "image": jax.ShapeDtypeStruct((num_pairs, size, size, 3), np.uint8, sharding=where),
        "text": jax.ShapeDtypeStruct((num_pairs, config.text.context_length), np.int32, sharding=where),
    }


@functools.cache
def placed_params(mesh: Mesh | AbstractMesh, config: ClipConfig) -> dict:
    """A model's parameters as shapes with the shardings that PARAM_RULES give them; traced once."""
    params = checkpoints.abstract_params(config)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.param_shardings(mesh, params),
    )


def device_bytes(tree: Any) -> int:
    """What one device holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
