"""Losses of CLIP-MoE training. A loss dict's keys that end in `_loss` are summed; the others are reported.

Letters: B batch, L length, M MoE blocks, E experts, K selected experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from clipmoe_jax.models.clip import normalize_features
from clipmoe_jax.models.moe import route

Array = jax.Array


def contrastive_loss(
    image_features: Float[Array, "B embed"],
    text_features: Float[Array, "B embed"],
    logit_scale: Float[Array, ""],
    label_smoothing: float = 0.0,
) -> dict[str, Float[Array, ""]]:
    """Computes symmetric cross-entropy over the global batch's similarities (arXiv 2103.00020, figure 3).

    image_features, text_features (B, embed), any scale; logit_scale () a logarithm. Float32 throughout.
    Returns contrastive_loss and batch_accuracy, the share of images that rank their own caption first.
    """
    return _symmetric(
        normalize_features(image_features), normalize_features(text_features), logit_scale, label_smoothing
    )


def distillation_loss(
    image_features: Float[Array, "B embed"],
    text_features: Float[Array, "B embed"],
    target_images: Float[Array, "B embed"],
    target_texts: Float[Array, "B embed"],
    logit_scale: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """Computes how far a model's similarities are from another's, whose unit features are the targets.

    The Kullback-Leibler divergence of softmax(scale · I Tᵀ) from that of the targets, mean over images and
    over captions. Images and captions need not belong together. All arrays (B, embed) float32, logit_scale ()
    a logarithm, the same for both. Returns distillation_loss, 0 where the similarities are equal.
    """
    scale, precision = jnp.exp(logit_scale), jax.lax.Precision.HIGHEST

    def logits(images: Array, texts: Array) -> Array:
        return scale * jnp.einsum("id,td->it", images, texts, precision=precision)

    found = logits(normalize_features(image_features), normalize_features(text_features))
    target = jax.lax.stop_gradient(logits(target_images, target_texts))

    def divergence(axis: int) -> Array:
        expected = jax.nn.log_softmax(target, axis=axis)
        return jnp.sum(jnp.exp(expected) * (expected - jax.nn.log_softmax(found, axis=axis))) / len(found)

    return {"distillation_loss": (divergence(0) + divergence(1)) / 2}


def feature_distance(
    image_features: Float[Array, "B embed"],
    text_features: Float[Array, "B embed"],
    target_images: Float[Array, "B embed"],
    target_texts: Float[Array, "B embed"],
    logit_scale: Float[Array, ""],
) -> dict[str, Float[Array, ""]]:
    """Computes how far a model's features are from another's, whose unit features are the targets.

    scale · (1 - cosine), mean over images and captions: the distance in the unit of logits. The cosine is
    computed as half the squared difference of unit features: where the two are close, 1 - cosine would be the
    small difference of two numbers near 1. Arguments as of `distillation_loss`. Returns distillation_loss, 0
    where the features are equal.
    """

    def distance(features: Array, targets: Array) -> Array:
        differences = normalize_features(features) - jax.lax.stop_gradient(targets)
        return jnp.mean(jnp.sum(differences**2, axis=-1)) / 2

    both = distance(image_features, target_images) + distance(text_features, target_texts)
    return {"distillation_loss": jnp.exp(logit_scale) * both / 2}


def short_caption_loss(
    image_features: Float[Array, "B embed"],
    short_text_features: Float[Array, "B embed"],
    logit_scale: Float[Array, ""],
    label_smoothing: float = 0.0,
    num_components: int = 32,
) -> Float[Array, ""]:
    """Returns the contrastive loss of short captions with the coarse part of the images.

    From Long-CLIP (arXiv 2403.15378, section 3.3): unit image features are projected onto the batch's
    `num_components` principal components. image_features, short_text_features (B, embed), any scale. Returns
    a scalar. As in Long-CLIP's code the projected features are not of unit length. Unlike there the gradient
    takes the components for constants: their own is infinite where two explain the same variance.
    """
    images = normalize_features(image_features)
    mean = images.mean(axis=0)
    centred, precision = images - mean, jax.lax.Precision.HIGHEST
    covariance = jax.lax.stop_gradient(jnp.einsum("bd,be->de", centred, centred, precision=precision))
    components = jnp.linalg.eigh(covariance)[1][:, -num_components:]  # (embed, components)
    reduced = jnp.einsum("bd,dc->bc", centred, components, precision=precision)
    coarse = mean + jnp.einsum("bc,dc->bd", reduced, components, precision=precision)
    texts = normalize_features(short_text_features)
    return _symmetric(coarse, texts, logit_scale, label_smoothing)["contrastive_loss"]


def _symmetric(images: Array, texts: Array, logit_scale: Array, label_smoothing: float) -> dict[str, Array]:
    """Returns `contrastive_loss` without scaling features to unit length."""
    precision, scale = jax.lax.Precision.HIGHEST, jnp.exp(logit_scale)
    logits = scale * jnp.einsum("id,td->it", images, texts, precision=precision)
    # Only the two log-sums need the (B, B) matrix. The sums of matching logits and of row means (label
    # smoothing spreads mass over all classes, the right one included) follow from the features.
    matching = scale * jnp.mean(jnp.sum(images * texts, axis=-1))
    mean = scale * jnp.dot(images.mean(axis=0), texts.mean(axis=0), precision=precision)
    log_sums = (jnp.mean(jax.nn.logsumexp(logits, axis=1)) + jnp.mean(jax.nn.logsumexp(logits, axis=0))) / 2
    loss = log_sums - (1 - label_smoothing) * matching - label_smoothing * mean
    accuracy = jnp.mean(jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0]))
    return {"contrastive_loss": loss, "batch_accuracy": accuracy}


def load_balance(
    router_logits: Float[Array, "B M L E"],
    num_selected_experts: int,
    mask: Bool[Array, "B L"] | None = None,
) -> Float[Array, ""]:
    """Returns E * sum_e f_e P_e, averaged over blocks (arXiv 2409.19291, eq. 6-9): 1 at perfect balance.

    f_e is the share of routed slots that went to expert e, P_e its mean router probability.
    router_logits (B, M, L, E) float32; mask (B, L) bool is False for padding. Returns a scalar.
    """
    num_experts = router_logits.shape[-1]
    weights = _token_weights(router_logits, mask)
    slots = _slots_per_expert(router_logits, num_selected_experts)
    fraction = jnp.einsum("bmle,bml->me", slots, weights) / num_selected_experts
    probability = jnp.einsum("bmle,bml->me", jax.nn.softmax(router_logits, axis=-1), weights)
    return num_experts * jnp.mean(jnp.sum(fraction * probability, axis=-1))


def released_load_balance(
    router_logits: Float[Array, "B M L E"], num_selected_experts: int
) -> Float[Array, ""]:
    """Returns the released code's balance: all blocks as one, padding counted; K at perfect balance.

    router_logits (B, M, L, E) float32. Returns a scalar.
    """
    num_experts = router_logits.shape[-1]
    slots = _slots_per_expert(router_logits, num_selected_experts)
    fraction = slots.mean(axis=(0, 1, 2))
    probability = jax.nn.softmax(router_logits, axis=-1).mean(axis=(0, 1, 2))
    return num_experts * jnp.sum(fraction * probability)


def balance_losses(
    outputs: dict[str, Any],
    text_mask: Bool[Array, "R L"],
    num_selected_experts: int,
    coefficient: float,
    kind: str = "paper",
) -> dict[str, Float[Array, ""]]:
    """Returns the load balance of both towers for outputs of `Clip.__call__`; empty for a dense model.

    kind "paper": coefficient * (image + text) / 2, padding left out. "released": coefficient *
    (image + text / 2), as the released code weighs them. text_mask (B, L) bool.
    """
    if not outputs["image_aux"]:
        return {}
    image_logits = outputs["image_aux"]["router_logits"]
    text_logits = outputs["text_aux"]["router_logits"]
    if kind == "released":
        image = released_load_balance(image_logits, num_selected_experts)
        text = released_load_balance(text_logits, num_selected_experts)
        total = image + text / 2
    elif kind == "paper":
        image = load_balance(image_logits, num_selected_experts)
        text = load_balance(text_logits, num_selected_experts, text_mask)
        total = (image + text) / 2
    else:
        raise ValueError(f"balance={kind!r} is not known: choose 'paper' or 'released'")
    return {"balance_loss": coefficient * total, "balance_image": image, "balance_text": text}


def router_z(
    router_logits: Float[Array, "B M L E"], mask: Bool[Array, "B L"] | None = None
) -> Float[Array, ""]:
    """Returns the mean of logsumexp(logits)^2 over tokens and blocks (router z-loss, arXiv 2202.08906).

    router_logits (B, M, L, E) float32; mask (B, L) bool is False for padding. Returns a scalar.
    """
    weights = _token_weights(router_logits, mask)
    squares = jax.nn.logsumexp(router_logits, axis=-1) ** 2
    return jnp.mean(jnp.einsum("bml,bml->m", squares, weights))


def router_z_loss(
    outputs: dict[str, Any], text_mask: Bool[Array, "R L"], coefficient: float
) -> dict[str, Float[Array, ""]]:
    """Returns the router z-loss of both towers: coefficient * (image + text) / 2, padding left out.

    outputs: those of `Clip.__call__` of a MoE. text_mask (B, L) bool.
    """
    image = router_z(outputs["image_aux"]["router_logits"])
    text = router_z(outputs["text_aux"]["router_logits"], text_mask)
    return {"router_z_loss": coefficient * (image + text) / 2}


def total_loss(losses: dict[str, Array]) -> Float[Array, ""]:
    """Returns the sum of all entries whose key ends in `_loss`."""
    terms = [value for name, value in losses.items() if name.endswith("_loss")]
    return functools.reduce(jnp.add, terms)


def _slots_per_expert(router_logits: Array, num_selected_experts: int) -> Array:
    """Returns 1 where an expert is selected, 0 elsewhere: (B, M, L, E) logits -> (B, M, L, E) float32."""
    _, expert_ids = route(router_logits, num_selected_experts)
    return jax.nn.one_hot(expert_ids, router_logits.shape[-1]).sum(axis=-2)


def _token_weights(router_logits: Array, mask: Array | None) -> Array:
    """Returns weights that sum to one over the tokens of each block, (B, M, L) float32."""
    batch, blocks, length, _ = router_logits.shape
    if mask is None:
        mask = jnp.ones((batch, length))
    mask = mask.astype(jnp.float32)
    return jnp.broadcast_to((mask / mask.sum())[:, None], (batch, blocks, length))
