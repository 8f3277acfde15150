"""Differences between the experts of a CLIP-MoE: their outputs on the same tokens, and their weights.

Letters: B batch, L length, N = B*L tokens, D width, E experts, Q = E(E+1)/2 pairs of experts e <= f.

CKA is linear and unbiased: the HSIC estimator of Song et al. (JMLR 13, 2012, eq. 5) in the CKA of Kornblith
et al. (arXiv 1905.00414). The plain estimate grows by up to D / N for unrelated outputs, so few tokens or a
wide tower would make experts look alike. This one has no such bias, so towers and data sets can be compared;
it may come out a little below 0.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import rel_entr
from jax.sharding import Mesh

from clipmoe_jax.analysis.routing import INPUTS, moe_layers, placed_inputs, token_mask
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig
from clipmoe_jax.models.feed_forward import ACTIVATIONS, FeedForward, Weights

Array = jax.Array


class OutputSums(NamedTuple):
    """Sums over tokens of the experts' outputs y (N, E, D), shifted by a constant, and s = |y|^2 (N, E).

    y (E, D): of y. s (E,): of s. sy (E, E, D): of s_e y_f. ss (E, E): of s_e s_f. yy (Q, D, D): of the outer
    products of y_e and y_f. divergence (Q,): Jensen-Shannon, in bits. num_tokens (). Float32 on the device,
    float64 on the host.
    """

    y: Any
    s: Any
    sy: Any
    ss: Any
    yy: Any
    divergence: Any
    num_tokens: Any


def expert_difference(
    model: Clip, params: trees.Params, batches: Iterable[Mapping[str, np.ndarray]], mesh: Mesh
) -> dict[str, Any]:
    """Returns {"visual": tables, "text": tables, "diversity": float}, which compares the experts' outputs.

    Tables: layers, and for each layer cka (E, E), js_divergence (E, E) in bits (`output_sums`) and
    weight_cosine (E-1, E-1). Each expert computes, in float32, on all tokens that reach its block, routed to
    it or not; batches as for `routing.route_by_model`. Takes 8 D^2 Q bytes of host memory per MoE layer.

    diversity: 1 - CKA averaged over all pairs of two experts, the MoE layers of a tower, and the two towers;
    0 for experts that compute the same up to rotation and scale, about 1 for unrelated ones.

    Raises ValueError for a model with fewer than two experts.
    """
    layers, sums, shifts = moe_layers(model.config), {}, {}
    num_experts = model.config.moe.num_experts if model.config.moe else 0
    if num_experts < 2:
        raise ValueError(
            f"expert_difference: num_experts={num_experts} leaves nothing to compare; it takes two or more"
        )
    for tower, arrays in placed_inputs(batches, mesh):
        with jax.set_mesh(mesh):
            mask, captured = _make_capture(model, tower)(params, arrays)
        for layer, x in zip(layers[tower], captured, strict=True):
            key = tower, layer
            experts = expert_leaves(params, tower, layer)
            with jax.set_mesh(mesh):
                if key not in shifts:  # about the first batch's mean, so that float32 sums lose nothing
                    shifts[key] = _make_mean(model.config)(x, mask, experts)
                of_batch = _make_sums(model.config)(x, mask, experts, shifts[key])
                of_batch = sharding.replicate(mesh, of_batch)
            of_batch = OutputSums(*(np.asarray(array, np.float64) for array in of_batch))
            sums[key] = OutputSums(*map(np.add, sums[key], of_batch)) if key in sums else of_batch
    tables = {}
    for tower, numbers in layers.items():
        with jax.set_mesh(mesh):
            cosines = [weight_cosine(expert_leaves(params, tower, i)) for i in numbers]
            cosines = sharding.replicate(mesh, cosines)
        tables[tower] = {
            "layers": numbers,
            "cka": [linear_cka(sums[tower, i], f"{tower} block {i}").tolist() for i in numbers],
            "js_divergence": [js_divergence(sums[tower, i]).tolist() for i in numbers],
            "weight_cosine": [np.asarray(cosine).tolist() for cosine in cosines],
        }
    return tables | {"diversity": diversity(*(np.array(table["cka"]) for table in tables.values()))}


def diversity(*cka_of_towers: np.ndarray) -> float:
    """Returns 1 - CKA averaged over pairs of two experts, layers and towers. Each tower's cka: (M, E, E)."""
    pairs = [cka[:, ~np.eye(cka.shape[-1], dtype=bool)] for cka in cka_of_towers]
    return float(np.mean([np.mean(1 - of_tower) for of_tower in pairs]))


def output_sums(y: Array, mask: Array, shift: Array) -> OutputSums:
    """Returns sums over the tokens that the mask keeps; jittable.

    y (E, B, L, D) float32, mask (B, L) bool, shift (E, D): near the mean of y. The Jensen-Shannon divergence
    of a token is that of two outputs as distributions over the D features, p = softmax(y_e) and
    q = softmax(y_f): KL(p | m) / 2 + KL(q | m) / 2 with m = (p + q) / 2 and logarithms to base 2, from 0
    (equal) to 1 (disjoint).
    """
    first, second = map(jnp.array, pairs_of_experts(len(y)))
    probabilities = jax.nn.softmax(y, axis=-1)
    y = jnp.where(mask[..., None], y - shift[:, None, None], 0).reshape(len(y), -1, y.shape[-1])
    s = jnp.sum(y**2, axis=-1)

    def of_pair(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        e, f = pair
        p, q = probabilities[e], probabilities[f]
        bits = jnp.sum(rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2), axis=-1) / (2 * jnp.log(2))
        return jnp.einsum("nd,nc->dc", y[e], y[f]), jnp.sum(jnp.maximum(bits, 0) * mask)

    yy, divergence = jax.lax.map(of_pair, (first, second))
    return OutputSums(
        y=y.sum(axis=1),
        s=s.sum(axis=1),
        sy=jnp.einsum("en,fnd->efd", s, y),
        ss=jnp.einsum("en,fn->ef", s, s),
        yy=yy,
        divergence=divergence,
        num_tokens=mask.sum(),
    )


def linear_cka(sums: OutputSums, name: str = "the layer") -> np.ndarray:
    """Returns the CKA of each pair of experts, (E, E) float64, from sums in float64.

    By unbiased HSIC of K = Y_e Y_e^T and L = Y_f Y_f^T without their diagonals, K' and L':
    tr(K'L') + sum(K') sum(L') / ((N-1)(N-2)) - 2 sum(K'L') / (N-2), computed from the sums of y.

    Raises ValueError for fewer than four tokens, or an expert that gives all tokens the same output.
    """
    n, size = float(sums.num_tokens), len(sums.y)
    if n < 4:
        raise ValueError(f"the CKA of {name} takes at least 4 tokens, not {n:.0f}: give more batches")
    inner = sums.y @ sums.y.T
    hsic = np.empty((size, size))
    for (e, f), yy in zip(np.transpose(pairs_of_experts(size)), sums.yy, strict=True):
        trace = np.sum(yy**2) - sums.ss[e, f]
        of_sums = (inner[e, e] - sums.s[e]) * (inner[f, f] - sums.s[f])
        product = sums.y[e] @ yy @ sums.y[f] + sums.ss[e, f]
        product -= sums.sy[e, f] @ sums.y[f] + sums.sy[f, e] @ sums.y[e]
        hsic[e, f] = hsic[f, e] = trace + of_sums / ((n - 1) * (n - 2)) - 2 * product / (n - 2)
    own = np.diag(hsic)
    if np.any(own <= 0):
        raise ValueError(
            f"expert {int(np.argmin(own))} of {name} gives all {n:.0f} tokens the same output: its CKA is "
            "undefined"
        )
    return hsic / np.sqrt(np.outer(own, own))


def js_divergence(sums: OutputSums) -> np.ndarray:
    """Returns the mean over tokens of each pair's Jensen-Shannon divergence, (E, E), in bits."""
    divergence = np.zeros((len(sums.y), len(sums.y)))
    first, second = pairs_of_experts(len(divergence))
    divergence[first, second] = divergence[second, first] = sums.divergence / sums.num_tokens
    return divergence


@jax.jit
def weight_cosine(experts: trees.Params) -> Array:
    """Returns cosines between the differences of experts 1, 2, … from expert 0, (E-1, E-1).

    An expert is the vector of all its weights and biases; leaves are (E, …). 0 where one does not differ.
    """
    dots = 0
    for leaf in jax.tree.leaves(experts):
        difference = (leaf[1:].astype(jnp.float32) - leaf[:1].astype(jnp.float32)).reshape(len(leaf) - 1, -1)
        dots += jnp.dot(difference, difference.T, precision="highest")
    norms = jnp.sqrt(jnp.diag(dots))
    scale = norms[:, None] * norms[None]
    return jnp.where(scale > 0, dots / jnp.where(scale > 0, scale, 1), 0)


def expert_leaves(params: trees.Params, tower: str, layer: int) -> dict[str, Any]:
    """Returns c_fc and c_proj of a MoE block, stacked over experts."""
    moe = params[tower][f"resblocks_{layer}"]["moe"]
    return {"c_fc": moe["c_fc"], "c_proj": moe["c_proj"]}


def pairs_of_experts(num_experts: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns e and f of the Q pairs e <= f."""
    first, second = zip(*itertools.combinations_with_replacement(range(num_experts), 2), strict=True)
    return first, second


def expert_outputs(x: Array, experts: trees.Params, config: ClipConfig) -> Array:
    """Runs every expert on every token, one expert at a time. x (B, L, D) -> (E, B, L, D) float32."""
    feed_forward, x = FeedForward(ACTIVATIONS[config.activation]), x.astype(jnp.float32)
    return jax.lax.map(functools.partial(feed_forward, x), Weights.of_params(experts))


@functools.cache
def _make_capture(model: Clip, tower: str) -> Callable[..., tuple[Array, list[Array]]]:
    """Returns the jitted (params, arrays of `placed_inputs`) -> `token_mask`, and the input of each MoE
    block's experts, ln_2's output (B, L, D)."""

    def capture(params, arrays):
        _, state = model.apply(
            {"params": params},
            arrays["inputs"],
            method=METHODS[INPUTS[tower]],
            capture_intermediates=lambda module, _: module.name == "ln_2",
            mutable=["intermediates"],
        )
        blocks = state["intermediates"][tower]
        numbers = moe_layers(model.config)[tower]
        captured = [blocks[f"resblocks_{i}"]["ln_2"]["__call__"][0] for i in numbers]
        return token_mask(model.config, tower, arrays), captured

    return jax.jit(capture)


@functools.cache
def _make_mean(config: ClipConfig) -> Callable[..., Array]:
    """Returns the jitted (x, mask, experts) -> mean output of each expert, (E, D)."""

    def mean(x, mask, experts):
        y = expert_outputs(x, experts, config)
        return jnp.einsum("ebld,bl->ed", y, mask.astype(y.dtype)) / jnp.maximum(mask.sum(), 1)

    return jax.jit(mean)


@functools.cache
def _make_sums(config: ClipConfig) -> Callable[..., OutputSums]:
    """Returns the jitted (x, mask, experts, shift) -> `output_sums` of the experts."""

    def sums(x, mask, experts, shift):
        with jax.default_matmul_precision("highest"):
            return output_sums(expert_outputs(x, experts, config), mask, shift)

    return jax.jit(sums)
