"""Every implementation of attention against softmax written out, values and gradients."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import grid
from jax._src.cudnn import fused_attention_stablehlo

from clipmoe_jax.core import sharding
from clipmoe_jax.models import attention as module
from clipmoe_jax.models.attention import attention
from clipmoe_jax.models.transformer import Attention, ComputeConfig, _block_class, apply_blocks

B, L, H, W = 8, 7, 2, 4
SEGMENTS = np.array([[0] * 7, [1, 1, 1, 2, 2, 2, 0]] * 4, np.int32)


QKV = jax.random.normal(jax.random.key(0), (B, L, 3, H, W))


def written_out(query, key, value, causal, segments):
    """Example by example, head by head, token by token."""
    out = np.zeros(query.shape, np.float64)
    for b, h, i in np.ndindex(B, H, L):
        seen = [
            j
            for j in range(L)
            if (segments is None or segments[b, i] == segments[b, j]) and (j <= i or not causal)
        ]
        scores = np.array([np.dot(query[b, i, h], key[b, j, h]) / np.sqrt(W) for j in seen])
        weights = np.exp(scores - scores.max())
        out[b, i, h] = sum(w * value[b, j, h] for w, j in zip(weights / weights.sum(), seen, strict=True))
    return out


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_equals_softmax_written_out(implementation, causal, segments):
    found = attention(QKV, causal=causal, segments=segments, implementation=implementation)
    wanted = written_out(*np.moveaxis(np.asarray(QKV), 2, 0), causal, segments)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("chunk", grid(3 * H * L * L, rest=[1]), ids=["three and a rest", "one by one"])
@pytest.mark.parametrize("causal", grid(True, rest=[False]), ids=["causal", "all"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_chunked_values_and_gradients_equal_autodiff(monkeypatch, chunk, causal, segments):
    monkeypatch.setattr(module, "CHUNK_SCORES", chunk)
    target = jax.random.normal(jax.random.key(1), (B, L, H, W))

    def value_and_gradient(implementation):
        def attend(qkv):
            return attention(qkv, causal=causal, segments=segments, implementation=implementation)

        y, pull_back = jax.vjp(attend, QKV)
        return y, *pull_back(target)

    chex.assert_trees_all_close(value_and_gradient("chunked"), value_and_gradient("xla"), atol=1e-5)


def test_gradient_of_packed_heads_is_no_sum_of_padded_arrays():
    def loss(qkv):
        return attention(qkv, causal=False, implementation="xla").sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(QKV))
    assert "concatenate[" in text and " pad[" not in text and "scatter" not in text


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_chunks_stay_on_their_device(segments):
    """Eight devices attend to their own examples, forward and backward: nothing travels."""
    mesh = sharding.make_mesh(2, 2, 2)
    qkv = jax.random.normal(jax.random.key(0), (B, L, 3, 2, 64))
    given = {"qkv": qkv} | ({} if segments is None else {"segments": segments})
    placed = sharding.put_batch(mesh, given)

    def run(implementation, qkv, segments=None):
        def attend(qkv):
            return attention(qkv, causal=True, segments=segments, implementation=implementation)

        y, pull_back = jax.vjp(attend, qkv)
        return y, *pull_back(y)

    sharded = jax.jit(functools.partial(run, "chunked"))
    with jax.set_mesh(mesh):
        compiled = sharded.lower(**placed).compile()
        found = sharded(**placed)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    wanted = run("xla", **given)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """XLA's attention in place of cuDNN's, which is not here. At the padding its inputs may be anything, and
    its output and their gradients are NaN."""
    real = jax.nn.dot_product_attention

    @jax.custom_vjp
    def given(x, is_padding):
        return jnp.where(is_padding, 7.0, x)

    given.defvjp(
        lambda x, is_padding: (given(x, is_padding), is_padding),
        lambda is_padding, g: (jnp.where(is_padding, np.nan, g), None),
    )

    def attend(query, key, value, *, implementation, query_seq_lengths=None, **masks):
        if implementation == "xla":
            return real(query, key, value, implementation=implementation, **masks)
        assert implementation == "cudnn" and query.shape[1] % 2 == 0
        length = query.shape[1] if query_seq_lengths is None else query_seq_lengths[0]
        is_padding = (jnp.arange(query.shape[1]) >= length)[:, None, None]
        query, key, value = (given(a, is_padding) for a in (query, key, value))
        return jnp.where(is_padding, np.nan, real(query, key, value, **masks))

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


@pytest.mark.parametrize("length", [L, L - 1], ids=["odd", "even"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_products_apart_equal_one_product(cudnn_by_xla, length, causal, segments):
    """Separate products equal one packed product; cuDNN's padding has no effect."""
    x, dy = (jax.random.normal(jax.random.key(i), (B, length, H * W)) for i in range(2))
    segments = None if segments is None else segments[:, :length]
    params = Attention(H, causal, "xla", np.float32).init(jax.random.key(2), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def run(implementation):
        layer = Attention(H, causal, implementation, np.float32)
        y, pull_back = jax.vjp(lambda params, x: layer.apply(params, x, segments), params, x)
        return y, *pull_back(dy)

    wanted = run("chunked")
    for implementation in ("cudnn", "xla"):
        chex.assert_trees_all_close(run(implementation), wanted, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_padding_throughout_a_tower_reaches_nothing(cudnn_by_xla, causal, segments, remat):
    """Two shards of two rows of an odd length; a token of each shard is read, also of its second row. Norms
    add nothing to the variance, so that a token of zeros would be NaN."""
    x = jax.random.normal(jax.random.key(0), (4, L, H * W))
    segments = None if segments is None else segments[:4]
    pooled = np.array([[0, L + 3], [L - 1, 2 * L - 1]])

    class Tower(nn.Module):
        attention: str

        @nn.compact
        def __call__(self, x):
            compute = ComputeConfig(attention=self.attention, remat=remat)
            sizes = {"num_layers": 3, "num_heads": H, "mlp_width": 8, "layer_norm_eps": 0.0}
            kinds = {"activation": "gelu", "causal": causal, "moe": None, "deterministic": True}
            return apply_blocks(x, pooled, segments, compute=compute, **sizes, **kinds)[0]

    params = Tower("xla").init(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)

    def run(attention):
        y, pull_back = jax.vjp(Tower(attention).apply, params, x)
        return y, *pull_back(jax.random.normal(jax.random.key(2), y.shape))

    wanted = run("chunked")
    for implementation in ("cudnn", "xla"):
        chex.assert_trees_all_close(run(implementation), wanted, atol=2e-5)


@pytest.mark.parametrize(("remat", "calls"), [("none", 1), ("dots", 1), ("full", 2)])
def test_remat_keeps_what_cudnn_computed(monkeypatch, remat, calls):
    """Its output and log-sums are kept by the name of JAX's primitive: "dots" would call it twice without."""
    for check in ("check_cudnn_version", "check_compute_capability"):  # no such device is here
        monkeypatch.setattr(fused_attention_stablehlo, check, lambda *_: 91000)

    def block(attention):
        compute = ComputeConfig(dtype="bfloat16", attention=attention, remat=remat)
        fixed = {"mlp_width": 256, "activation": "gelu", "layer_norm_eps": 1e-5, "moe": None}
        return _block_class(remat)(2, causal=False, compute=compute, deterministic=True, **fixed)

    x = jax.ShapeDtypeStruct((2, 7, 128), "bfloat16")
    params = jax.eval_shape(block("xla").init, jax.random.key(0), x)

    def loss(params, x):
        return block("cudnn").apply(params, x)[0].astype(np.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(params, x))
    assert text.count("dot_product_attention_fwd_wrapper[") == calls
    assert text.count("dot_product_attention_bwd_wrapper[") == 1
