"""Low-rank adapters: a kernel W (D, F) trains as W + A B, A (D, R), B (R, F) (LoRA, arXiv 2106.09685).

The adapters are leaves beside the kernel, "lora_a" and "lora_b", so that rules choose what trains; a model
computes with its params folded. Letters: D width in, F width out, R rank.
"""

import re

import jax
import jax.numpy as jnp

from clipmoe_jax.core import trees

KERNEL = re.compile(r"(.+/(?:attn|mlp)/\w+)/kernel")


def add_adapters(params: trees.Params, key: jax.Array, rank: int) -> dict:
    """Returns params with adapters beside every kernel of attention and feed-forward layers; pure.

    A is normal with standard deviation 1/√R, B is zero: the model is as before.
    """
    leaves = trees.flatten(params)
    layers = {match[1]: leaves[name].shape for name in leaves if (match := KERNEL.fullmatch(name))}
    adapters = {}
    for (layer, (width, features)), layer_key in zip(
        layers.items(), jax.random.split(key, len(layers)), strict=True
    ):
        adapters[f"{layer}/lora_a"] = rank**-0.5 * jax.random.normal(layer_key, (width, rank))
        adapters[f"{layer}/lora_b"] = jnp.zeros((rank, features))
    return trees.unflatten(leaves | adapters)


def fold_adapters(params: trees.Params) -> dict:
    """Returns params with W + A B in place of every W that has adapters; without any, as they are."""
    leaves = trees.flatten(params)
    folded = {name: leaf for name, leaf in leaves.items() if not name.endswith(("/lora_a", "/lora_b"))}
    for name, a in leaves.items():
        if name.endswith("/lora_a"):
            layer = name.removesuffix("/lora_a")
            product = jnp.matmul(a, leaves[f"{layer}/lora_b"], precision=jax.lax.Precision.HIGHEST)
            folded[f"{layer}/kernel"] = leaves[f"{layer}/kernel"] + product
    return trees.unflatten(folded)
