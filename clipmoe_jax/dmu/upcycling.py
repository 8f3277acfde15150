"""Upcycling: layers of several dense models become the experts of one MoE."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.expert_params import expert_as_dense, name_as_dense
from clipmoe_jax.models.transformer import MoeConfig, first_moe_layer

# Leaves that become experts', by `MoeConfig.expert_layers`.
EXPERT_LEAVES = {
    "feed_forward": re.compile(r"(visual|text)/resblocks_(\d+)/mlp/(.+)"),
    "attention_and_feed_forward": re.compile(r"(visual|text)/resblocks_(\d+)/(?:mlp|attn)/(.+)"),
}
BLOCK_LEAF = EXPERT_LEAVES["attention_and_feed_forward"]


def stack_experts(
    trees_of_params: Sequence[trees.Params],
    router_key: jax.Array,
    *,
    num_moe_layers: int | None = None,
    expert_layers: str = "feed_forward",
    sequence_share: float = 0.0,
    router_stddev: float = 0.02,
    place: Callable[[trees.Params], Any] = lambda _: None,
) -> dict:
    """Returns params of an MoE whose expert e is the layers of tree e in every MoE block; pure.

    trees_of_params: E dense trees of one architecture, equal outside those layers; tree 0, the base, gives
    everything shared, and these layers of blocks that stay dense. num_moe_layers: the last n blocks of each
    tower; None is all. expert_layers, sequence_share: as of `MoeConfig`. Routers are drawn from a normal
    distribution. place: from the result as ShapeDtypeStructs to the shardings that it
    is born with.
    Raises ValueError naming the first leaf outside the layers of experts that is not equal, with the largest
    difference; and any leaf that one of the trees lacks.
    """
    flat = [trees.flatten(tree) for tree in trees_of_params]
    expert_leaf = EXPERT_LEAVES[expert_layers]
    _check(flat, expert_leaf)
    moe = MoeConfig(len(flat), 1, num_moe_layers, sequence_share, expert_layers)

    def stack(flat: list, router_key: jax.Array) -> dict:
        return _stack(flat, router_key, expert_leaf, moe, router_stddev)

    where = place(jax.eval_shape(stack, flat, router_key))
    return jax.jit(stack, out_shardings=where)(flat, router_key)


def _check(flat: Sequence[dict[str, Any]], expert_leaf: re.Pattern[str]) -> None:
    base, *others = flat
    for e, tree in enumerate(others, 1):
        if odd := sorted(base.keys() ^ tree.keys()):
            raise ValueError(
                f"tree {e} and the base do not have the same leaves; the first that differs is {odd[0]}"
            )
        for name, leaf in base.items():
            if leaf.shape != tree[name].shape:
                raise ValueError(f"{name} is {tree[name].shape} in tree {e}, {leaf.shape} in the base")
            if not expert_leaf.fullmatch(name) and not _equal(leaf, tree[name]):
                difference = float(jnp.max(jnp.abs(jnp.asarray(leaf) - jnp.asarray(tree[name]))))
                layers = ("attention and " if expert_leaf is BLOCK_LEAF else "") + "feed-forward layers"
                raise ValueError(
                    f"{name} of tree {e} is not the base's (largest difference {difference:.3g}): experts "
                    f"may differ in their {layers} alone"
                )


def _equal(one: Any, other: Any) -> bool:
    """On the devices, where a leaf is spread over those of other processes."""
    here = all(getattr(leaf, "is_fully_addressable", True) for leaf in (one, other))
    return bool((np if here else jnp).array_equal(one, other))


def _stack(
    flat: Sequence[dict[str, Any]],
    router_key: jax.Array,
    expert_leaf: re.Pattern[str],
    moe: MoeConfig,
    router_stddev: float,
) -> dict:
    base = flat[0]
    depth = {tower: _depth(base, tower) for tower in ("visual", "text")}
    leaves, routers = {}, []
    for name, leaf in base.items():
        match = expert_leaf.fullmatch(name)
        if match is None or int(match[2]) < first_moe_layer(depth[match[1]], moe):
            leaves[name] = leaf
            continue
        block = f"{match[1]}/resblocks_{match[2]}/moe"
        leaves[f"{block}/{match[3]}"] = jnp.stack([tree[name] for tree in flat])
        if match[3] == "c_fc/kernel":
            routers.append((f"{block}/router/kernel", moe.router_width(leaf.shape[0])))
    for key, (name, width) in zip(jax.random.split(router_key, len(routers)), routers, strict=True):
        leaves[name] = router_stddev * jax.random.normal(key, (width, len(flat)))
    return trees.unflatten(leaves)


def extend_experts(
    params: trees.Params,
    config: ClipConfig,
    added: Sequence[trees.Params],
    router_key: jax.Array,
    *,
    router_stddev: float = 0.02,
    place: Callable[[trees.Params], Any] = lambda _: None,
) -> dict:
    """Returns params of an MoE with the layers of N dense trees as further experts; pure.

    params, config: of the MoE, whose experts and columns of routers stay bit for bit. added: equal to it
    outside the layers of experts. A new column is the mean of the old ones, whose logit is never a token's
    largest, plus values of a normal distribution. Other arguments and errors: as of `stack_experts`.
    """
    assert config.moe is not None
    flat, flat_added = trees.flatten(params), [trees.flatten(tree) for tree in added]
    _check(
        [trees.flatten(expert_as_dense(params, config, 0)[1]), *flat_added],
        EXPERT_LEAVES[config.moe.expert_layers],
    )

    def extend(leaves: dict[str, Any], added: list[dict[str, Any]], router_key: jax.Array) -> dict:
        extended, routers = dict(leaves), [name for name in leaves if name.endswith("/moe/router/kernel")]
        for name, leaf in leaves.items():
            if dense_name := name_as_dense(name):
                extended[name] = jnp.concatenate([leaf, *(tree[dense_name][None] for tree in added)])
        for key, name in zip(jax.random.split(router_key, len(routers)), routers, strict=True):
            kernel = leaves[name]
            noise = router_stddev * jax.random.normal(key, (len(kernel), len(added)))
            columns = kernel.mean(axis=1, keepdims=True) + noise
            extended[name] = jnp.concatenate([kernel, columns], axis=1)
        return trees.unflatten(extended)

    where = place(jax.eval_shape(extend, flat, flat_added, router_key))
    return jax.jit(extend, out_shardings=where)(flat, flat_added, router_key)


def reinitialize_experts(
    params: trees.Params,
    key: jax.Array,
    *,
    share: float = 0.5,
    place: Callable[[trees.Params], Any] = lambda _: None,
) -> dict:
    """Returns the MoE with a share of each expert's hidden units drawn anew; pure.

    Drop-Upcycling (arXiv 2502.19261).

    Every expert of every block draws its own floor(share * F) of the F hidden units. Their columns of c_fc,
    biases of c_fc and rows of c_proj become normal values of the mean and standard deviation that these
    columns, biases and rows had. All else stays, c_proj's biases too, which belong to no unit. (The paper's
    layers have no biases.) Experts of attention have no such units, and stay. place: as of `stack_experts`.
    """

    def drawn(params: trees.Params, key: jax.Array) -> dict:
        leaves = dict(trees.flatten(params))
        blocks = [name.removesuffix("/c_fc/kernel") for name in leaves if name.endswith("/moe/c_fc/kernel")]
        for block, block_key in zip(blocks, jax.random.split(key, len(blocks)), strict=True):
            choose, *fill = jax.random.split(block_key, 4)
            num_experts, _, hidden_dim = leaves[f"{block}/c_fc/kernel"].shape
            places = jnp.broadcast_to(jnp.arange(hidden_dim), (num_experts, hidden_dim))
            places = jax.random.permutation(choose, places, axis=1, independent=True)
            units = places < int(share * hidden_dim)  # (E, F)
            for leaf, unit_axis, leaf_key in zip(
                ("c_fc/kernel", "c_fc/bias", "c_proj/kernel"), (2, 1, 1), fill, strict=True
            ):
                old = leaves[f"{block}/{leaf}"]
                others = [axis for axis in range(1, old.ndim) if axis != unit_axis]
                leaves[f"{block}/{leaf}"] = _redraw(old, jnp.expand_dims(units, others), leaf_key)
        return trees.unflatten(leaves)

    return jax.jit(drawn, out_shardings=place(params))(params, key)


def _redraw(leaf: jax.Array, where: jax.Array, key: jax.Array) -> jax.Array:
    """Normal values instead of those chosen, with each expert's mean and standard deviation of these."""
    chosen = jnp.broadcast_to(where, leaf.shape)
    axes = tuple(range(1, leaf.ndim))
    mean = jnp.mean(leaf, axes, keepdims=True, where=chosen)
    stddev = jnp.std(leaf, axes, keepdims=True, where=chosen)
    return jnp.where(chosen, mean + stddev * jax.random.normal(key, leaf.shape, leaf.dtype), leaf)


def _depth(leaves: dict, tower: str) -> int:
    return 1 + max(int(m[2]) for name in leaves if (m := BLOCK_LEAF.fullmatch(name)) and m[1] == tower)
