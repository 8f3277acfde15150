"""Multi-head self-attention under one contract, by platform.

Letters: B batch, L length, H heads, W head width, C examples of a chunk.

Scores and softmax are float32. A token sees the tokens of its own segment alone (several captions may share a
row), and with `causal` only those up to itself.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from clipmoe_jax.sharding import BATCH_AXES, devices_in_use

Array = jax.Array

IMPLEMENTATIONS = ("xla", "cudnn", "chunked")

# Scores of a chunk, all heads: what a core's cache holds (benchmarks/LOG.md).
CHUNK_SCORES = 1 << 19
MASKED = -1e30


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    segments: Array | None = None,
    implementation: str = "xla",
) -> Array:
    """query, key, value (B, L, H, W) -> (B, L, H, W) in their dtype; segments (B, L) int32, None is one each.

    implementation: "xla" computes all scores at once; "chunked" a few examples at a time, and again in the
    backward pass (for CPUs, where scores of a whole batch fall out of the cache); "cudnn" is cuDNN's fused
    kernel (NVIDIA GPUs from compute capability 8.0, half precision).
    """
    if implementation == "chunked":
        return _chunked(query, key, value, segments, causal)
    if implementation == "cudnn":
        return _cudnn(query, key, value, segments, causal)
    mask = None if segments is None else _same_segment(segments)[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=implementation
    )


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


def _chunked(query: Array, key: Array, value: Array, segments: Array | None, causal: bool) -> Array:
    attend = functools.partial(_attend_in_chunks, causal)
    if segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    if devices_in_use() == 1:
        return attend(query, key, value, segments)
    # Each device loops over its own examples.
    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(attend, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)(
        query, key, value, segments
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_chunks(causal: bool, query: Array, key: Array, value: Array, segments: Array) -> Array:
    def attend(segments, query, key, value):
        p = _probabilities(causal, query, key, segments)
        return jnp.einsum("hlm,hmw->hlw", p.astype(value.dtype), value)

    return _map(attend, segments, query, key, value)


def _attend_fwd(causal, query, key, value, segments):
    y = _attend_in_chunks(causal, query, key, value, segments)
    return y, (query, key, value, segments, y)


def _attend_bwd(causal, residuals, gradient):
    """The probabilities again, then the softmax's own gradient (arXiv 2205.14135, appendix B.2)."""

    def pull_back(segments, query, key, value, y, g):
        p = _probabilities(causal, query, key, segments)
        dp = jnp.einsum("hlw,hmw->hlm", g, value, preferred_element_type=jnp.float32)
        own = jnp.sum(g.astype(jnp.float32) * y.astype(jnp.float32), axis=-1, keepdims=True)
        ds = (p * (dp - own) * query.shape[-1] ** -0.5).astype(query.dtype)
        return (
            jnp.einsum("hlm,hmw->hlw", ds, key),
            jnp.einsum("hlm,hlw->hmw", ds, query),
            jnp.einsum("hlm,hlw->hmw", p.astype(g.dtype), g),
        )

    query, key, value, segments, y = residuals
    return *_map(pull_back, segments, query, key, value, y, gradient), None


_attend_in_chunks.defvjp(_attend_fwd, _attend_bwd)


def _probabilities(causal: bool, query: Array, key: Array, segments: Array) -> Array:
    """One example: query, key (H, L, W), segments (L,) -> (H, L, L) float32."""
    scores = jnp.einsum("hlw,hmw->hlm", query, key, preferred_element_type=jnp.float32)
    visible = _same_segment(segments)
    if causal:
        visible &= jnp.tril(jnp.ones_like(visible))
    return jax.nn.softmax(jnp.where(visible, scores * query.shape[-1] ** -0.5, MASKED), axis=-1)


def _map(function, segments: Array, *arrays: Array):
    """`function` of one example, segments (L,) and (H, L, W) arrays in and (H, L, W) out, over all of them.

    As many at a time as CHUNK_SCORES allows. Heads come first: XLA's products on CPU are faster so.
    """

    def one(example):
        outputs = function(example[0], *(array.swapaxes(0, 1) for array in example[1:]))
        return jax.tree.map(lambda array: array.swapaxes(0, 1), outputs)

    _, length, heads, _ = arrays[0].shape
    return lax.map(one, (segments, *arrays), batch_size=max(1, CHUNK_SCORES // (heads * length**2)))
