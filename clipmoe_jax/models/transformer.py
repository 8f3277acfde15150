"""The pre-LayerNorm transformer of both CLIP towers; each block's feed-forward layer is dense or MoE.

Letters: B batch, L length, D width, H heads, F feed-forward hidden width, M MoE blocks, E experts; U units of
B / U rows each (a row, or what a device has of them) and P tokens that are read of each unit.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipmoe_jax.core.sharding import split_batch
from clipmoe_jax.models.attention import attention
from clipmoe_jax.models.dispatch import ROUTING
from clipmoe_jax.models.linear import HIDDEN, Linear, Mlp
from clipmoe_jax.models.moe import MoeMlp, pick

Array = jax.Array


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), OpenAI CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU, as open_clip's LAION models use."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


REMAT = ("none", "dots", "full")
# What remat="dots" keeps of a block, besides its input: queries, keys and values; what attention makes of
# them; the stream after attention; the hidden layer before its activation; where routers send tokens.
KEPT = ("qkv", "attended", "attention_added", HIDDEN, ROUTING)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """What a MoE block is. `num_moe_layers`: how many of the last blocks of each tower; None is all."""

    num_experts: int = 4
    num_selected_experts: int = 2
    num_moe_layers: int | None = None

    def __post_init__(self):
        if not 1 <= self.num_selected_experts <= self.num_experts:
            raise ValueError(
                f"num_selected_experts={self.num_selected_experts} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.num_moe_layers is not None and self.num_moe_layers < 1:
            raise ValueError(f"num_moe_layers={self.num_moe_layers} must be at least 1, or None for all")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed; none of it changes what the parameters are.

    dtype: of activations and matrix products (norm statistics, router and losses stay float32).
    remat: what the backward pass computes again. "none": nothing; "dots": all but the products with weights
    (KEPT), so scores, norms and activations; "full": each block from its input.
    dispatch: "ragged", "capacity" or "dense" (models/dispatch.py).
    grouped_mlp: what "ragged" runs experts by, "blocks" (CPU), "fixed_blocks" (GPU), "ragged_dot" (TPU) or
      "tokamax" (models/experts.py).
    attention: "xla", "chunked", "cudnn" or "pallas" (models/attention.py).
    mlp_chunk_rows: how many rows of a dense feed-forward layer are pulled back at a time (on one CPU device,
      models/linear.py); 0 is all.
    expert_dropout_rate: after the activation inside experts, when a call is not deterministic.
    compiler_options: of XLA, (name, value), for a training step.
    """

    dtype: str = "float32"
    remat: str = "none"
    dispatch: str = "ragged"
    grouped_mlp: str = "blocks"
    attention: str = "xla"
    mlp_chunk_rows: int = 0
    capacity_factor: float = 1.25
    expert_dropout_rate: float = 0.0
    compiler_options: tuple[tuple[str, str], ...] = ()


class Attention(nn.Module):
    """Multi-head self-attention. x (B, L, D) -> (B, L, D); segments (B, L) int32, None is one a row."""

    num_heads: int
    causal: bool
    implementation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, segments: Array | None = None) -> Array:
        batch, length, width = x.shape
        qkv = Linear(3 * width, width**-0.5, self.dtype, name="in_proj")(x)
        qkv = checkpoint_name(qkv, "qkv").reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        y = attention(qkv, causal=self.causal, segments=segments, implementation=self.implementation)
        y = checkpoint_name(y.reshape(batch, length, width), "attended")
        return Linear(width, width**-0.5, self.dtype, name="out_proj")(y)


class Block(nn.Module):
    """One residual block. x (B, L, D), segments as in `Attention` -> (x, aux): MoeMlp's aux, else empty.

    read (U, P) int32: which of each unit's L * B / U tokens come out, as (U, P, D), and are all that the
    feed-forward layer is computed for; None is all of them, as (B, L, D).
    """

    num_heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    causal: bool
    moe: MoeConfig | None
    compute: ComputeConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, x: Array, segments: Array | None = None, read: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        dtype = jnp.dtype(self.compute.dtype)
        x = x + Attention(self.num_heads, self.causal, self.compute.attention, dtype, name="attn")(
            layer_norm(self.layer_norm_eps, dtype, "ln_1")(x), segments
        )
        x = checkpoint_name(x, "attention_added")
        ln_2, activation = layer_norm(self.layer_norm_eps, dtype, "ln_2"), ACTIVATIONS[self.activation]
        if self.moe is None:
            x = pick(x, read)
            mlp = Mlp(self.mlp_width, activation, dtype, self.compute.mlp_chunk_rows, name="mlp")
            return x + mlp(ln_2(x)), {}
        y, aux = MoeMlp(
            num_experts=self.moe.num_experts,
            num_selected_experts=self.moe.num_selected_experts,
            hidden_dim=self.mlp_width,
            activation=activation,
            dispatch=self.compute.dispatch,
            grouped_mlp=self.compute.grouped_mlp,
            capacity_factor=self.compute.capacity_factor,
            dropout_rate=self.compute.expert_dropout_rate,
            deterministic=self.deterministic,
            dtype=dtype,
            name="moe",
        )(ln_2(x), read)
        return pick(x, read) + y, aux


def apply_blocks(
    x: Array,
    read: Array,
    segments: Array | None = None,
    *,
    num_layers: int,
    num_heads: int,
    mlp_width: int,
    activation: str,
    layer_norm_eps: float,
    causal: bool,
    moe: MoeConfig | None,
    compute: ComputeConfig,
    deterministic: bool,
) -> tuple[Array, dict[str, Array]]:
    """Runs a tower's blocks; call it inside a tower's compact method, which owns `resblocks_i`.

    x (B, L, D), read and segments as in `Block` -> (U * P, D) and aux, whose leaves are stacked over the MoE
    blocks on axis 1: router_logits (B, M, L, E) float32, dropped_slots (B, M) int32; empty for a dense tower.
    The feed-forward layer of the last block is computed for the tokens that are read alone.
    """
    block_class = _block_class(compute.remat)
    first_moe = first_moe_layer(num_layers, moe)
    block_aux = []
    for i in range(num_layers):
        block = block_class(
            num_heads=num_heads,
            mlp_width=mlp_width,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            causal=causal,
            moe=moe if i >= first_moe else None,
            compute=compute,
            deterministic=deterministic,
            name=f"resblocks_{i}",
        )
        x, aux = block(split_batch(x), segments, read if i == num_layers - 1 else None)
        if aux:
            block_aux.append(aux)
    x = x.reshape(-1, x.shape[-1])
    if not block_aux:
        return x, {}
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *block_aux)


@functools.cache
def _block_class(remat: str) -> type[Block]:
    """Traced once for all blocks that are alike, and for all calls: what is compiled is kept with the class
    that `nn.jit` returns. (A profile then has the first one's name for all.)"""
    if remat == "none":
        return nn.jit(Block)
    keep = KEPT if remat == "dots" else ()
    return nn.jit(nn.remat(Block, policy=jax.checkpoint_policies.save_only_these_names(*keep)))


def first_moe_layer(num_layers: int, moe: MoeConfig | None) -> int:
    """Index of the first MoE block of a tower (`num_layers` if there is none)."""
    if moe is None:
        return num_layers
    if moe.num_moe_layers is None:
        return 0
    return max(0, num_layers - moe.num_moe_layers)


def layer_norm(eps: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over D with float32 statistics."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)
