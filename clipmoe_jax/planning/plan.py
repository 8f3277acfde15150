"""Works out what a run will take without its devices: parameters, memory, FLOPs, time, transfers, limits.

Shapes come from tracing the very functions that train (`eval_shape`) over an abstract mesh, FLOPs from
models/flops.py, transfers from transfers.py.
"""

import dataclasses
import functools
from typing import NamedTuple

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.accelerators import ACCELERATORS, Accelerator
from clipmoe_jax.dmu.phases import (
    PlannedPhase,
    architectures_of,
    check_mesh,
    flops_of_training,
    phases_of,
    placed_params,
)
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.transformer import ComputeConfig, num_visited_experts
from clipmoe_jax.planning.abstract import FLOAT_BYTES, device_bytes, lower_step
from clipmoe_jax.planning.limits import Limit, cluster_limit, memory_limit, warmup_limit
from clipmoe_jax.planning.memory import Memory, choose_remat, plan_memory, slots_held
from clipmoe_jax.planning.mfu import Mfu, mfu_of
from clipmoe_jax.planning.transfers import Transfer, plan_transfers


class StepPlan(NamedTuple):
    """One training step.

    flops: of a pair, as in the definition of MFU: nothing is counted twice that is computed again. computed:
    how many times as much the step computes.
    """

    flops: float
    computed: float
    memory: Memory
    transfers: list[Transfer]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A line of the timetable."""

    name: str
    num_pairs: int
    flops: float
    mfu: Mfu | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run; reporting/plan_tables.py formats it."""

    accelerator: Accelerator
    mesh: AbstractMesh
    num_pairs: int
    models: dict[str, tuple[int, int, int]]  # name -> parameters, active ones, those on a device
    steps: dict[str, tuple[PlannedPhase, StepPlan, Mfu]]  # name of the first stage of a kind -> its step
    stages: list[Stage]
    limits: list[Limit]
    bounds: list[str]  # stages that may take fewer steps: small clusters are dropped
    weights: tuple[float, ...]  # data.weights


def make_plan(
    config: ConfigDict,
    accelerator: str,
    num_devices: int,
    num_pairs: int,
    num_base_pairs: int = 0,
    mfu: float | None = None,
) -> Plan:
    """Plans a run of `num_pairs` training pairs on `num_devices` of an accelerator of ACCELERATORS.

    num_base_pairs: to train a base on from scratch; 0 is as many. mfu: the share of the peak that the
    products of the model get, for all stages; None takes `mfu.mfu_of` for each. Raises ValueError for a run
    that would be refused: fewer pairs than a batch, a warm-up that does not fit, batches or parameters that
    do not split over the mesh.
    """
    device = ACCELERATORS[accelerator]
    mesh = sharding.make_abstract_mesh(**config.mesh, num_devices=num_devices)
    phases = phases_of(config, device.platform, num_pairs, num_base_pairs)
    check_mesh(mesh, phases)
    remat = choose_remat(config.compute.remat, mesh, phases, device.memory)
    phases = [phase.with_remat(remat) for phase in phases]
    # The remat that needs least memory, by which the largest batch is worked out.
    leanest = "dots" if config.compute.remat == "auto" else remat
    base, moe = architectures_of(config)
    assert moe.moe is not None
    models = {}
    base_name = f"base, CLIP-MoE of {base.moe.num_experts}" if base.moe else "dense base"
    for name, model in ((base_name, base), (f"CLIP-MoE of {moe.moe.num_experts}", moe)):
        params = placed_params(mesh, model)
        active = count_active_parameters(params, model)
        on_device = device_bytes(params) // FLOAT_BYTES
        models[name] = trees.count_parameters(params), active, on_device

    def add(name: str, pairs: int, flops_of_pair: float, mfu: Mfu) -> None:
        seconds = pairs * flops_of_pair / (device.peak_flops * mfu.share * num_devices)
        stages.append(Stage(name, pairs, flops_of_pair, mfu, seconds))

    steps, stages, limits, bounds = {}, [], [], []
    embedding = flops.forward(base)
    planned: dict[tuple, tuple[StepPlan, Mfu]] = {}
    for phase in phases:
        if phase.is_bound:
            bounds.append(phase.name)
        if phase.step_key not in planned:
            lower_step(mesh, phase, device.platform)
            step = plan_step(mesh, phase)
            of_step = mfu_of(accelerator, phase.architecture, phase.compute, step.computed, mfu)
            planned[phase.step_key], steps[phase.name] = (step, of_step), (phase, step, of_step)
            limits += warmup_limit(phase, num_pairs)
            memory = step.memory if remat == leanest else plan_memory(mesh, phase.with_remat(leanest))
            limits.append(memory_limit(phase, memory, device.memory, num_devices))
        step, of_step = planned[phase.step_key]
        if phase.number:
            limits.append(cluster_limit(config, phase, phase.number, num_pairs))
            of_embedding = mfu_of(accelerator, phase.architecture, phase.compute, 1.0, mfu)
            add(f"embed_{phase.number}", num_pairs, embedding, of_embedding)
        add(phase.name, phase.num_steps * phase.hyperparameters.batch_size, step.flops, of_step)
    return Plan(device, mesh, num_pairs, models, steps, stages, limits, bounds, config.data.weights)


def plan_step(mesh: AbstractMesh, phase: PlannedPhase) -> StepPlan:
    """Returns FLOPs, memory and transfers of one training step."""
    return StepPlan(*step_flops(mesh, phase), plan_memory(mesh, phase), plan_transfers(mesh, phase))


def step_flops(mesh: AbstractMesh, phase: PlannedPhase) -> tuple[float, float]:
    """Returns the FLOPs of a pair and how many times as much is computed, as `StepPlan` has them."""
    config, compute = phase.architecture, phase.compute
    trains = trees.match_rules(phase.rules, list(trees.flatten(placed_params(mesh, config, phase.adapters))))
    of_training = functools.partial(
        flops_of_training,
        *(config, trains, phase.short_length),
        teacher=phase.loss.teacher,
        rehearsed=phase.rehearsed,
    )
    experts = experts_of_token(config, compute, mesh)
    model_flops = of_training(slots=num_visited_experts(config.moe, compute.router_gradient))
    computed = of_training(slots=experts)
    again = (compute.remat == "full") + (phase.hyperparameters.accumulation_steps > 1)
    computed += flops.forward(config, slots=experts) * again
    if compute.remat == "dots" and compute.attention != "cudnn":
        computed += flops.scores(config)
    return model_flops, computed / model_flops


def experts_of_token(config: ClipConfig, compute: ComputeConfig, mesh: AbstractMesh) -> float:
    """Returns how many experts compute on a token. Rows that routing leaves empty in a GPU's blocks, up to a
    quarter, do not count; nor is it known here whether experts' widths fit "tiles"."""
    if compute.dispatch == "ragged" and compute.grouped_mlp != "fixed_blocks":
        return num_visited_experts(config.moe, compute.router_gradient)
    return slots_held(mesh, config, compute)
