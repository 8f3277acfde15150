"""Dropout of hidden activations that keeps no mask and draws none twice.

Letters: W words of a random key, at least two; F hidden width.
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


# Added to what is dropped. Each of `feed_forward.ACTIVATIONS` is 0 there, and so is its gradient, if what
# arrives at it is below 1e8; in float32 and bfloat16, not in float16, which has no such number. -inf would
# give NaN: the functions multiply it by 0.
DROPPED = -1e30


class Dropout(NamedTuple):
    """Drops hidden activations at a rate.

    A dropped activation is near DROPPED in the array of hidden activations itself, where activation functions
    are 0 and flat: neither pass needs a mask. words: (W,) uint32 of a random key; None will do at rate 0.
    """

    rate: float = 0.0
    words: Array | np.ndarray | None = None

    def drop(self, h: Float[Array, "rows *E F"], first_row: Array | int = 0) -> Float[Array, "rows *E F"]:
        """Returns h (rows, …, F), near DROPPED where dropped; `first_row`: the number of its first row."""
        if self.rate == 0:
            return h
        assert self.words is not None, "dropout takes the words of a random key"
        kept = random_bits(self.words, h.shape, first_row) >= jnp.uint32(self.rate * 2**32)
        # A sum, not a choice, whose gradient would need the mask.
        return h + jnp.where(kept, 0, DROPPED).astype(h.dtype)

    def scale(
        self, activation: Callable[[Array], Array], h: Float[Array, "rows *E F"]
    ) -> Float[Array, "rows *E F"]:
        """Returns activation(h) for h as `drop` returns it: 0 where dropped, elsewhere over 1 - rate."""
        return activation(h) if self.rate == 0 else activation(h) / (1 - self.rate)


def random_bits(
    words: UInt32[Array | np.ndarray, " W"], shape: tuple[int, ...], first_row: Array | int
) -> UInt32[Array, "..."]:
    """Returns uint32 (rows, …), the same for a row whichever rows are asked for with it.

    SplitMix (Steele, Lea and Flood, OOPSLA 2014) of 32 bits: an element's number times an odd word, from
    another word on, then MurmurHash3's 32-bit finalizer. That is a tenth of the operations of
    `jax.random.bits`, and still a GPU waits for them (benchmarks/LOG.md, "Instructions of expert dropout").
    """
    start, gamma = words[0], words[1] | jnp.uint32(1)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bits = start + jnp.uint32(first_row) * jnp.uint32(strides[0]) * gamma
    for axis, stride in enumerate(strides):
        bits += lax.broadcasted_iota(jnp.uint32, shape, axis) * (jnp.uint32(stride) * gamma)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return bits ^ bits >> 16
