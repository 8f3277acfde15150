"""Adapters: leaves that train beside a kernel that does not, and are folded into it at the end.

Low-rank ones: a kernel W (D, F) trains as W + A B, A (D, R), B (R, F) (LoRA, arXiv 2106.09685). Columns: a
router's kernel (D, E) trains as [W C], C (D, N) the columns of its last N experts, so that those of the
others stay as they are (as in MoExtend, arXiv 2408.03511).

They are leaves beside the kernel, "lora_a" and "lora_b", or "new_columns", so that rules choose what trains;
a model computes with its params folded. Letters: D width in, F width out, R rank, E experts, N new ones.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipmoe_jax.core import trees

KERNEL = re.compile(r"(.+/(?:attn|mlp)/\w+)/kernel")
ROUTER = re.compile(r"(.+/moe/router)/kernel")


class Adapters(NamedTuple):
    """Which adapters a model trains with. rank: of low-rank ones, 0 for none. columns: N, 0 for none."""

    rank: int = 0
    columns: int = 0


NO_ADAPTERS = Adapters()


def add_adapters(params: trees.Params, key: jax.Array, adapters: Adapters) -> dict:
    """Returns params with low-rank adapters beside every kernel of attention and feed-forward layers, and
    with the new columns of every router apart; pure. The model is as before.

    A is normal with standard deviation 1/√R, B is zero.
    """
    leaves = trees.flatten(params)
    added = {}
    if adapters.rank:
        layers = {match[1]: leaves[name].shape for name in leaves if (match := KERNEL.fullmatch(name))}
        for (layer, (width, features)), layer_key in zip(
            layers.items(), jax.random.split(key, len(layers)), strict=True
        ):
            normal = jax.random.normal(layer_key, (width, adapters.rank))
            added[f"{layer}/lora_a"] = adapters.rank**-0.5 * normal
            added[f"{layer}/lora_b"] = jnp.zeros((adapters.rank, features))
    if adapters.columns:
        for name, leaf in leaves.items():
            if match := ROUTER.fullmatch(name):
                added[name] = leaf[:, : -adapters.columns]
                added[f"{match[1]}/new_columns"] = leaf[:, -adapters.columns :]
    return trees.unflatten(leaves | added)


def fold_adapters(params: trees.Params) -> dict:
    """Returns params with W + A B, or [W C], in place of every W that has adapters; without any, as they
    are."""
    leaves = trees.flatten(params)
    names = ("/lora_a", "/lora_b", "/new_columns")
    folded = {name: leaf for name, leaf in leaves.items() if not name.endswith(names)}
    for name, leaf in leaves.items():
        layer, _, kind = name.rpartition("/")
        kernel = f"{layer}/kernel"
        if kind == "lora_a":
            product = jnp.matmul(leaf, leaves[f"{layer}/lora_b"], precision=jax.lax.Precision.HIGHEST)
            folded[kernel] = leaves[kernel] + product
        elif kind == "new_columns":
            folded[kernel] = jnp.concatenate([leaves[kernel], leaf], axis=1)
    return trees.unflatten(folded)
