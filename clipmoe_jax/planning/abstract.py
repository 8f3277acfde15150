"""A training step over an abstract mesh: its arguments as shapes with their shardings."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.dmu.phases import PlannedPhase, placed_params
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig
from clipmoe_jax.models.transformer import ComputeConfig
from clipmoe_jax.train.step import make_train_step
from clipmoe_jax.train.step_programs import abstract_arguments, abstract_held

FLOAT_BYTES = 4


def lower_step(mesh: AbstractMesh, phase: PlannedPhase, platform: str) -> None:
    """Lowers the step for a platform (`sharding.platform`) over devices that are not here: whatever is wrong
    with it raises now."""
    step, arguments = abstract_step(mesh, dataclasses.replace(phase, compute=traceable(phase.compute)))
    with jax.sharding.use_abstract_mesh(mesh):
        step.trace(*arguments).lower(lowering_platforms=("cuda" if platform == "hopper" else platform,))


def traceable(compute: ComputeConfig) -> ComputeConfig:
    """Returns how a model is computed where its step is only traced. cuDNN's attention needs CUDA's libraries
    for that: the one in chunks stands for it, which keeps no scores either. The kernels for Hopper GPUs take
    longer to lower than all the rest: XLA's products of groups stand for them."""
    attention = "chunked" if compute.attention == "cudnn" else compute.attention
    grouped_mlp = "ragged_dot" if compute.grouped_mlp == "tiles" else compute.grouped_mlp
    return dataclasses.replace(compute, attention=attention, grouped_mlp=grouped_mlp)


def abstract_step(
    mesh: Mesh | AbstractMesh, phase: PlannedPhase
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """Returns the jitted step of a phase, and its arguments as shapes with their shardings."""
    trainable, frozen = held_params(mesh, phase)
    # A Linen module has a hash, which its type does not tell.
    step = make_train_step(Clip(phase.architecture, phase.compute), phase.loss, phase.hyperparameters)
    batch = abstract_batch(mesh, phase.architecture, phase.hyperparameters.batch_size)
    if phase.short_length:
        shape = phase.hyperparameters.batch_size, phase.short_length
        batch["short_text"] = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding.batch_sharding(mesh))
    return step, abstract_arguments(mesh, phase.hyperparameters, trainable, frozen, batch)


def held_params(mesh: Mesh | AbstractMesh, phase: PlannedPhase) -> tuple[dict, dict]:
    """Returns (trainable, frozen) as placed shapes, the frozen ones of the type that `train.loop.fit` gives
    them."""
    params = placed_params(mesh, phase.architecture, phase.adapters)
    trainable, frozen = trees.partition(params, phase.rules)
    teacher = phase.loss.teacher
    of_teacher = placed_params(mesh, teacher) if isinstance(teacher, ClipConfig) else None
    return trainable, abstract_held(frozen, of_teacher, phase.frozen_dtype)


def abstract_batch(
    mesh: Mesh | AbstractMesh, config: ClipConfig, num_pairs: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch of `num_pairs` as shapes, split over the mesh."""
    size, split = config.vision.image_size, sharding.batch_sharding(mesh)
    length = text_config(config).context_length
    return {
        "image": jax.ShapeDtypeStruct((num_pairs, size, size, 3), np.uint8, sharding=split),
        "text": jax.ShapeDtypeStruct((num_pairs, length), np.int32, sharding=split),
    }


def text_config(config: ClipConfig) -> TextConfig:
    """Returns the text tower's sizes; every model that is trained has one."""
    assert config.text is not None
    return config.text


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of placed shapes."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
