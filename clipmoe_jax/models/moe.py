"""The mixture-of-experts layers of CLIP-MoE.

Letters: B batch, L length, N = B*L tokens, D width, O output width, F expert hidden width, E experts, K
selected experts, S shards of B / S rows each, P pooled positions of each shard.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from clipmoe_jax.core.sharding import BATCH_AXES, EXPERT_AXIS, devices_in_use, split_batch
from clipmoe_jax.models import dispatch
from clipmoe_jax.models.dropout import Dropout
from clipmoe_jax.models.feed_forward import FeedForward, Weights, identity

Array = jax.Array


def route(
    router_logits: Float[Array, "*N E"], num_selected_experts: int
) -> tuple[Float[Array, "*N K"], Int[Array, "*N K"]]:
    """Chooses experts for each token: softmax over all, keep the K largest, divide by their sum.

    router_logits (..., E) float32 -> gates (..., K) float32, expert_ids (..., K) int32.
    arXiv 2409.19291, section 3.1; ties go to the lower id.
    """
    probabilities = jax.nn.softmax(router_logits, axis=-1)
    # K times the largest of the remaining ones. XLA does not partition `lax.top_k`, with which every device
    # would route the tokens of all devices.
    remaining, gates, expert_ids = lax.stop_gradient(probabilities), [], []
    for _ in range(num_selected_experts):
        expert_id = jnp.argmax(remaining, axis=-1)
        chosen = jax.nn.one_hot(expert_id, router_logits.shape[-1], dtype=probabilities.dtype)
        gates.append(jnp.sum(probabilities * chosen, axis=-1))
        expert_ids.append(expert_id)
        remaining = jnp.where(chosen > 0, -1.0, remaining)
    chosen_gates = jnp.stack(gates, axis=-1)
    return chosen_gates / chosen_gates.sum(axis=-1, keepdims=True), jnp.stack(expert_ids, axis=-1)


def straight_through(
    router_logits: Float[Array, "*N E"], gates: Float[Array, "*N K"], expert_ids: Int[Array, "*N K"]
) -> tuple[Float[Array, "*N E"], Int[Array, "*N E"]]:
    """Lets the gradient reach the experts that were not chosen, with which a router learns what it missed.

    A straight-through estimator (arXiv 1308.3432): the gates' values are those of the chosen experts, 0 for
    the others, and their gradient is that of the softmax over all. Every expert then runs on every token.
    router_logits (..., E) float32, gates and expert_ids (..., K) as of `route` -> gates (..., E) float32,
    expert_ids (..., E) int32.
    """
    num_experts = router_logits.shape[-1]
    chosen = jax.nn.one_hot(expert_ids, num_experts, dtype=gates.dtype)
    values = jnp.einsum("...k,...ke->...e", gates, chosen, precision=lax.Precision.HIGHEST)
    probabilities = jax.nn.softmax(router_logits, axis=-1)
    all_ids = jnp.broadcast_to(jnp.arange(num_experts, dtype=expert_ids.dtype), router_logits.shape)
    return lax.stop_gradient(values - probabilities) + probabilities, all_ids


def add_sequence_mean(
    router_logits: Float[Array, "B L E"], sequences: Int[Array, "B L"] | None, share: float
) -> Float[Array, "B L E"]:
    """Adds `share` times the mean over its sequence to each token's router logits: (B, L, E) -> (B, L, E).

    As the router is linear, that is W f(x_t) + share · W mean_t(f(x)), where f(x) is what it sees of a token.
    sequences (B, L) int32: tokens of a row that share a number are one sequence; None is one sequence a row.
    """
    if sequences is None:
        return router_logits + share * router_logits.mean(axis=1, keepdims=True)
    same = (sequences[:, :, None] == sequences[:, None, :]).astype(router_logits.dtype)
    sums = jnp.einsum("blm,bme->ble", same, router_logits, precision=lax.Precision.HIGHEST)
    return router_logits + share * sums / same.sum(axis=-1, keepdims=True)


def gather(x: Float[Array, "B L D"], pooled_positions: Int[Array, "S P"] | None) -> Float[Array, "... D"]:
    """Returns the tokens at the pooled positions of each shard. x (B, L, D) -> (S, P, D).

    pooled_positions (S, P) int32: positions among the L * B / S tokens of the shard; None returns x as it is.
    Shard by shard, so that no token travels where a mesh splits the batch between shards.
    """
    if pooled_positions is None:
        return x
    shards = x.reshape(pooled_positions.shape[0], -1, x.shape[-1])
    return split_batch(jnp.take_along_axis(shards, pooled_positions[..., None], axis=1))


def magnitudes(x: Float[Array, "*N D"]) -> Float[Array, "*N 2*D"]:
    """Returns x beside its centred absolute values, |x| - mean_D |x|: what a router that sees sequences sees.

    Of a sequence a linear router of x alone sees the mean. With absolute values it also sees how far apart
    the tokens are, by which it tells kinds of images from the first block on, where tokens are patches
    (docs/findings.md). Centred, since they are all positive: their sum would be a bias, which a few steps
    grow until every token goes to one expert.
    """
    absolute = jnp.abs(x)
    return jnp.concatenate([x, absolute - absolute.mean(axis=-1, keepdims=True)], axis=-1)


class StackedLinear(nn.Module):
    """The parameters of E linear layers. A call returns kernel (E, in, out) and bias (E, out)."""

    num_experts: int

    @nn.compact
    def __call__(self, in_features: int, out_features: int, kernel_stddev: float) -> tuple[Array, Array]:
        shape = (self.num_experts, in_features, out_features)
        kernel = self.param("kernel", nn.initializers.normal(kernel_stddev), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (shape[0], shape[2]))
        return kernel, bias


class MoeMlp(nn.Module):
    """E feed-forward layers of which each token visits K. Nothing is dropped unless `dispatch="capacity"`.

    A call takes x (B, L, D) and returns y (B, L, D) in `dtype` and aux with
      router_logits (B, L, E) float32,
      dropped_slots (B,) int32: how many of the L*K routed slots were dropped.
    With pooled_positions as in `gather` every token is routed, but only the pooled ones visit their experts,
    and y is (S, P, D). With a sequence_share above 0 routers see their token and its sequence
    (`add_sequence_mean`), both with their `magnitudes`. router_gradient: which experts a gradient reaches,
    "chosen" or "all" (`straight_through`).
    """

    num_experts: int
    num_selected_experts: int
    hidden_dim: int
    activation: Callable[[Array], Array]
    dispatch: str = "ragged"
    grouped_mlp: str = "blocks"
    sequence_share: float = 0.0
    router_gradient: str = "chosen"
    capacity_factor: float = 1.25
    dropout_rate: float = 0.0
    deterministic: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.router = nn.Dense(
            self.num_experts,
            use_bias=False,
            dtype=jnp.float32,
            precision=lax.Precision.HIGHEST,
            kernel_init=nn.initializers.normal(0.02),
        )
        self.c_fc, self.c_proj = (StackedLinear(self.num_experts) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        pooled_positions: Int[Array, "S P"] | None = None,
        sequences: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "... D"], dict[str, Array]]:
        router_logits = self.logits(x, sequences)
        y, dropped_slots = self.feed_forward(x, router_logits, pooled_positions)
        return y, {"router_logits": router_logits, "dropped_slots": dropped_slots}

    def logits(self, x: Float[Array, "B L D"], sequences: Int[Array, "B L"] | None) -> Float[Array, "B L E"]:
        """Returns the router logits, float32."""
        x = x.astype(jnp.float32)
        if self.sequence_share:
            of_tokens = self.router(magnitudes(x))
            router_logits = add_sequence_mean(of_tokens, sequences, self.sequence_share)
        else:
            router_logits = self.router(x)
        return checkpoint_name(router_logits, dispatch.ROUTING)

    def feed_forward(
        self,
        x: Float[Array, "B L D"],
        router_logits: Float[Array, "B L E"],
        pooled_positions: Int[Array, "S P"] | None,
    ) -> tuple[Float[Array, "... D"], Int[Array, " B"]]:
        """Runs the feed-forward layers that the router chose. Returns y and dropped_slots as of a call."""
        batch, length, width = x.shape
        fc_stddev, proj_stddev = (2 * width) ** -0.5, self.hidden_dim**-0.5
        experts = Weights(
            *self.c_fc(width, self.hidden_dim, fc_stddev), *self.c_proj(self.hidden_dim, width, proj_stddev)
        )
        tokens, of_tokens = gather(x, pooled_positions), gather(router_logits, pooled_positions)
        rate = 0.0 if self.deterministic else self.dropout_rate
        y, dropped = self._run(tokens, of_tokens, experts, self.activation, rate)
        if pooled_positions is not None:  # back to where the pooled tokens came from
            num_shards = pooled_positions.shape[0]
            shards = jnp.zeros((num_shards, batch * length // num_shards), jnp.int32)
            rows = jnp.arange(num_shards)[:, None]
            dropped = shards.at[rows, pooled_positions].add(dropped.reshape(pooled_positions.shape))
        return y, dropped.reshape(batch, length).sum(axis=1)

    def _run(
        self,
        tokens: Array,
        router_logits: Array,
        experts: Weights,
        activation: Callable[[Array], Array],
        dropout_rate: float = 0.0,
    ) -> tuple[Array, Array]:
        """Runs experts on the tokens (…, D) that their logits (…, E) choose; what each token had dropped."""
        gates, expert_ids = route(router_logits, self.num_selected_experts)
        if self.router_gradient == "all":
            gates, expert_ids = straight_through(router_logits, gates, expert_ids)
        y, dropped = _run_experts(
            tokens.reshape(-1, tokens.shape[-1]).astype(self.dtype),
            gates.reshape(-1, gates.shape[-1]),
            expert_ids.reshape(-1, gates.shape[-1]),
            jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), experts),
            dropout_key=self.make_rng("dropout") if dropout_rate else None,
            dropout_rate=dropout_rate,
            activation=activation,
            name=self.dispatch,
            capacity_factor=self.capacity_factor,
            grouped_mlp=self.grouped_mlp,
        )
        return y.reshape(*tokens.shape[:-1], -1), dropped


class MoeBlock(MoeMlp):
    """E blocks of which each token visits K: experts of attention's projections too, under one router.

    A token's queries, keys, values and output are sums over its experts by gate, so that tokens of one
    sequence attend to each other whatever experts they chose. Use: `logits`, by what attention sees;
    `project` before and after attention; `feed_forward`.
    """

    def setup(self):
        super().setup()
        self.in_proj, self.out_proj = (StackedLinear(self.num_experts) for _ in range(2))

    def project(
        self, layer: str, x: Float[Array, "B L D"], router_logits: Float[Array, "B L E"]
    ) -> tuple[Float[Array, "B L O"], Int[Array, " B"]]:
        """Runs the experts of a linear layer: "in_proj", O = 3 D, or "out_proj", O = D.

        Returns y and dropped_slots.
        """
        width = x.shape[-1]
        kernel, bias = getattr(self, layer)(width, (3 if layer == "in_proj" else 1) * width, width**-0.5)
        y, dropped = self._run(x, router_logits, Weights(None, None, kernel, bias), identity)
        return y, dropped.reshape(x.shape[:2]).sum(axis=1)


def _run_experts(
    x: Array,
    gates: Array,
    expert_ids: Array,
    experts: Weights,
    *,
    dropout_key: Array | None,
    dropout_rate: float,
    activation: Callable[[Array], Array],
    name: str,
    capacity_factor: float,
    grouped_mlp: str,
) -> tuple[Array, Array]:
    """Dispatches on one device, or on each device its own tokens and experts under a mesh."""

    def run(x, gates, expert_ids, experts, key, expert_axis=None):
        words = None if key is None else jax.random.key_data(key)
        feed_forward = FeedForward(activation, Dropout(dropout_rate, words))
        run_experts = dispatch.make_dispatch(name, capacity_factor, grouped_mlp, expert_axis)
        return run_experts(x, gates, expert_ids, experts, feed_forward)

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
        check_vma=False,  # the loops over blocks start from sums, and memory, that vary over no axis
    )(x, gates, expert_ids, experts, dropout_key)
