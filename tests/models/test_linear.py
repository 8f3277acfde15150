"""Products in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.models.linear import linear


def products(dtype, platform):
    """The element types of the results of products in a linear layer and its gradients, for a platform."""
    x, kernel = jnp.ones((2, 3, 8), dtype), jnp.ones((8, 5))

    def gradients(x, kernel):
        return jax.vjp(lambda x, kernel: linear(x, kernel, None), x, kernel)[1](jnp.ones((2, 3, 5), dtype))

    lowered = [
        jax.jit(function).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        for function in (lambda x, kernel: linear(x, kernel, None), gradients)
    ]
    return [
        line.rpartition("x")[2].strip(">")
        for text in lowered
        for line in text.split(" loc(")[0].splitlines()
        if "stablehlo.dot_general" in line
    ]


@pytest.mark.parametrize(
    ("dtype", "platform", "results"),
    [
        ("bfloat16", "cpu", ["f32", "f32", "bf16"]),  # forward, of x, of the kernel
        ("bfloat16", "cuda", ["bf16"] * 3),
        ("bfloat16", "tpu", ["bf16"] * 3),
        ("float32", "cpu", ["f32"] * 3),
    ],
)
def test_a_cpu_multiplies_halves_into_float32(dtype, platform, results):
    """With another result XLA turns both factors into float32 first (benchmarks/LOG.md)."""
    found = products(dtype, platform)
    assert sorted(found) == sorted(results)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_summed_in_float32_and_rounded_once(dtype):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 512)), rng.normal(size=(512, 5))
    x, kernel = (jnp.asarray(a, dtype) for a in (x, kernel))
    found = linear(x, kernel.astype(jnp.float32), None)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=jnp.finfo(dtype).eps, atol=1e-5)
