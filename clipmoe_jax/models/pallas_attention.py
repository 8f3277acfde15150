"""Attention as one kernel for TPUs: scores never leave the core.

Letters: B batch, L length, D heads times their width W.

XLA writes the scores of all heads to HBM and reads them back several times, forward and backward. A head of
CLIP's lengths (50 to 577) has them all in VMEM at once, so that nothing need be tiled as in flash attention
(arXiv 2205.14135): a program takes one example's heads that share LANES lanes, and its softmax is the plain
one. The backward pass computes the scores again from queries and keys. Lengths need fill no tile: Mosaic
masks what lies beyond them in products and reductions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

LANES = 128
MAX_LENGTH = 785  # 392 pixels in patches of 14; in float32 896 do not fit in a TPU v5's VMEM
MASKED = -1e30


def is_possible(length: int, num_heads: int, width: int) -> bool:
    """Whether the scores of a head fit in VMEM, and heads of that width fill lanes."""
    lanes = num_heads * width
    return length <= MAX_LENGTH and width in (32, 64, LANES) and lanes % LANES == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pallas_attention(causal: bool, qkv: Array, segments: Array | None) -> Array:
    """Queries, keys and values (B, L, 3, H, W) -> (B, L, H, W) in their dtype; segments (B, L) int32, None is
    one each. On one device, where `is_possible(L, H, W)`."""
    batch, length, _, num_heads, width = qkv.shape
    (y,) = _call(_forward, 1, causal, qkv, segments)
    return y.reshape(batch, length, num_heads, width)


def _attention_fwd(causal: bool, qkv: Array, segments: Array | None) -> tuple[Array, tuple]:
    return pallas_attention(causal, qkv, segments), (qkv, segments)


def _attention_bwd(causal: bool, residuals: tuple, gradient: Array) -> tuple[Array, None]:
    gradients = _call(_backward, 3, causal, *residuals, gradient)
    return jnp.concatenate(gradients, axis=2).reshape(residuals[0].shape), None


pallas_attention.defvjp(_attention_fwd, _attention_bwd)


def _call(
    kernel: Callable[..., None],
    num_results: int,
    causal: bool,
    qkv: Array,
    segments: Array | None,
    *others: Array,
) -> list[Array]:
    """The kernel's results, (B, L, D) each. others: (B, L, H, W)."""
    batch, length, _, num_heads, width = qkv.shape
    lanes = num_heads * width
    block = (1, length, LANES)

    def part(i: int) -> pl.BlockSpec:
        """The program's lanes of queries, keys or values, which lie side by side in (B, L, 3 D)."""
        return pl.BlockSpec(block, lambda b, j: (b, 0, i * (lanes // LANES) + j))

    flat = qkv.reshape(batch, length, 3 * lanes)
    arrays, specs = [flat] * 3, [part(i) for i in range(3)]
    for other in others:
        arrays.append(other.reshape(batch, length, lanes))
        specs.append(part(0))
    if segments is not None:  # of queries, and of keys
        for shape in ((length, 1), (1, length)):
            arrays.append(segments.reshape(batch, *shape))
            specs.append(pl.BlockSpec((1, *shape), lambda b, j: (b, 0, 0)))
    return pl.pallas_call(
        functools.partial(kernel, causal, width),
        grid=(batch, lanes // LANES),
        in_specs=specs,
        out_specs=[part(0)] * num_results,
        out_shape=[jax.ShapeDtypeStruct((batch, length, lanes), qkv.dtype)] * num_results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(*arrays)


def _forward(causal: bool, width: int, q_ref, k_ref, v_ref, *refs) -> None:
    """Refs (1, L, LANES), and of segments, if there are any, (1, L, 1) and (1, 1, L). Lanes of other heads
    are zeros in a product, which takes as long."""
    *segment_refs, y_ref = refs
    q, k, v = _scaled(q_ref[0], width), k_ref[0], v_ref[0]
    visible = _visible(q.shape[0], causal, segment_refs)
    y = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // width):
        p, total = _weights(_of_head(q, head, width), k, visible)
        y += _dot(p.astype(v.dtype), _of_head(v, head, width), (1, 0)) / total
    y_ref[0] = y.astype(y_ref.dtype)


def _backward(causal: bool, width: int, q_ref, k_ref, v_ref, g_ref, *refs) -> None:
    """As `_forward`; g is the gradient of y. With p = softmax(s): ds = p (dp - sum(p dp))."""
    *segment_refs, dq_ref, dk_ref, dv_ref = refs
    q, k, v, g = _scaled(q_ref[0], width), k_ref[0], v_ref[0], g_ref[0]
    visible = _visible(q.shape[0], causal, segment_refs)
    dq, dk, dv = (jnp.zeros(q.shape, jnp.float32) for _ in range(3))
    for head in range(LANES // width):
        q_head, g_head = _of_head(q, head, width), _of_head(g, head, width)
        p, total = _weights(q_head, k, visible)
        p /= total
        dv += _dot(p.astype(g.dtype), g_head, (0, 0))
        dp = _dot(g_head, v, (1, 1))
        ds = (p * (dp - jnp.sum(p * dp, axis=1, keepdims=True))).astype(q.dtype)
        dq += _dot(ds, _of_head(k, head, width), (1, 0))
        dk += _dot(ds, q_head, (0, 0))
    dq_ref[0] = _scaled(dq, width).astype(dq_ref.dtype)
    dk_ref[0] = dk.astype(dk_ref.dtype)
    dv_ref[0] = dv.astype(dv_ref.dtype)


def _weights(q: Array, k: Array, visible: Array | None) -> tuple[Array, Array]:
    """Exponentials (L, L) float32 of the scores, and their sums (L, 1)."""
    scores = _dot(q, k, (1, 1))
    if visible is not None:
        scores = jnp.where(visible, scores, MASKED)
    p = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return p, jnp.sum(p, axis=1, keepdims=True)


def _visible(length: int, causal: bool, segment_refs: list) -> Array | None:
    """(L, L) bool, which keys a query sees; None is all."""
    visible = None
    if segment_refs:
        of_queries, of_keys = segment_refs
        visible = of_queries[0] == of_keys[0]
    if causal:
        row, column = (lax.broadcasted_iota(jnp.int32, (length, length), axis) for axis in (0, 1))
        earlier = column <= row
        visible = earlier if visible is None else visible & earlier
    return visible


def _of_head(array: Array, head: int, width: int) -> Array:
    """(L, LANES) with zeros in the lanes of other heads."""
    if width == LANES:
        return array
    lane = lax.broadcasted_iota(jnp.int32, array.shape, 1)
    mine = (lane >= head * width) & (lane < (head + 1) * width)
    return jnp.where(mine, array, jnp.zeros_like(array))


def _scaled(query: Array, width: int) -> Array:
    return query * width**-0.5


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contracts an axis of each, in float32."""
    return lax.dot_general(a, b, ((axes[:1], axes[1:]), ((), ())), preferred_element_type=jnp.float32)
