"""The pre-LayerNorm transformer of both CLIP towers; each block's feed-forward layer is dense or MoE.

Letters: B batch, L length, T of it without padding, D width, H heads, F feed-forward hidden width, M MoE
blocks, E experts, S shards of B / S rows each (one row, or all rows that a device has of a microbatch), P
pooled positions of a shard.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from clipmoe_jax.core.checks import number, whole_number
from clipmoe_jax.core.sharding import split_batch
from clipmoe_jax.models.attention import (
    attention,
    cudnn_attention,
    pad_to_even_length,
    saves_cudnn,
    xla_attention,
)
from clipmoe_jax.models.dispatch import ROUTING
from clipmoe_jax.models.feed_forward import ACTIVATIONS, HIDDEN, Mlp
from clipmoe_jax.models.linear import Linear, linear_of_padded, without_padding
from clipmoe_jax.models.moe import MoeBlock, MoeMlp, gather

Array = jax.Array


MOST_EXPERTS = 1000
REMAT = ("none", "dots", "full")
EXPERT_LAYERS = ("feed_forward", "attention_and_feed_forward")
# The arrays that remat="dots" keeps of a block besides its input: queries, keys and values; the output of
# attention (of cuDNN's by `saves_cudnn`); the residual stream after attention; hidden activations; where
# routers send tokens.
KEPT = ("qkv", "attended", "attention_added", HIDDEN, ROUTING)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """The architecture of MoE blocks.

    num_moe_layers: how many of the last blocks of each tower are MoE; None is all. sequence_share: how often
    the mean over a token's sequence is added to what its router sees, the token (`moe.add_sequence_mean`);
    above 0 routers see both with their `moe.magnitudes`. expert_layers: what of a block is an expert, one of
    EXPERT_LAYERS.
    Raises ValueError for fields out of range.
    """

    num_experts: int = 4
    num_selected_experts: int = 2
    num_moe_layers: int | None = None
    sequence_share: float = 0.0
    expert_layers: str = "feed_forward"

    def __post_init__(self):
        if self.expert_layers not in EXPERT_LAYERS:
            shown = reprlib.repr(self.expert_layers)
            raise ValueError(f"expert_layers={shown}: choose one of {', '.join(EXPERT_LAYERS)}")
        for name in ("num_experts", "num_selected_experts"):
            whole_number(name, getattr(self, name), MOST_EXPERTS, least=0)
        number("sequence_share", self.sequence_share, 1e3)
        if not 1 <= self.num_selected_experts <= self.num_experts:
            raise ValueError(
                f"num_selected_experts={self.num_selected_experts} must lie between 1 and "
                f"num_experts={self.num_experts}"
            )
        if self.num_moe_layers is not None:
            whole_number("num_moe_layers", self.num_moe_layers, 1000)

    def router_width(self, width: int) -> int:
        """Returns how many numbers of a token a router sees, in blocks of this width (`moe.magnitudes`)."""
        return 2 * width if self.sequence_share else width

    @property
    def has_attention(self) -> bool:
        """Returns whether attention is of the experts."""
        return self.expert_layers == "attention_and_feed_forward"


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """Settings of the computation, none of which changes the parameters.

    dtype: of activations and matrix products (norm statistics, router and losses stay float32).
    remat: what the backward pass computes again. "none": nothing; "dots": all but the products with weights
    (KEPT), so norms, activations and, where cuDNN does not attend, scores; "full": each block from its input.
    dispatch: "ragged", "capacity" or "dense" (models/dispatch.py).
    grouped_mlp: how "ragged" runs the experts, by platform (`experts.GROUPED_MLPS`).
    attention: by platform and dtype (`attention.default_implementation`).
    mlp_chunk_rows: how many rows of a dense feed-forward layer are computed at a time on one device, for CPUs
    (models/feed_forward.py); 0 is all.
    encoded_values: how many values of the residual stream are computed at a time where nothing trains, on one
    device, for CPUs (`encoder.make_encode`); 0 is all, as for "capacity", where rows share one.
    expert_dropout_rate: after the activation inside experts, when a call is not deterministic.
    router_gradient: "chosen" or "all" experts (`moe.straight_through`, which runs all on every token).
    compiler_options: of XLA, (name, value), for a training step.
    """

    dtype: str = "float32"
    remat: str = "none"
    dispatch: str = "ragged"
    grouped_mlp: str = "blocks"
    attention: str = "xla"
    mlp_chunk_rows: int = 0
    encoded_values: int = 0
    capacity_factor: float = 1.25
    expert_dropout_rate: float = 0.0
    router_gradient: str = "chosen"
    compiler_options: tuple[tuple[str, str], ...] = ()


def num_visited_experts(moe: MoeConfig | None, router_gradient: str) -> int:
    """Returns how many experts run on a token in a step with this gradient, 0 in a dense model."""
    if moe is None:
        return 0
    return moe.num_experts if router_gradient == "all" else moe.num_selected_experts


class Attention(nn.Module):
    """Multi-head self-attention. x (B, L, D) -> (B, L, D); segments (B, T) int32, None is one per row.

    length: T, for "cudnn" alone; None is L. Tokens from there on are padding: no token attends to them, their
    output is 0, and so is their gradient.
    value_attention: values stand for queries and keys too, softmax(v vᵀ / √head width) v, so that tokens
    attend to those that are like them (CLIP Surgery, arXiv 2304.05653).
    """

    num_heads: int
    causal: bool
    implementation: str
    dtype: jnp.dtype
    value_attention: bool = False
    length: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B L D"]:
        _, whole, width = x.shape
        is_padded = self.implementation == "cudnn"
        in_proj = Linear(3 * width, width**-0.5, self.dtype, name="in_proj")
        out_proj = Linear(width, width**-0.5, self.dtype, name="out_proj")
        if self.implementation not in ("cudnn", "xla") or self.value_attention:
            how = self.num_heads, self.causal, self.implementation
            return out_proj(_attend(in_proj(x), *how, segments, self.value_attention))
        # Separate products give queries, keys and values without a copy, padded to an even length for cuDNN.
        x, length = x.astype(self.dtype), self.length or whole
        if is_padded:
            x = pad_to_even_length(x) if whole == length else without_padding(x, length)

        def project(kernel: jax.Array, bias: jax.Array) -> jax.Array:
            part = checkpoint_name(linear_of_padded(x, kernel, bias, length), "qkv")
            return part.reshape(*x.shape[:2], self.num_heads, width // self.num_heads)

        kernels, biases = (jnp.split(w, 3, axis=-1) for w in in_proj.weights(width))
        query, key, value = map(project, kernels, biases)
        if is_padded:
            y = cudnn_attention(query, key, value, length, causal=self.causal, segments=segments)
        else:
            y = xla_attention(query, key, value, causal=self.causal, segments=segments)
            y = checkpoint_name(y, "attended")
        y = linear_of_padded(y.reshape(x.shape), *out_proj.weights(width), length)
        return y[:, :length] if whole == length else without_padding(y, length)


def _attend(
    qkv: Float[Array, "B L W"],
    num_heads: int,
    causal: bool,
    implementation: str,
    segments: Int[Array, "B L"] | None,
    value_attention: bool,
) -> Float[Array, "B L W//3"]:
    """Lets tokens attend to each other; qkv: W = 3 D, the other arguments as of `Attention`."""
    batch, length, width = qkv.shape
    width //= 3
    if value_attention:
        qkv = jnp.tile(qkv[..., 2 * width :], 3)
    qkv = checkpoint_name(qkv, "qkv").reshape(batch, length, 3, num_heads, width // num_heads)
    y = attention(qkv, causal=causal, segments=segments, implementation=implementation)
    y = y.reshape(batch, length, width)
    return y if implementation == "cudnn" else checkpoint_name(y, "attended")


class Block(nn.Module):
    """One residual block. x (B, L, D), segments as in `Attention` -> (x, aux): MoeMlp's aux, else empty.

    sequences (B, T) int32 as in `moe.add_sequence_mean`, for routers that see them. pooled_positions (S, P)
    int32 as in `moe.gather`: only these tokens come out, as (S, P, D), and the feed-forward layer is computed
    for them alone; None is all tokens, as (B, L, D). value_attention, length: as of `Attention`.
    """

    num_heads: int
    mlp_width: int
    activation: str
    layer_norm_eps: float
    causal: bool
    moe: MoeConfig | None
    compute: ComputeConfig
    deterministic: bool
    value_attention: bool = False
    length: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        segments: Int[Array, "B T"] | None = None,
        pooled_positions: Int[Array, "S P"] | None = None,
        sequences: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "... D"], dict[str, Array]]:
        dtype = jnp.dtype(self.compute.dtype)
        ln_1, ln_2 = (layer_norm(self.layer_norm_eps, dtype, name) for name in ("ln_1", "ln_2"))
        activation, h = ACTIVATIONS[self.activation], ln_1(x)
        moe = None if self.moe is None else self._moe(self.moe, activation, dtype)
        router_logits, dropped_slots = None, 0
        how = self.num_heads, self.causal, self.compute.attention
        if isinstance(moe, MoeBlock):
            router_logits = moe.logits(h, sequences)
            qkv, dropped_in = moe.project("in_proj", h, router_logits)
            y = _attend(qkv, *how, segments, self.value_attention)
            y, dropped_out = moe.project("out_proj", y, router_logits)
            dropped_slots = dropped_in + dropped_out
        else:
            y = Attention(*how, dtype, self.value_attention, self.length, name="attn")(h, segments)
        x = checkpoint_name(x + y, "attention_added")
        if moe is None:
            x = gather(x, pooled_positions)
            mlp = Mlp(self.mlp_width, activation, dtype, self.compute.mlp_chunk_rows, name="mlp")
            return x + mlp(ln_2(x)), {}
        h = ln_2(x)
        if router_logits is None:
            router_logits = moe.logits(h, sequences)
        y, dropped = moe.feed_forward(h, router_logits, pooled_positions)
        aux = {"router_logits": router_logits, "dropped_slots": dropped_slots + dropped}
        return gather(x, pooled_positions) + y, aux

    def _moe(self, moe: MoeConfig, activation: Callable[[Array], Array], dtype: jnp.dtype) -> MoeMlp:
        """The experts of a block, with attention among their layers or not."""
        kind = MoeBlock if moe.has_attention else MoeMlp
        return kind(
            num_experts=moe.num_experts,
            num_selected_experts=moe.num_selected_experts,
            hidden_dim=self.mlp_width,
            activation=activation,
            dispatch=self.compute.dispatch,
            grouped_mlp=self.compute.grouped_mlp,
            sequence_share=moe.sequence_share,
            router_gradient=self.compute.router_gradient,
            capacity_factor=self.compute.capacity_factor,
            dropout_rate=self.compute.expert_dropout_rate,
            deterministic=self.deterministic,
            dtype=dtype,
            name="moe",
        )


def apply_blocks(
    x: Float[Array, "B L D"],
    pooled_positions: Int[Array, "S P"],
    segments: Int[Array, "B L"] | None = None,
    sequences: Int[Array, "B L"] | None = None,
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
    value_attention: bool = False,
) -> tuple[Float[Array, "S*P D"], dict[str, Array]]:
    """Runs a tower's blocks; call it inside a tower's compact method, which owns `resblocks_i`.

    x (B, L, D), the other arrays as in `Block` -> (S * P, D) and aux, whose leaves are stacked over the MoE
    blocks on axis 1: router_logits (B, M, L, E) float32, dropped_slots (B, M) int32; empty for a dense tower.
    The feed-forward layer of the last block is computed for the pooled positions alone. value_attention: of
    the last block, as of `Attention`.
    """
    block_class = _block_class(compute.remat)
    first_moe = first_moe_layer(num_layers, moe)
    block_aux, length = [], None
    if compute.attention == "cudnn" and moe is None and not value_attention and x.shape[1] % 2:
        # Padded once and not in every block. A batch of a multiple of four then has rows that Tensor Cores
        # take as they are, which XLA would pad for every product.
        length = x.shape[1]
        pooled_positions = pooled_positions + pooled_positions // length
        x = jnp.concatenate([x, jax.lax.stop_gradient(x[:, -1:])], axis=1)  # a token that every norm can take
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
            value_attention=value_attention and i == num_layers - 1,
            length=length,
            name=f"resblocks_{i}",
        )
        pooled = pooled_positions if i == num_layers - 1 else None
        x, aux = block(split_batch(x), segments, pooled, sequences)
        if aux:
            block_aux.append(aux)
    x = x.reshape(-1, x.shape[-1])
    if not block_aux:
        return x, {}
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *block_aux)


@functools.cache
def _block_class(remat: str) -> type[Block]:
    """Returns Block jitted, with `remat`, one class for all calls.

    JAX keeps the trace with the class that `nn.jit` returns, so blocks that are alike are traced once. (A
    profile shows all of them under the first one's name.)
    """
    if remat == "none":
        return nn.jit(Block)
    policy = None  # keeps nothing
    if remat == "dots":
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(policies.save_only_these_names(*KEPT), saves_cudnn)
    return nn.jit(nn.remat(Block, policy=policy))


def first_moe_layer(num_layers: int, moe: MoeConfig | None) -> int:
    """Returns the index of a tower's first MoE block, `num_layers` if there is none."""
    if moe is None:
        return num_layers
    if moe.num_moe_layers is None:
        return 0
    return max(0, num_layers - moe.num_moe_layers)


def layer_norm(eps: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Returns a LayerNorm over D with float32 statistics."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)
