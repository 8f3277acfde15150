"""Every implementation of attention against softmax written out, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from clipmoe_jax.core import sharding
from clipmoe_jax.models import attention as module
from clipmoe_jax.models.attention import attention

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


@pytest.mark.parametrize("chunk", [1, 3 * H * L * L], ids=["one by one", "three and a rest"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_chunked_gradients_equal_those_of_autodiff(monkeypatch, chunk, segments):
    monkeypatch.setattr(module, "CHUNK_SCORES", chunk)
    target = jax.random.normal(jax.random.key(1), (B, L, H, W))

    def gradients(implementation):
        def loss(qkv):
            y = attention(qkv, causal=True, segments=segments, implementation=implementation)
            return jnp.sum(y * target)

        return jax.grad(loss)(QKV)

    np.testing.assert_allclose(gradients("chunked"), gradients("xla"), atol=1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels as XLA's operations on CPU; of tiles, and what pads them, this knows nothing."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


def values_and_gradient(implementation, qkv, causal, segments, target):
    def loss(qkv):
        y = attention(qkv, causal=causal, segments=segments, implementation=implementation)
        return jnp.sum(y * target, dtype=jnp.float32), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return np.asarray(y, np.float32), np.asarray(gradient, np.float32)


@pytest.mark.parametrize("num_heads, width", [(2, 64), (8, 32), (1, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("has_segments", [False, True], ids=["one segment", "segments"])
def test_pallas_equals_xla(interpreted, num_heads, width, causal, has_segments):
    """Heads that share lanes, one that fills them."""
    qkv = jax.random.normal(jax.random.key(0), (2, 50, 3, num_heads, width))
    target = jax.random.normal(jax.random.key(1), (2, 50, num_heads, width))
    segments = np.array([[0] * 50, [1] * 20 + [2] * 25 + [0] * 5], np.int32) if has_segments else None
    found, wanted = (values_and_gradient(name, qkv, causal, segments, target) for name in ("pallas", "xla"))
    np.testing.assert_allclose(found[0], wanted[0], atol=5e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


def test_pallas_in_half_precision_is_as_close_to_float32_as_xla(interpreted):
    shape = (1, 77, 3, 2, 64)
    qkv = jax.random.normal(jax.random.key(0), shape)
    target = jax.random.normal(jax.random.key(1), (1, 77, 2, 64))
    exact = values_and_gradient("xla", qkv, True, None, target)
    half = [
        values_and_gradient(name, qkv.astype(jnp.bfloat16), True, None, target) for name in ("pallas", "xla")
    ]
    for i in range(2):
        ours, xlas = (np.linalg.norm(found[i] - exact[i]) for found in half)
        assert 0 < ours < 1.2 * xlas


@pytest.mark.parametrize(
    "length, num_heads, width", [(7, 2, 4), (7, 3, 64), (7, 1, 96), (786, 2, 64)], ids=str
)
def test_pallas_gives_way_to_xla_where_it_is_not_possible(length, num_heads, width):
    """Not interpreted: on a CPU the kernel itself would raise."""
    qkv = jax.random.normal(jax.random.key(0), (1, length, 3, num_heads, width))
    found = attention(qkv, causal=True, implementation="pallas")
    np.testing.assert_array_equal(found, attention(qkv, causal=True))


@pytest.mark.parametrize("implementation", ["chunked", "pallas"])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["one segment", "segments"])
def test_stays_on_its_device(interpreted, implementation, segments):
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

    sharded = jax.jit(functools.partial(run, implementation))
    with jax.set_mesh(mesh):
        compiled = sharded.lower(**placed).compile()
        found = sharded(**placed)
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-to-all", "collective-permute"))
    wanted = run("xla", **given)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_pallas_lowers_for_tpus(causal):
    """A TPU need not be here."""
    abstract = jax.ShapeDtypeStruct((4, 257, 3, 16, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((4, 257), jnp.int32)

    @jax.value_and_grad
    def total(qkv, segments):
        return attention(qkv, causal=causal, segments=segments, implementation="pallas").sum()

    text = jax.jit(total).trace(abstract, segments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2  # forward and backward
