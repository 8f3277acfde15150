"""Multi-head self-attention under one contract, with an implementation for each platform.

Letters: B batch, L length, H heads, W head width.

Scores and softmax are float32. A token attends to the tokens of its own segment (several captions may share a
row) and, if `causal`, only to those up to itself.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from clipmoe_jax.core.sharding import BATCH_AXES, devices_in_use

Array = jax.Array

# Scores of a chunk, all heads: as many as fit in the cache of a core (benchmarks/LOG.md).
CHUNK_SCORES = 1 << 20

MASKED = -1e30  # the score of a key that a query must not see; finite, so that no difference is NaN


def attention(
    qkv: Float[Array, "B L 3 H W"],
    *,
    causal: bool,
    segments: Int[Array, "B L"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "B L H W"]:
    """Returns the output of attention, qkv (B, L, 3, H, W) -> (B, L, H, W) in its dtype.

    qkv: queries, keys and values. segments (B, L) int32; None is one segment per row. implementation: "xla"
    computes all scores at once; "chunked" those of a few examples at a time, and again in the backward pass,
    for CPUs, where the scores of a whole batch fall out of the cache; "cudnn" is cuDNN's fused kernel, for
    NVIDIA GPUs from compute capability 8.0 in half precision.
    """
    if implementation == "chunked":
        return _on_each_device(functools.partial(_chunked, causal), qkv, segments)
    batch, length, _, heads, width = qkv.shape
    # The gradient of a split is a concatenation, of an index into (B, L, 3, H, W) a sum of padded arrays.
    parts = jnp.split(qkv.reshape(batch, length, -1), 3, axis=-1)
    query, key, value = (part.reshape(batch, length, heads, width) for part in parts)
    if implementation == "cudnn":
        query, key, value = (pad_to_even_length(a) for a in (query, key, value))
        return cudnn_attention(query, key, value, length, causal=causal, segments=segments)[:, :length]
    if implementation != "xla":
        raise ValueError(f"attention={implementation!r} is not known: choose 'xla', 'chunked' or 'cudnn'")
    return xla_attention(query, key, value, causal=causal, segments=segments)


def default_implementation(platform: str, dtype: str) -> str:
    """Returns the implementation for a platform (`sharding.platform`); cuDNN has none for float32."""
    if platform == "cpu":
        return "chunked"
    return "cudnn" if platform in ("cuda", "hopper") and dtype != "float32" else "xla"


def _same_segment(segments: Array) -> Array:
    """Returns whether two tokens share a segment, (…, L) -> (…, L, L) bool."""
    return segments[..., :, None] == segments[..., None, :]


def pad_to_even_length(x: Float[Array, "B L ..."]) -> Float[Array, "B M ..."]:
    """Appends a token of zeros to sequences of an odd length: x (B, L, …) -> (B, L + L % 2, …)."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2)))


def xla_attention(
    query: Float[Array, "B L H W"],
    key: Float[Array, "B L H W"],
    value: Float[Array, "B L H W"],
    *,
    causal: bool,
    segments: Int[Array, "B L"] | None,
) -> Float[Array, "B L H W"]:
    """Returns the output of attention that computes all scores at once, (B, L, H, W)."""
    mask = None if segments is None else _same_segment(segments)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="xla")


def cudnn_attention(
    query: Float[Array, "B M H W"],
    key: Float[Array, "B M H W"],
    value: Float[Array, "B M H W"],
    length: int,
    *,
    causal: bool,
    segments: Int[Array, "B L"] | None,
) -> Float[Array, "B M H W"]:
    """Returns the output of cuDNN's attention, (B, M, H, W), undefined from token `length` on.

    M: an even length (`pad_to_even_length`). JAX refuses odd ones in training, and ViTs have one token more
    than patches.
    """
    padding = query.shape[1] - length
    lengths = jnp.full(query.shape[0], length, jnp.int32) if padding else None
    mask = None
    if segments is not None:
        mask = _same_segment(jnp.pad(segments, ((0, 0), (0, padding)), constant_values=-1))[:, None]
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def saves_cudnn(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: keeps cuDNN's output, and the log-sums that its gradient needs.

    Without them the backward pass would run the forward kernel again, output or not.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _on_each_device(
    attend: Callable[[Array, Array | None], Array], qkv: Array, segments: Array | None
) -> Array:
    """Lets each device attend to its own examples: XLA would not split a loop over them."""
    if devices_in_use() == 1:
        return attend(qkv, segments)
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(attend, in_specs=(rows, rows), out_specs=rows, check_vma=False)(qkv, segments)


def _chunked(causal: bool, qkv: Array, segments: Array | None) -> Array:
    if segments is None:
        segments = jnp.zeros(qkv.shape[:2], jnp.int32)
    return _attend_in_chunks(causal, qkv, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_chunks(causal: bool, qkv: Array, segments: Array) -> Array:
    def attend(qkv, segments):
        query, key, value = _heads_first(qkv)
        parts = []
        for rows, seen in _parts(causal, query.shape[1]):
            scores = _scores(causal, query, key, segments, rows, seen)
            p = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            y = _product("hlm,hmw->hlw", p.astype(value.dtype), value[:, seen])
            parts.append((y / jnp.sum(p, axis=-1, keepdims=True)).astype(value.dtype))
        return jnp.concatenate(parts, axis=1).swapaxes(0, 1)

    return _map(attend, qkv, segments)


def _attend_fwd(causal, *arguments):
    return _attend_in_chunks(causal, *arguments), arguments


def _attend_bwd(causal, arguments, gradient):
    """Computes the probabilities again; of p = softmax(s) the gradient is ds = p (dp - sum(p dp)).

    By hand, since autodiff keeps the scores of the whole batch (benchmarks/LOG.md has what that costs).
    """

    def pull_back(qkv, segments, g):
        query, key, value = _heads_first(qkv)
        g = g.swapaxes(0, 1)
        dq, dk, dv = [], jnp.zeros(key.shape), jnp.zeros(value.shape)
        for rows, seen in _parts(causal, query.shape[1]):
            p = jax.nn.softmax(_scores(causal, query, key, segments, rows, seen), axis=-1)
            dp = _product("hlw,hmw->hlm", g[:, rows], value[:, seen])
            ds = (p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))).astype(query.dtype)
            dq.append(_scaled(_product("hlm,hmw->hlw", ds, key[:, seen])))
            dk = dk.at[:, seen].add(_product("hlm,hlw->hmw", ds, _scaled(query[:, rows])))
            dv = dv.at[:, seen].add(_product("hlm,hlw->hmw", p.astype(g.dtype), g[:, rows]))
        parts = jnp.concatenate(dq, axis=1), dk, dv
        return jnp.stack([part.swapaxes(0, 1) for part in parts], axis=1).astype(qkv.dtype)

    return _map(pull_back, *arguments, gradient), None


_attend_in_chunks.defvjp(_attend_fwd, _attend_bwd)


def _parts(causal: bool, length: int) -> list[tuple[slice, slice]]:
    """Returns (queries, the keys they may see): of a causal mask the upper right quarter is left out."""
    if not causal:
        return [(slice(0, length), slice(0, length))]
    half = (length + 1) // 2
    return [(slice(0, half), slice(0, half)), (slice(half, length), slice(0, length))]


def _scores(causal: bool, query: Array, key: Array, segments: Array, rows: slice, seen: slice) -> Array:
    """Returns one example's scores. query, key (H, L, W), segments (L,) -> (H, rows, seen) float32."""
    scores = _product("hlw,hmw->hlm", _scaled(query[:, rows]), key[:, seen])
    visible = _same_segment(segments)
    if causal:
        visible &= jnp.tril(jnp.ones_like(visible))
    return jnp.where(visible[rows, seen], scores, MASKED)


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scaled(query: Array) -> Array:
    return query * query.shape[-1] ** -0.5


def _heads_first(qkv: Array) -> tuple[Array, Array, Array]:
    """Splits one example's (L, 3, H, W) into three (H, L, W), with which XLA's products on CPU are faster."""
    query, key, value = (qkv[:, i].swapaxes(0, 1) for i in range(3))
    return query, key, value


def _map(function: Callable[..., Array], qkv: Array, *others: Array) -> Array:
    """Applies a function of one example's arrays to all, as many at a time as CHUNK_SCORES allows."""
    _, length, _, heads, _ = qkv.shape
    chunk = max(1, CHUNK_SCORES // (heads * length**2))
    return lax.map(lambda example: function(*example), (qkv, *others), batch_size=chunk)
