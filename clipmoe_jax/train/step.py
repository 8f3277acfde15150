"""One optimizer step, a pure function of state and batch.

Letters: B pairs of the global batch, L length, A accumulation steps, n devices.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Key, PyTree

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import Clip, ClipConfig, normalize_features, text_mask
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.train import losses
from clipmoe_jax.train.adapters import fold_adapters
from clipmoe_jax.train.phase import PhaseConfig

MAX_LOGIT_SCALE = math.log(100)  # OpenAI CLIP's bound
# The arrays of a batch that a step takes.
INPUTS = ("image", "text", "short_text", "target_images", "target_texts")
TEACHER = "teacher"  # the key, among the frozen params, of a teacher that is a model of its own


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Coefficients of the losses.

    label_smoothing: of the contrastive losses. balance, balance_coefficient, z_loss_coefficient: kind and
    weight of the load balance and weight of the router z-loss, which only a MoE has. short_caption_weight: of
    Long-CLIP's second loss, which takes short_text from the batch. imitates: instead of the contrastive loss,
    the distance from another model's "similarities" or "features". Its features are target_images and
    target_texts of the batch; with a teacher those of that expert, as the dense model that it came from, or
    of a model of this architecture, whose params are `TEACHER` among the frozen ones.
    """

    label_smoothing: float = 0.0
    balance_coefficient: float = 0.0
    balance: str = "paper"
    z_loss_coefficient: float = 0.0
    short_caption_weight: float = 0.0
    imitates: Literal["", "similarities", "features"] = ""
    teacher: int | ClipConfig | None = None


class TrainState(flax.struct.PyTreeNode):
    """The state that a step updates. step () int32: how many steps have been taken."""

    step: Any
    trainable: Any
    opt_state: Any


def make_train_step(model: Clip, loss: LossConfig, phase: PhaseConfig) -> jax.stages.Wrapped:
    """Returns the jitted step `(state, frozen, batch, learning_rate, key) -> (state, metrics)`.

    frozen: the params that get neither gradient nor moments, those of a teacher among them. batch: image
    (B, H, W, 3) uint8, text (B, L) int32 or PackedText of n A shards, with a short_caption_weight short_text
    (B, L') int32, and to distill target_images and target_texts (B, embed) float32.
    learning_rate: () float32. key: the phase's random key, into which the step folds its number. metrics:
    float32 scalars. The state is donated. Arguments that are equal but for schedule, length and
    batch size return the same function, which compiles once for each batch size.
    """
    return _make_train_step(model, loss, phase.without_schedule())


@functools.cache
def _make_train_step(model: Clip, loss: LossConfig, phase: PhaseConfig) -> jax.stages.Wrapped:
    tx, moe = phase.direction(), model.config.moe
    eos_token_id = model.config.text.eos_token_id if model.config.text else None

    def encode(trainable, frozen, batch, key):
        params = fold_adapters(trees.merge(trainable, frozen))
        apply = functools.partial(model.apply, {"params": params}, deterministic=False)
        outputs = cast(dict[str, Any], apply(batch["image"], batch["text"], rngs={"dropout": key}))
        if loss.short_caption_weight:
            key = jax.random.fold_in(key, 1)
            outputs["short_text_features"], _ = apply(
                batch["short_text"], method="encode_text", rngs={"dropout": key}
            )
        if loss.teacher is not None:
            outputs |= teach(params, batch, loss.teacher)
        return outputs

    def teach(params, batch, teacher):
        """Returns the teacher's unit features of a batch, as outputs of the step."""
        if isinstance(teacher, ClipConfig):
            config, of_teacher = teacher, params[TEACHER]
        else:
            config, of_teacher = expert_as_dense(params, model.config, teacher)
        features = Clip(config, model.compute).apply({"params": of_teacher}, batch["image"], batch["text"])
        features = jax.lax.stop_gradient(cast(dict[str, Any], features))
        names = {"target_images": "image_features", "target_texts": "text_features"}
        return {target: normalize_features(features[name]) for target, name in names.items()}

    def loss_of(trainable, outputs, frozen, batch):
        params = trees.merge(trainable, frozen)
        features = outputs["image_features"], outputs["text_features"]
        if loss.imitates:
            source = batch if loss.teacher is None else outputs
            targets = source["target_images"], source["target_texts"]
            imitate = {"similarities": losses.distillation_loss, "features": losses.feature_distance}
            terms = imitate[loss.imitates](*features, *targets, params["logit_scale"])
            if loss.teacher is not None:  # of pairs: how well they match is told all the same
                matched = losses.contrastive_loss(*features, params["logit_scale"])
                terms["batch_accuracy"] = matched["batch_accuracy"]
        else:
            terms = losses.contrastive_loss(*features, params["logit_scale"], loss.label_smoothing)
        if loss.short_caption_weight:
            terms["short_caption_loss"] = loss.short_caption_weight * losses.short_caption_loss(
                outputs["image_features"],
                outputs["short_text_features"],
                params["logit_scale"],
                loss.label_smoothing,
            )
        if moe is not None:
            mask = text_mask(batch["text"], eos_token_id)
            terms |= losses.balance_losses(
                outputs, mask, moe.num_selected_experts, loss.balance_coefficient, loss.balance
            )
            if loss.z_loss_coefficient:
                terms |= losses.router_z_loss(outputs, mask, loss.z_loss_coefficient)
            image_aux, text_aux = outputs["image_aux"], outputs["text_aux"]
            terms["dropped_slots"] = image_aux["dropped_slots"].sum() + text_aux["dropped_slots"].sum()
        return losses.total_loss(terms), terms

    def gradient(trainable, frozen, batch, key):
        def encode_and_loss(trainable):
            return loss_of(trainable, encode(trainable, frozen, batch, key), frozen, batch)

        return jax.value_and_grad(encode_and_loss, has_aux=True)(trainable)

    def accumulated_gradient(trainable, frozen, batch, key):
        """Computes the same gradient in less memory (GradCache, arXiv 2101.06983).

        Encodes every microbatch, differentiates the loss with respect to all outputs, then encodes again and
        pulls that gradient back one microbatch at a time.
        """
        num = phase.accumulation_steps
        microbatches = jax.tree.map(lambda a: _deal(a, num), batch)
        keys = jax.random.split(key, num)

        def encode_microbatch(trainable, part):
            return encode(trainable, frozen, part["batch"], part["key"])

        parts = {"batch": microbatches, "key": keys}
        stacked = jax.lax.map(functools.partial(encode_microbatch, trainable), parts)
        outputs = jax.tree.map(_collect, stacked)
        differentiate = jax.value_and_grad(loss_of, (0, 1), has_aux=True, allow_int=True)
        loss_and_terms, (direct, cotangents) = differentiate(trainable, outputs, frozen, batch)
        cotangents = jax.tree.map(lambda a: _deal(a, num), cotangents)

        def pull_back(total, part_and_cotangent):
            part, cotangent = part_and_cotangent
            _, pullback = jax.vjp(lambda t: encode_microbatch(t, part), trainable)
            return jax.tree.map(jnp.add, total, pullback(cotangent)[0]), None

        total, _ = jax.lax.scan(pull_back, direct, (parts, cotangents))
        return loss_and_terms, total

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=dict(model.compute.compiler_options))
    def train_step(
        state: TrainState,
        frozen: PyTree,
        batch: dict[str, PyTree],
        learning_rate: Float[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        compute = gradient if phase.accumulation_steps == 1 else accumulated_gradient
        (total, terms), grads = compute(state.trainable, frozen, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        trainable = cast(dict[str, Any], optax.apply_updates(state.trainable, updates))
        if "logit_scale" in trainable:
            trainable["logit_scale"] = jnp.minimum(trainable["logit_scale"], MAX_LOGIT_SCALE)
        metrics = {
            "loss": total,
            **terms,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate,
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def _deal(array: jax.Array, num: int) -> jax.Array:
    """Deals pairs, or rows of text, to microbatches: (B, …) -> (A, B / A, …).

    A device has the rows of A microbatches one after the other, and keeps them.
    """
    n, rest = sharding.devices_in_use(), array.shape[1:]
    return array.reshape(n, num, -1, *rest).swapaxes(0, 1).reshape(num, -1, *rest)


def _collect(array: jax.Array) -> jax.Array:
    """Undoes `_deal`: (A, B / A, …) -> (B, …)."""
    n, (num, _, *rest) = sharding.devices_in_use(), array.shape
    return array.reshape(num, n, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)


def abstract_state(mesh: Mesh | AbstractMesh, phase: PhaseConfig, trainable: Mapping[str, Any]) -> TrainState:
    """Returns the state as ShapeDtypeStructs with shardings; moments lie where their parameters do."""
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
    """Returns the state before the first step, placed on the mesh. The trainable leaves are donated."""
    tx = phase.direction()

    def init(trainable):
        return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable))

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, phase, trainable))
    return jax.jit(init, out_shardings=where, donate_argnums=0)(trainable)
