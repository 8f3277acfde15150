"""Dropout of hidden activations that keeps no mask and draws none twice.

Letters: W words of a random key, F hidden width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, UInt32

Array = jax.Array


class Dropout(NamedTuple):
    """Drops hidden activations at a rate.

    A dropped activation is -inf in the array of hidden activations itself: its gradient is known from that
    array alone. (An activation that overflows to -inf counts as dropped; the activation functions tend to 0
    there.) words: (W,) uint32 of a random key; None will do at rate 0.
    """

    rate: float = 0.0
    words: Array | np.ndarray | None = None

    def drop(self, h: Float[Array, "rows *E F"], first_row: Array | int = 0) -> Float[Array, "rows *E F"]:
        """Returns h (rows, …, F) with -inf where it is dropped; `first_row`: the number of its first row."""
        if self.rate == 0:
            return h
        assert self.words is not None, "dropout takes the words of a random key"
        kept = random_bits(self.words, h.shape, first_row) >= jnp.uint32(self.rate * 2**32)
        # A sum, not a choice, whose gradient would need the mask.
        return h + jnp.where(kept, 0, -jnp.inf).astype(h.dtype)

    def scale(
        self, activation: Callable[[Array], Array], h: Float[Array, "rows *E F"]
    ) -> Float[Array, "rows *E F"]:
        """Returns activation(h) for h as `drop` returns it: 0 where dropped, elsewhere over 1 - rate."""
        if self.rate == 0:
            return activation(h)
        kept = h != -jnp.inf  # true for a NaN, which must not be hidden
        return jnp.where(kept, activation(jnp.where(kept, h, 0)) / (1 - self.rate), 0)


def random_bits(
    words: UInt32[Array | np.ndarray, " W"], shape: tuple[int, ...], first_row: Array | int
) -> UInt32[Array, "..."]:
    """Returns uint32 (rows, …), the same for a row whichever rows are asked for with it.

    MurmurHash3's 32-bit finalizer of each element's number, once for each word: a tenth of the operations of
    `jax.random.bits`, so that dropout costs next to nothing (benchmarks/LOG.md).
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bits = jnp.uint32(first_row) * jnp.uint32(strides[0])
    for axis, stride in enumerate(strides):
        bits += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    for word in words:
        bits ^= word
        bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
        bits ^= bits >> 16
    return bits
