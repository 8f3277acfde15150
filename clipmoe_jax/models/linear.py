"""Products and the linear layer, written for what XLA makes of them on CPU.

Letters: D width in, F width out.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

Array = jax.Array


def einsum(equation: str, x: Array | np.ndarray, y: Array) -> Array:
    """Returns jnp.einsum of two arrays of one dtype, in this dtype.

    CPUs have instructions for products of bfloat16, such as Intel's AMX. XLA uses them where the result is
    float32, and otherwise multiplies in float32 (benchmarks/LOG.md).
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(equation, x, y)

    def in_float32(x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32).astype(x.dtype)

    return lax.platform_dependent(x, y, cpu=in_float32, default=functools.partial(jnp.einsum, equation))


class Linear(nn.Module):
    """A linear layer computed in `dtype`. x (…, D) -> (…, features)."""

    features: int
    stddev: float
    dtype: jnp.dtype

    @nn.compact
    def weights(self, width: int) -> tuple[Array, Array]:
        """Returns kernel (width, features) and bias (features,) as they are stored."""
        kernel = self.param("kernel", nn.initializers.normal(self.stddev), (width, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return kernel, bias

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N {self.features}"]:
        return linear(x.astype(self.dtype), *self.weights(x.shape[-1]))


def linear(
    x: Float[Array, "*N D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"] | None
) -> Float[Array, "*N F"]:
    """Returns x @ kernel + bias in the dtype of x. x (…, D), kernel (D, F), bias (F,) or None -> (…, F)."""
    y = _product(x, kernel.astype(x.dtype))
    return y if bias is None else y + bias.astype(x.dtype)


def without_padding(x: Float[Array, "B M D"], length: int) -> Float[Array, "B M D"]:
    """Returns x with 0 for every token from `length` on."""
    return jnp.where(jnp.arange(x.shape[1])[:, None] < length, x, 0)


def linear_of_padded(
    x: Float[Array, "B M D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"], length: int
) -> Float[Array, "B M F"]:
    """Returns `linear` of sequences whose tokens from `length` on are padding, which may be NaN.

    Neither these nor their gradients reach the gradients of kernel and bias.
    """
    return linear(x, kernel, bias) if x.shape[1] == length else _linear_of_padded(length, x, kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_of_padded(length: int, x: Array, kernel: Array, bias: Array) -> Array:
    return linear(x, kernel, bias)


def _padded_fwd(length, x, kernel, bias):
    return linear(x, kernel, bias), (x, kernel, bias)


def _padded_bwd(length, residuals, g):
    x, kernel, bias = residuals
    dx, _, _ = jax.vjp(linear, x, kernel, bias)[1](g)
    kept_x, kept_g = without_padding(x, length), without_padding(g, length)
    _, dkernel, dbias = jax.vjp(linear, kept_x, kernel, bias)[1](kept_g)
    return dx, dkernel, dbias


_linear_of_padded.defvjp(_padded_fwd, _padded_bwd)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """Returns x @ kernel, whose kernel gradient is x^T g as it stands.

    JAX's own is (g^T x)^T, for which XLA on CPU transposes the gradient of the residual stream and computes
    the layer norms it comes through again for each column: a quarter of a training step (benchmarks/LOG.md).
    """
    return einsum("...d,df->...f", x, kernel)


def _product_fwd(x, kernel):
    return einsum("...d,df->...f", x, kernel), (x, kernel)


def _product_bwd(residuals, g):
    # XLA drops the gradient of a frozen kernel, and with it the residual that only this gradient needs.
    x, kernel = residuals
    dx = einsum("...f,df->...d", g, kernel)
    x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    return dx, lax.dot_general(x, g, (((0,), (0,)), ((), ())))


_product.defvjp(_product_fwd, _product_bwd)
