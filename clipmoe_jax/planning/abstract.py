"""A training step over devices that need not be here: its arguments as shapes with their shardings."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import Clip, ClipConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig
from clipmoe_jax.planning.trainings import Training
from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step

FLOAT_BYTES = 4


def lower_step(mesh: AbstractMesh, training: Training, platform: str) -> None:
    """Lowers the step for a platform over devices that are not here: whatever is wrong with it raises now."""
    step, arguments = abstract_step(mesh, dataclasses.replace(training, compute=traceable(training.compute)))
    with jax.sharding.use_abstract_mesh(mesh):
        step.trace(*arguments).lower(lowering_platforms=(platform,))


def traceable(compute: ComputeConfig) -> ComputeConfig:
    """cuDNN's attention cannot be traced without CUDA's libraries; XLA's keeps more."""
    return dataclasses.replace(compute, attention="xla") if compute.attention == "cudnn" else compute


def abstract_step(
    mesh: Mesh | AbstractMesh, training: Training
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The jitted step of a training, and its arguments as shapes with their shardings."""
    trainable, frozen = held_params(mesh, training)
    loss = LossConfig(0.1, 0.01, short_caption_weight=float(training.short_length > 0))
    step = make_train_step(Clip(training.config, training.compute), loss, training.phase)
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
    params = abstract_params(config)
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
