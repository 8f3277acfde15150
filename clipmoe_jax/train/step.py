"""One step of training, a pure function of state and batch.

Letters: B pairs of the global batch, A accumulation steps, n devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import Clip, text_mask
from clipmoe_jax.train import losses
from clipmoe_jax.train.phase import PhaseConfig

MAX_LOGIT_SCALE = math.log(100)  # OpenAI CLIP's bound
INPUTS = ("image", "text", "short_text")  # of a batch, what a step takes


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """label_smoothing of the contrastive losses; coefficient and kind of the load balance, and coefficient of
    the routers' z-loss (MoE alone); short_caption_weight of Long-CLIP's second loss, which asks for
    short_text in a batch."""

    label_smoothing: float = 0.0
    balance_coefficient: float = 0.0
    balance: str = "paper"
    z_loss_coefficient: float = 0.0
    short_caption_weight: float = 0.0


class TrainState(flax.struct.PyTreeNode):
    """What a step changes. step () int32: how many steps have been taken."""

    step: jax.Array
    trainable: Any
    opt_state: Any


@functools.cache
def make_train_step(model: Clip, loss: LossConfig, phase: PhaseConfig) -> Callable[..., Any]:
    """The jitted step `(state, frozen, batch, learning_rate, key) -> (state, metrics)`.

    frozen: the params that get neither gradient nor moments. batch: image (B, H, W, 3) uint8, text (B, L)
    int32 or PackedText of n A units, with a short_caption_weight short_text (B, L') int32. learning_rate: ()
    float32. key: the phase's random key; the step folds in its number. metrics: float32 scalars. The state is
    donated. Equal arguments give the same function, so its compilation is shared.
    """
    tx = phase.direction()
    num_selected = model.config.moe.num_selected_experts if model.config.moe else 0

    def encode(trainable, frozen, batch, key):
        params = trees.merge(trainable, frozen)
        apply = functools.partial(model.apply, {"params": params}, deterministic=False)
        outputs = apply(batch["image"], batch["text"], rngs={"dropout": key})
        if loss.short_caption_weight:
            key = jax.random.fold_in(key, 1)
            outputs["short_text_features"], _ = apply(
                batch["short_text"], method="encode_text", rngs={"dropout": key}
            )
        return outputs

    def loss_of(trainable, outputs, frozen, batch):
        params = trees.merge(trainable, frozen)
        found = losses.contrastive_loss(
            outputs["image_features"],
            outputs["text_features"],
            params["logit_scale"],
            loss.label_smoothing,
        )
        if loss.short_caption_weight:
            found["short_caption_loss"] = loss.short_caption_weight * losses.short_caption_loss(
                outputs["image_features"],
                outputs["short_text_features"],
                params["logit_scale"],
                loss.label_smoothing,
            )
        if model.config.moe:
            mask = text_mask(batch["text"], model.config.text.eos_token_id)
            found |= losses.balance_losses(
                outputs, mask, num_selected, loss.balance_coefficient, loss.balance
            )
            if loss.z_loss_coefficient:
                found |= losses.router_z_loss(outputs, mask, loss.z_loss_coefficient)
            found["dropped_slots"] = sum(
                outputs[tower]["dropped_slots"].sum() for tower in ("image_aux", "text_aux")
            )
        return losses.total_loss(found), found

    def gradient(trainable, frozen, batch, key):
        def whole(trainable):
            return loss_of(trainable, encode(trainable, frozen, batch, key), frozen, batch)

        return jax.value_and_grad(whole, has_aux=True)(trainable)

    def accumulated_gradient(trainable, frozen, batch, key):
        """The same gradient in less memory (GradCache, arXiv 2101.06983): encode every microbatch,
        differentiate the loss with respect to all outputs, then encode again and pull that back one
        microbatch at a time."""
        num = phase.accumulation_steps
        micro = jax.tree.map(lambda a: _deal(a, num), batch)
        keys = jax.random.split(key, num)

        def encode_micro(trainable, part):
            return encode(trainable, frozen, part["batch"], part["key"])

        parts = {"batch": micro, "key": keys}
        stacked = jax.lax.map(functools.partial(encode_micro, trainable), parts)
        outputs = jax.tree.map(_collect, stacked)
        found, (direct, cotangents) = jax.value_and_grad(loss_of, (0, 1), has_aux=True, allow_int=True)(
            trainable, outputs, frozen, batch
        )
        cotangents = jax.tree.map(lambda a: _deal(a, num), cotangents)

        def pull_back(total, part_and_cotangent):
            part, cotangent = part_and_cotangent
            _, pullback = jax.vjp(lambda t: encode_micro(t, part), trainable)
            return jax.tree.map(jnp.add, total, pullback(cotangent)[0]), None

        total, _ = jax.lax.scan(pull_back, direct, (parts, cotangents))
        return found, total

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=dict(model.compute.compiler_options))
    def train_step(state, frozen, batch, learning_rate, key):
        key = jax.random.fold_in(key, state.step)
        compute = gradient if phase.accumulation_steps == 1 else accumulated_gradient
        (total, found), grads = compute(state.trainable, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        trainable = optax.apply_updates(state.trainable, updates)
        if "logit_scale" in trainable:
            trainable["logit_scale"] = jnp.minimum(trainable["logit_scale"], MAX_LOGIT_SCALE)
        metrics = {
            "loss": total,
            **found,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate,
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def _deal(array: jax.Array, num: int) -> jax.Array:
    """(B, …) -> (A, B / A, …), pairs or rows of text: a device's, which are those of A microbatches one after
    the other, stay on it."""
    n, rest = sharding.devices_in_use(), array.shape[1:]
    return array.reshape(n, num, -1, *rest).swapaxes(0, 1).reshape(num, -1, *rest)


def _collect(array: jax.Array) -> jax.Array:
    """The inverse of `_deal`."""
    n, (num, _, *rest) = sharding.devices_in_use(), array.shape
    return array.reshape(num, n, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)


def abstract_state(mesh: Mesh | AbstractMesh, phase: PhaseConfig, trainable: Mapping[str, Any]) -> TrainState:
    """The state as ShapeDtypeStructs with their shardings: moments lie where their parameters do."""
    tx, where = phase.direction(), sharding.param_shardings(mesh, trainable)
    replicated = sharding.replicated(mesh)
    opt_state = jax.eval_shape(tx.init, trainable)
    opt_where = optax.tree.map_params(
        tx, lambda _, leaf: leaf, opt_state, where, transform_non_params=lambda _: replicated
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        TrainState(step, trainable, opt_state),
        TrainState(replicated, where, opt_where),
    )


def init_state(mesh: Mesh, phase: PhaseConfig, trainable: Mapping[str, Any]) -> TrainState:
    """The state before the first step, on the mesh: the trainable leaves, which the caller gives away, and
    their moments alone."""
    tx = phase.direction()

    def init(trainable):
        return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, phase, trainable))
    return jax.jit(init, out_shardings=where, donate_argnums=0)(trainable)
