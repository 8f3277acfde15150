"""Multi-head self-attention under one contract, by platform.

Letters: B batch, L length, H heads, W head width, C examples of a chunk.

Scores and softmax are float32. A token sees the tokens of its own segment alone (several captions may share a
row), and with `causal` only those up to itself.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clipmoe_jax.core.sharding import BATCH_AXES, devices_in_use
from clipmoe_jax.models.pallas_attention import MASKED, is_possible, pallas_attention

Array = jax.Array

IMPLEMENTATIONS = ("xla", "cudnn", "pallas", "chunked")

# Scores of a chunk, all heads: what a core's cache holds (benchmarks/LOG.md).
CHUNK_SCORES = 1 << 20


def attention(
    qkv: Array,
    *,
    causal: bool,
    segments: Array | None = None,
    implementation: str = "xla",
) -> Array:
    """Queries, keys and values (B, L, 3, H, W) -> (B, L, H, W) in their dtype; segments (B, L) int32, None is
    one each.

    implementation: "xla" computes all scores at once; "chunked" a few examples at a time, and again in the
    backward pass (for CPUs, where scores of a whole batch fall out of the cache); "cudnn" is cuDNN's fused
    kernel (NVIDIA GPUs from compute capability 8.0, half precision); "pallas" is ours (TPUs), and XLA's where
    it is not possible: long sequences, or heads that do not fill lanes (`is_possible`).
    """
    if implementation == "chunked":
        return _of_each_device(_chunked, causal, qkv, segments)
    if implementation == "pallas":
        if is_possible(qkv.shape[1], *qkv.shape[3:]):
            return _of_each_device(pallas_attention, causal, qkv, segments)
        implementation = "xla"
    query, key, value = (qkv[:, :, i] for i in range(3))
    if implementation == "cudnn":
        return _cudnn(query, key, value, segments, causal)
    mask = None if segments is None else _same_segment(segments)[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )


def implementations(platform: str, dtype: str) -> list[str]:
    """Those that a platform (`sharding.platform`) has for a dtype, its own first: cuDNN's has half precision
    alone."""
    of_cuda = "xla" if dtype == "float32" else "cudnn"
    own = {"cpu": "chunked", "tpu": "pallas", "cuda": of_cuda}.get(platform, "xla")
    return list(dict.fromkeys([own, "xla", "chunked"]))


def _same_segment(segments: Array) -> Array:
    """(…, L) -> (…, L, L) bool."""
    return segments[..., :, None] == segments[..., None, :]


def _cudnn(query: Array, key: Array, value: Array, segments: Array | None, causal: bool) -> Array:
    """Lengths are made even: JAX's interface refuses odd ones in training, and ViTs have L = patches + 1."""
    length = query.shape[1]
    odd, lengths = length % 2, None
    if odd:
        query, key, value = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (query, key, value))
        lengths = jnp.full(query.shape[0], length, jnp.int32)
    mask = None
    if segments is not None:
        mask = _same_segment(jnp.pad(segments, ((0, 0), (0, odd)), constant_values=-1))[:, None]
    y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
    return y[:, :length]


def _of_each_device(
    attend: Callable[[bool, Array, Array | None], Array], causal: bool, qkv: Array, segments: Array | None
) -> Array:
    """Each device attends to its own examples: XLA would not split a kernel or a loop over them."""
    attend = functools.partial(attend, causal)
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
            y = jnp.einsum("hlm,hmw->hlw", p.astype(value.dtype), value[:, seen])
            parts.append((y / jnp.sum(p, axis=-1, keepdims=True)).astype(value.dtype))
        return jnp.concatenate(parts, axis=1).swapaxes(0, 1)

    return _map(attend, qkv, segments)


def _attend_fwd(causal, *arguments):
    return _attend_in_chunks(causal, *arguments), arguments


def _attend_bwd(causal, arguments, gradient):
    """The probabilities again, then the softmax's own gradient."""

    def pull_back(qkv, segments, g):
        query, key, value = _heads_first(qkv)
        g = g.swapaxes(0, 1)
        dq, dk, dv = [], jnp.zeros_like(key), jnp.zeros_like(value)
        for rows, seen in _parts(causal, query.shape[1]):
            p = jax.nn.softmax(_scores(causal, query, key, segments, rows, seen), axis=-1)
            dp = jnp.einsum("hlw,hmw->hlm", g[:, rows], value[:, seen], preferred_element_type=jnp.float32)
            ds = (p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True))).astype(query.dtype)
            dq.append(_scaled(jnp.einsum("hlm,hmw->hlw", ds, key[:, seen])))
            dk = dk.at[:, seen].add(jnp.einsum("hlm,hlw->hmw", ds, _scaled(query[:, rows])))
            dv = dv.at[:, seen].add(jnp.einsum("hlm,hlw->hmw", p.astype(g.dtype), g[:, rows]))
        return jnp.stack([part.swapaxes(0, 1) for part in (jnp.concatenate(dq, axis=1), dk, dv)], axis=1)

    return _map(pull_back, *arguments, gradient), None


_attend_in_chunks.defvjp(_attend_fwd, _attend_bwd)


def _parts(causal: bool, length: int) -> list[tuple[slice, slice]]:
    """(rows, the keys that they may see): with a causal mask its upper right quarter is left out."""
    if not causal:
        return [(slice(0, length), slice(0, length))]
    half = (length + 1) // 2
    return [(slice(0, half), slice(0, half)), (slice(half, length), slice(0, length))]


def _scores(causal: bool, query: Array, key: Array, segments: Array, rows: slice, seen: slice) -> Array:
    """One example: query, key (H, L, W), segments (L,) -> (H, rows, seen) float32, MASKED where hidden."""
    scores = jnp.einsum(
        "hlw,hmw->hlm", _scaled(query[:, rows]), key[:, seen], preferred_element_type=jnp.float32
    )
    visible = _same_segment(segments)
    if causal:
        visible &= jnp.tril(jnp.ones_like(visible))
    return jnp.where(visible[rows, seen], scores, MASKED)


def _scaled(query: Array) -> Array:
    return query * query.shape[-1] ** -0.5


def _heads_first(qkv: Array) -> tuple[Array, Array, Array]:
    """One example's (L, 3, H, W) -> query, key, value (H, L, W): XLA's products on CPU are faster so."""
    query, key, value = (qkv[:, i].swapaxes(0, 1) for i in range(3))
    return query, key, value


def _map(function: Callable[..., Array], qkv: Array, *others: Array) -> Array:
    """`function` of one example's part of qkv and each other array, over all examples, as many at a time as
    CHUNK_SCORES allows."""
    _, length, _, heads, _ = qkv.shape
    chunk = max(1, CHUNK_SCORES // (heads * length**2))
    return lax.map(lambda example: function(*example), (qkv, *others), batch_size=chunk)
