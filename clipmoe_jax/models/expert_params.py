"""The params of one expert of an MoE, as the dense model that it came from."""

import dataclasses
import re

from clipmoe_jax.core import trees
from clipmoe_jax.models.clip import ClipConfig

EXPERT_LEAF = re.compile(r"((?:visual|text)/resblocks_\d+)/moe/((?:c_fc|c_proj|in_proj|out_proj)/.+)")


def name_as_dense(name: str) -> str | None:
    """Returns what a leaf of experts is called in a dense model, None for other leaves."""
    if match := EXPERT_LEAF.fullmatch(name):
        return f"{match[1]}/{'mlp' if match[2].startswith('c_') else 'attn'}/{match[2]}"
    return None


def expert_as_dense(params: trees.Params, config: ClipConfig, e: int) -> tuple[ClipConfig, dict]:
    """Returns expert e of an MoE as the dense model it came from: architecture and params, leaves as they
    are.

    Blocks of the MoE that are dense are the base's in every expert.
    Raises ValueError for a dense model, and for an expert number out of range.
    """
    if config.moe is None:
        raise ValueError(f"expert {e} of a dense model was asked for: it has no experts")
    if not 0 <= e < config.moe.num_experts:
        raise ValueError(f"there is no expert {e}: choose one of 0 to {config.moe.num_experts - 1}")
    leaves = {}
    for name, leaf in trees.flatten(params).items():
        if dense_name := name_as_dense(name):
            leaves[dense_name] = leaf[e]
        elif "/moe/router/" not in name:
            leaves[name] = leaf
    return dataclasses.replace(config, moe=None), trees.unflatten(leaves)
