"""The feed-forward layer: one definition for dense blocks, for experts under every dispatch, for analyses.

Letters: N tokens (or rows of tokens), D width, F hidden width, O output width (D of feed-forward layers).

It comes in two halves, `expand` to the hidden activations h and `contract` back, because a backward pass
written over blocks of rows keeps h between them. Experts of attention have the second half alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from clipmoe_jax.core.sharding import devices_in_use
from clipmoe_jax.models.dropout import Dropout
from clipmoe_jax.models.linear import Linear, linear

Array = jax.Array

HIDDEN = "hidden"  # the name under which remat finds the hidden activations, before the activation function


def quick_gelu(x: Array) -> Array:
    """Returns x * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """Returns the exact (erf) GELU, as open_clip's LAION models use."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


def identity(x: Array) -> Array:
    """Returns x: the activation of one linear layer."""
    return x


class Weights(NamedTuple):
    """The weights of one feed-forward layer; those of E experts have a leading axis E.

    fc_kernel and fc_bias None: one linear layer, whose h is x, F = D. proj_bias None: the caller adds it.
    """

    fc_kernel: Float[Array, "... D F"] | None
    fc_bias: Float[Array, "... F"] | None
    proj_kernel: Float[Array, "... F O"]
    proj_bias: Float[Array, "... O"] | None

    @classmethod
    def of_params(cls, params: Mapping[str, Any]) -> "Weights":
        """Returns the weights of a param tree with the layers c_fc and c_proj."""
        c_fc, c_proj = params["c_fc"], params["c_proj"]
        return cls(c_fc["kernel"], c_fc["bias"], c_proj["kernel"], c_proj["bias"])


# How a dispatch applies the linear layers of its experts: (x, kernel, bias or None) -> y.
ApplyLinear = Callable[[Array, Array, Array | None], Array]


class FeedForward(NamedTuple):
    """A feed-forward layer apart from its weights: activation function and expert dropout."""

    activation: Callable[[Array], Array]
    dropout: Dropout = Dropout()

    def __call__(
        self,
        x: Float[Array, "*N D"],
        weights: Weights,
        gates: Float[Array, "..."] | None = None,
        *,
        apply: ApplyLinear = linear,
    ) -> Float[Array, "... O"]:
        """Runs the layer. x (N, D), gates as in `contract` -> (N, O)."""
        h = checkpoint_name(self.expand(x, weights, apply=apply), HIDDEN)
        return self.contract(h, weights, gates, apply=apply)

    def expand(
        self,
        x: Float[Array, "*N D"],
        weights: Weights,
        first_row: Array | int = 0,
        *,
        apply: ApplyLinear = linear,
    ) -> Float[Array, "... F"]:
        """Returns the hidden activations before the activation function, near DROPPED where dropped.

        x (N, D), the rows from `first_row` of all those that dropout draws for -> (N, F).
        """
        if weights.fc_kernel is None:
            return x
        return self.dropout.drop(apply(x, weights.fc_kernel, weights.fc_bias), first_row)

    def contract(
        self,
        h: Float[Array, "... F"],
        weights: Weights,
        gates: Float[Array, "..."] | None = None,
        *,
        apply: ApplyLinear = linear,
    ) -> Float[Array, "... O"]:
        """Returns the output for hidden activations of `expand`. h (N, F) -> (N, O).

        gates (N, 1) float32 multiply the activations, which is the same as to multiply the output without
        proj_bias: so the output of each routed slot is neither kept nor needed for the gate's gradient.
        """
        activated = self._activate(h) if gates is None else self._activate_and_gate(h, gates)
        return apply(activated, weights.proj_kernel, weights.proj_bias)

    def _activate(self, h: Array) -> Array:
        return self.dropout.scale(self.activation, h)

    def _activate_and_gate(self, h: Array, gates: Array) -> Array:
        """Recomputes in the backward pass: a token has K times the activations of a dense layer."""

        def gated(h, gates):
            # In float32: a token's gates sum to 1, so the router learns from the difference of their
            # gradients, which nearly equal experts would lose in half precision.
            return (self._activate(h) * gates).astype(h.dtype)

        return jax.checkpoint(gated, prevent_cse=False)(h, gates)


class Mlp(nn.Module):
    """The dense feed-forward layer. x (B, L, D) -> (B, L, D).

    chunk_rows: how many of the B*L rows are computed at a time, on one device; 0 is all.
    """

    hidden_dim: int
    activation: Callable[[Array], Array]
    dtype: jnp.dtype
    chunk_rows: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        width = x.shape[-1]
        c_fc = Linear(self.hidden_dim, (2 * width) ** -0.5, self.dtype, name="c_fc")
        c_proj = Linear(width, self.hidden_dim**-0.5, self.dtype, name="c_proj")
        weights = Weights(*c_fc.weights(width), *c_proj.weights(self.hidden_dim))
        run, x = FeedForward(self.activation), x.astype(self.dtype)
        if self.chunk_rows and devices_in_use() == 1:
            rows = x.reshape(-1, width)
            return _in_chunks(lambda chunk: run(chunk, weights), rows, self.chunk_rows).reshape(x.shape)
        return run(x, weights)


def _in_chunks(function: Callable[[Array], Array], rows: Array, chunk_rows: int) -> Array:
    """Applies a function of rows to a few rows at a time. rows (N, D) -> (N, D).

    Of a chunk only the hidden activations outlive the forward pass, so that on CPU arrays as wide as F stay
    in the cache. Without chunks XLA keeps three of them (N, F) for each block (benchmarks/LOG.md).
    """
    policy = jax.checkpoint_policies.save_only_these_names(HIDDEN)
    function = jax.checkpoint(function, policy=policy, prevent_cse=False)
    # The gradient of a split is a concatenation, of slices a sum of padded arrays.
    whole, rest = jnp.split(rows, [len(rows) // chunk_rows * chunk_rows])
    parts = []
    if len(whole):
        chunks = whole.reshape(-1, chunk_rows, rows.shape[1])
        parts.append(lax.map(function, chunks).reshape(whole.shape))
    if len(rest) == 1 and rest.dtype != jnp.float16:
        # For one row XLA copies kernels that are held transposed, and uses no instructions for bfloat16.
        parts += jnp.split(function(jnp.repeat(rest, 2, axis=0)), 2)[:1]
    elif len(rest):
        parts.append(function(rest))
    return jnp.concatenate(parts)
