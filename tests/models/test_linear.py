"""Products in bfloat16."""

from collections import Counter

import jax
import jax.numpy as jnp
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
        for line in text.splitlines()
        if "stablehlo.dot_general" in line
    ]


@pytest.mark.parametrize(
    ("dtype", "platform", "results"),
    [
        ("bfloat16", "cpu", {"f32": 2, "bf16": 1}),  # but for the kernel's gradient
        ("bfloat16", "cuda", {"bf16": 3}),
        ("bfloat16", "tpu", {"bf16": 3}),
        ("float32", "cpu", {"f32": 3}),
    ],
)
def test_a_cpu_multiplies_bfloat16_into_float32(dtype, platform, results):
    """With another result XLA turns both factors into float32 first (benchmarks/LOG.md)."""
    assert Counter(products(dtype, platform)) == results
