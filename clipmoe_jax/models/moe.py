"""The mixture-of-experts feed-forward layer of CLIP-MoE.

Letters: B batch, L length, N = B*L tokens, D width, F expert hidden width, E experts, K selected experts; U
units of B / U rows each and P tokens that are read of each unit.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from clipmoe_jax.core.sharding import BATCH_AXES, EXPERT_AXIS, devices_in_use, split_batch
from clipmoe_jax.models import dispatch
from clipmoe_jax.models.experts import Experts, Hidden

Array = jax.Array


def route(router_logits: Array, num_selected_experts: int) -> tuple[Array, Array]:
    """Chooses experts for each token: softmax over all, keep the K largest, divide by their sum.

    router_logits (..., E) float32 -> gates (..., K) float32, expert_ids (..., K) int32.
    arXiv 2409.19291, section 3.1; ties go to the lower id.
    """
    probabilities = jax.nn.softmax(router_logits, axis=-1)
    # K times the largest of what is left: `lax.top_k` is not partitioned, every device would route the tokens
    # of all.
    left, gates, expert_ids = lax.stop_gradient(probabilities), [], []
    for _ in range(num_selected_experts):
        expert_id = jnp.argmax(left, axis=-1)
        chosen = jax.nn.one_hot(expert_id, router_logits.shape[-1], dtype=probabilities.dtype)
        gates.append(jnp.sum(probabilities * chosen, axis=-1))
        expert_ids.append(expert_id)
        left = jnp.where(chosen > 0, -1.0, left)
    gates = jnp.stack(gates, axis=-1)
    return gates / gates.sum(axis=-1, keepdims=True), jnp.stack(expert_ids, axis=-1)


def pick(x: Array, read: Array | None) -> Array:
    """Some of each unit's tokens: x (B, L, D), read (U, P) int32 places among its L * B / U -> (U, P, D).

    None picks all, (B, L, D). Unit by unit, so that nothing travels where a mesh splits units.
    """
    if read is None:
        return x
    return split_batch(jnp.take_along_axis(x.reshape(len(read), -1, x.shape[-1]), read[..., None], axis=1))


class StackedLinear(nn.Module):
    """The parameters of E linear layers: kernel (E, in, out) and bias (E, out)."""

    num_experts: int
    in_features: int
    out_features: int
    kernel_stddev: float

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape = (self.num_experts, self.in_features, self.out_features)
        kernel = self.param("kernel", nn.initializers.normal(self.kernel_stddev), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (shape[0], shape[2]))
        return kernel, bias


class MoeMlp(nn.Module):
    """E feed-forward layers of which each token visits K. Nothing is dropped unless `dispatch="capacity"`.

    Call: x (B, L, D) -> y (B, L, D) in `dtype`, aux with
      router_logits (B, L, E) float32,
      dropped_slots (B,) int32: routed slots thrown away, of L*K.
    With read (U, P) int32 as in `pick` every token is routed, only those visit their experts: y (U, P, D).
    """

    num_experts: int
    num_selected_experts: int
    hidden_dim: int
    activation: Callable[[Array], Array]
    dispatch: str = "ragged"
    grouped_mlp: str = "blocks"
    capacity_factor: float = 1.25
    dropout_rate: float = 0.0
    deterministic: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, read: Array | None = None) -> tuple[Array, dict[str, Array]]:
        (batch, length, width), num_experts = x.shape, self.num_experts
        router_logits = nn.Dense(
            num_experts,
            use_bias=False,
            dtype=jnp.float32,
            precision=lax.Precision.HIGHEST,
            kernel_init=nn.initializers.normal(0.02),
            name="router",
        )(x.astype(jnp.float32))
        router_logits = checkpoint_name(router_logits, dispatch.ROUTING)
        tokens = pick(x, read)
        gates, expert_ids = route(pick(router_logits, read), self.num_selected_experts)

        fc_stddev, proj_stddev = (2 * width) ** -0.5, self.hidden_dim**-0.5
        experts = Experts(
            *StackedLinear(num_experts, width, self.hidden_dim, fc_stddev, name="c_fc")(),
            *StackedLinear(num_experts, self.hidden_dim, width, proj_stddev, name="c_proj")(),
        )
        experts = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), experts)

        dropping = self.dropout_rate > 0 and not self.deterministic
        y, dropped = _run_experts(
            tokens.reshape(-1, width).astype(self.dtype),
            gates.reshape(-1, self.num_selected_experts),
            expert_ids.reshape(-1, self.num_selected_experts),
            experts,
            dropout_key=self.make_rng("dropout") if dropping else None,
            dropout_rate=self.dropout_rate if dropping else 0.0,
            activation=self.activation,
            name=self.dispatch,
            capacity_factor=self.capacity_factor,
            grouped_mlp=self.grouped_mlp,
        )
        if read is not None:
            units = jnp.arange(len(read))[:, None]
            of_units = jnp.zeros((len(read), batch * length // len(read)), jnp.int32)
            dropped = of_units.at[units, read].add(dropped.reshape(read.shape))
        dropped_slots = dropped.reshape(batch, length).sum(axis=1)
        return y.reshape(tokens.shape), {"router_logits": router_logits, "dropped_slots": dropped_slots}


def _run_experts(
    x: Array,
    gates: Array,
    expert_ids: Array,
    experts: Experts,
    *,
    dropout_key: Array | None,
    dropout_rate: float,
    activation: Callable[[Array], Array],
    name: str,
    capacity_factor: float,
    grouped_mlp: str,
) -> tuple[Array, Array]:
    """Dispatch on one device, or on each device's own tokens and experts under a mesh."""

    def run(x, gates, expert_ids, experts, key, expert_axis=None):
        words = None if key is None else jax.random.key_data(key)
        hidden = Hidden(activation, words, dropout_rate)
        run_experts = dispatch.make_dispatch(name, capacity_factor, grouped_mlp, expert_axis)
        return run_experts(x, gates, expert_ids, experts, hidden)

    if devices_in_use() == 1:
        return run(x, gates, expert_ids, experts, dropout_key)
    split = jax.sharding.get_abstract_mesh().shape[EXPERT_AXIS] > 1

    def on_device(x, gates, expert_ids, experts, key):
        if key is not None:
            key = jax.random.fold_in(key, lax.axis_index(BATCH_AXES))
        return run(x, gates, expert_ids, experts, key, EXPERT_AXIS if split else None)

    tokens, stacked = PartitionSpec(BATCH_AXES), PartitionSpec(EXPERT_AXIS)
    return jax.shard_map(
        on_device,
        in_specs=(tokens, tokens, tokens, stacked, PartitionSpec()),
        out_specs=tokens,
        check_vma=False,  # loops over blocks begin with sums, and memory, that vary over no axis
    )(x, gates, expert_ids, experts, dropout_key)
