"""What a run will take, worked out without its devices: parameters, memory, FLOPs, time, and what travels.

Shapes come from tracing the very functions that train (`eval_shape`) over an abstract mesh, FLOPs from
models/flops.py, what travels from where parameters and batches lie.

Letters: B pairs of a global batch, b pairs of a device's part of it, n devices of a group.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from clipmoe_jax import checkpoints, sharding, trees
from clipmoe_jax import config as configs
from clipmoe_jax.accelerators import ACCELERATORS, Accelerator
from clipmoe_jax.data.loader import SHORT_LENGTH
from clipmoe_jax.dmu.run import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS
from clipmoe_jax.dmu.upcycling import count_active_parameters
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.encoder import METHODS
from clipmoe_jax.models.transformer import RunConfig, first_moe_layer
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step

FLOAT_BYTES = 4
# What the loss keeps at once of the similarity matrix: logits and the gradients through its two log-sums.
SIMILARITY_COPIES = 3


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage that trains: the model it trains, by which rules, for how long. short_length: of the short
    captions that it sees beside the long ones."""

    name: str
    config: ClipConfig
    run: RunConfig
    rules: trees.Rules
    phase: PhaseConfig
    num_steps: int
    short_length: int = 0

    @property
    def kind(self) -> tuple:
        """Stages of one kind compile to one step."""
        phase = dataclasses.replace(self.phase, num_steps=0)
        return self.config, self.run, tuple(self.rules), phase, self.short_length


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

    axes: str
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
    """All of it; `format_plan` makes it readable."""

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


def models_of(config: ConfigDict) -> tuple[ClipConfig, ClipConfig]:
    """The dense base and the CLIP-MoE."""
    dense = configs.architecture(config)
    return dense, dataclasses.replace(dense, moe=configs.moe_config(config))


def trainings(config: ConfigDict, platform: str, num_pairs: int) -> Iterator[Training]:
    """The stages of a config that train, in order."""
    dense, moe = models_of(config)
    mcl, router = configs.phase_config(config.mcl), configs.phase_config(config.router)
    run = configs.run_config(config, platform)
    routing = configs.run_config(config, platform, training_routers=True)
    mcl_steps = mcl.length(num_pairs // mcl.batch_size)
    router_steps = router.length(num_pairs // router.batch_size)
    if not config.base.checkpoint and config.data.digit_scenes:
        phase = configs.phase_config(config.base.train)
        steps = phase.length(num_pairs // phase.batch_size)
        yield Training("base", dense, run, TRAIN_EVERYTHING, phase, steps)
    num_stages, of_long_clip = config.mcl.num_stages, min(SHORT_LENGTH, dense.text.context_length)
    short = of_long_clip if config.loss.short_caption_weight else 0
    for stage in range(1, num_stages + 1):
        yield Training(f"mcl_{stage}", dense, run, TRAIN_FFN, mcl, mcl_steps, short)
    yield Training("router", moe, routing, TRAIN_ROUTERS, router, router_steps, short)
    same_pairs = math.ceil(num_stages * mcl_steps + router_steps * router.batch_size / mcl.batch_size)
    pair = moe_of_two(moe)
    for name, *rest in (
        ("direct_ft", dense, run, TRAIN_FFN, mcl, mcl_steps, short),
        ("direct_ft_same_pairs", dense, run, TRAIN_FFN, mcl, same_pairs, short),
        ("full_ft", dense, run, TRAIN_EVERYTHING, mcl, mcl_steps, short),
        ("long_clip", dense, run, TRAIN_EVERYTHING, mcl, mcl_steps, of_long_clip),
        ("base_ft_moe", pair, routing, TRAIN_ROUTERS, router, router_steps, short),
        ("sparse_upcycling", moe, routing, TRAIN_MOE, mcl, mcl_steps, short),
        ("drop_upcycling", moe, routing, TRAIN_MOE, mcl, mcl_steps, short),
        ("clip_up", moe, routing, TRAIN_EVERYTHING, mcl, mcl_steps, short),
    ):
        if name in config.baselines:
            yield Training(name, *rest)


def moe_of_two(config: ClipConfig) -> ClipConfig:
    """The MoE of the base and one fine-tuned model."""
    moe = config.moe
    two = dataclasses.replace(moe, num_experts=2, num_selected_experts=min(2, moe.num_selected_experts))
    return dataclasses.replace(config, moe=two)


def plan_step(mesh: AbstractMesh, training: Training) -> StepPlan:
    """FLOPs, memory and transfers of one training step."""
    config, run, phase = training.config, training.run, training.phase
    trains = trees.match_rules(training.rules, list(trees.flatten(placed_params(mesh, config))))
    model_flops = flops.forward_backward(config, trains)
    experts = slots_of_token(config, run)
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


def slots_of_token(config: ClipConfig, run: RunConfig) -> float:
    """How many experts compute on a token."""
    if config.moe is None:
        return 0
    num_experts, num_selected = config.moe.num_experts, config.moe.num_selected_experts
    if run.dispatch == "capacity":
        return min(num_experts, run.capacity_factor * num_selected)
    return num_experts if run.dispatch == "dense" else num_selected


def plan_memory(mesh: AbstractMesh, training: Training) -> Memory:
    """Bytes on each device."""
    config, run, phase = training.config, training.run, training.phase
    params = placed_params(mesh, config)
    trainable, frozen = trees.partition(params, training.rules)
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
    for leaf in jax.tree.leaves(params):
        gathered = mesh.shape["fsdp"] if "fsdp" in leaf.sharding.spec and not recomputes else 1
        if leaf.ndim >= 2 and (run.dtype != "float32" or gathered > 1):
            copied += gathered * device_bytes(leaf) / FLOAT_BYTES * jnp.dtype(run.dtype).itemsize
    return Memory(
        params=device_bytes(trainable) + device_bytes(frozen),
        optimizer=device_bytes(state.opt_state),
        gradients=device_bytes(trainable),
        copies=copied,
        activations=kept * part,
        loss=SIMILARITY_COPIES * FLOAT_BYTES * phase.batch_size**2 / mesh.size,
    )


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
    run = dataclasses.replace(run, attention="xla")  # cuDNN's cannot be traced without a GPU, and keeps less
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
            found.append(Transfer(" × ".join(axes), what, operation, sent))

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
    scattered = sum(size for name, size in whole.items() if trains[name])
    add(["fsdp"], "gradients", "reduce-scatter", scattered, 1)
    replicated = collections.Counter()
    for name, leaf in leaves.items():
        if trains[name]:
            axes = tuple(axis for axis in sharding.BATCH_AXES if axis not in leaf.sharding.spec)
            replicated[axes] += device_bytes(leaf)
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
            x = group * length * tower.width * itemsize
            gates = group * length * num_selected * FLOAT_BYTES
            # Where the first MoE block is the first to train, its inputs need no gradient.
            to_inputs = blocks if shared_train else blocks - 1
            if run.dispatch == "capacity":
                buffers = run.capacity_factor * num_selected * x / mesh.shape["expert"]
                backward = to_inputs + (blocks if experts_train or shared_train else blocks - 1)
                times = blocks * (2 * passes - recomputes) + backward
                add(["expert"], f"{what} to experts and back", "all-to-all", times * buffers, 1)
                continue
            add(["expert"], f"{what}, gates, ids", "all-gather", blocks * (x + 2 * gates), passes)
            add(["expert"], f"{what}' outputs", "reduce-scatter", blocks * x, passes - recomputes)
            add(["expert"], f"gradients of {what}' outputs", "all-gather", blocks * x, 1)
            scattered = to_inputs * x + blocks * gates
            add(["expert"], f"gradients of {what}, gates", "reduce-scatter", scattered, 1)
    return found


def lower_step(mesh: AbstractMesh, training: Training, platform: str) -> None:
    """Lowers the step for a platform over devices that are not here: whatever is wrong with it raises now."""
    run = dataclasses.replace(training.run, attention="xla")  # cuDNN's asks for a GPU
    params = placed_params(mesh, training.config)
    trainable, frozen = trees.partition(params, training.rules)
    loss = LossConfig(0.1, 0.01, short_caption_weight=float(training.short_length > 0))
    step = make_train_step(Clip(training.config, run), loss, training.phase)
    everywhere = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rate, key = (jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.float32, key.dtype))
    batch = abstract_batch(mesh, training.config, training.phase.batch_size)
    if training.short_length:
        shape = training.phase.batch_size, training.short_length
        batch["short_text"] = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.batch_sharding(mesh))
    state = abstract_state(mesh, training.phase, trainable)
    with jax.sharding.use_abstract_mesh(mesh):
        step.trace(state, frozen, batch, rate, key).lower(lowering_platforms=(platform,))


def abstract_batch(mesh: AbstractMesh, config: ClipConfig, num_pairs: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of `num_pairs`, split over the mesh."""
    size, where = config.vision.image_size, sharding.batch_sharding(mesh)
    return {
        "image": jax.ShapeDtypeStruct((num_pairs, size, size, 3), np.uint8, sharding=where),
        "text": jax.ShapeDtypeStruct((num_pairs, config.text.context_length), np.int32, sharding=where),
    }


@functools.cache
def placed_params(mesh: AbstractMesh, config: ClipConfig) -> dict:
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


def format_plan(plan: Plan) -> str:
    """Tables for a terminal. GB are 10^9 bytes."""
    device, mesh, num_devices = plan.accelerator, plan.mesh, plan.mesh.size
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{num_devices} × {device.name}: {device.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{device.memory / 1e9:.0f} GB each; mesh {axes}; {plan.num_pairs:,} pairs; MFU {plan.mfu:.2f}",
        "",
        f"{'parameters':<26}{'total':>12}{'active':>12}{'per device':>12}",
    ]
    for name, counts in plan.models.items():
        lines.append(f"{name:<26}" + "".join(f"{count / 1e6:>10.1f} M" for count in counts))

    lines += ["", f"{'stage':<26}{'pairs':>14}{'GFLOP/pair':>12}{'time':>12}{'device-hours':>14}"]
    for stage in [*plan.stages, _total(plan.stages)]:
        of_pair = f"{stage.flops / 1e9:.1f}" if stage.flops else ""
        hours = stage.seconds * num_devices / 3600
        lines.append(
            f"{stage.name:<26}{stage.num_pairs:>14,}{of_pair:>12}{_time(stage.seconds):>12}{hours:>14.2f}"
        )

    fields = Memory._fields
    lines += ["", f"{'GB on each device':<26}" + "".join(f"{name:>13}" for name in fields) + f"{'sum':>9}"]
    for name, (_, step) in plan.steps.items():
        row = "".join(f"{size / 1e9:>13.2f}" for size in step.memory)
        total = sum(step.memory)
        fits = "" if total < 0.9 * device.memory else f"  does not fit into {device.memory / 1e9:.0f} GB"
        lines.append(f"{name:<26}{row}{total / 1e9:>9.2f}{fits}")

    for name, (training, step) in plan.steps.items():
        pairs = training.phase.batch_size
        milliseconds = 1e3 * pairs * step.flops / (device.peak_flops * plan.mfu * num_devices)
        lines += [
            "",
            f"a step of {name}: {pairs} pairs, {pairs / num_devices:g} a device, {milliseconds:.1f} ms "
            f"(computed {step.again:.2f} times); each device sends",
        ]
        for transfer in step.transfers:
            milliseconds = 1e3 * transfer.num_bytes / (device.link / 2)
            lines.append(
                f"  {transfer.axes:<22}{transfer.operation:<16}{transfer.what:<34}"
                f"{transfer.num_bytes / 1e6:>10.2f} MB{milliseconds:>9.2f} ms"
            )
        if not step.transfers:
            lines.append("  nothing")
    lines += [
        "",
        "Time is at the stated MFU, without k-means (on the CPU of process 0), compilation and reading.",
        "Activations are an upper bound. Transfers are at the vendor's bandwidth; XLA runs them under the",
        "computation where it can.",
    ]
    return "\n".join(lines)


def _total(stages: Sequence[Stage]) -> Stage:
    return Stage("all", sum(s.num_pairs for s in stages), 0, sum(s.seconds for s in stages))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
