"""The released CLIP-MoE code's state dicts, dense and MoE; OpenAI CLIP's names are the dense part of them.

The text tower has no prefix. Long-CLIP's two position tables become one: rows 0 to 19 come from
`positional_embedding`, rows from 20 on from `positional_embedding_res`; both are written on export. The
number of selected experts is not in the file.
"""

import re
from collections.abc import Mapping

import numpy as np

from clipmoe_jax import trees
from clipmoe_jax.interop.nametable import CONV, LINEAR, Arrays, Row, to_foreign, to_ours
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.positions import KEPT_POSITIONS
from clipmoe_jax.models.transformer import MoeConfig

HEAD_WIDTH = 64
POSITIONS, POSITIONS_RES = "positional_embedding", "positional_embedding_res"
KEY_NAMES = ("visual.conv1.weight", "token_embedding.weight", "visual.proj")
SIZE_NAMES = (*KEY_NAMES, POSITIONS, "visual.positional_embedding")  # what the architecture is read from


def _tower_rows(foreign: str, ours: str) -> list[Row]:
    """The rows of one tower's blocks."""
    block, our_block = foreign + "transformer.resblocks.{i}.", ours + "/resblocks_{i}/"
    rows = []
    for norm in ("ln_1", "ln_2"):
        rows += _norm_rows(f"{block}{norm}", f"{our_block}{norm}")
    rows += [
        Row(f"{block}attn.in_proj_weight", f"{our_block}attn/in_proj/kernel", LINEAR),
        Row(f"{block}attn.in_proj_bias", f"{our_block}attn/in_proj/bias"),
        Row(f"{block}attn.out_proj.weight", f"{our_block}attn/out_proj/kernel", LINEAR),
        Row(f"{block}attn.out_proj.bias", f"{our_block}attn/out_proj/bias"),
        Row(f"{block}gate.weight", f"{our_block}moe/router/kernel", LINEAR),
    ]
    for layer in ("c_fc", "c_proj"):
        expert, our_expert = f"{block}experts.{{e}}.{layer}", f"{our_block}moe/{layer}"
        rows += [
            Row(f"{block}mlp.{layer}.weight", f"{our_block}mlp/{layer}/kernel", LINEAR),
            Row(f"{block}mlp.{layer}.bias", f"{our_block}mlp/{layer}/bias"),
            Row(f"{expert}.weight", our_expert + "/kernel[{e}]", LINEAR),
            Row(f"{expert}.bias", our_expert + "/bias[{e}]"),
        ]
    return rows


def _norm_rows(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}.weight", f"{ours}/scale"), Row(f"{foreign}.bias", f"{ours}/bias")]


TABLE = [
    Row("logit_scale", "logit_scale"),
    Row("visual.conv1.weight", "visual/conv1/kernel", CONV),
    Row("visual.class_embedding", "visual/class_embedding"),
    Row("visual.positional_embedding", "visual/positional_embedding"),
    *_norm_rows("visual.ln_pre", "visual/ln_pre"),
    *_tower_rows("visual.", "visual"),
    *_norm_rows("visual.ln_post", "visual/ln_post"),
    Row("visual.proj", "visual/proj"),
    Row("token_embedding.weight", "text/token_embedding/embedding"),
    Row(POSITIONS, "text/positional_embedding"),
    *_tower_rows("", "text"),
    *_norm_rows("ln_final", "text/ln_final"),
    Row("text_projection", "text/text_projection"),
]


def is_released(names: Mapping) -> bool:
    """Whether a state dict has this format's (or OpenAI's) names."""
    return set(KEY_NAMES) <= set(names)


def import_state_dict(
    arrays: Arrays, *, num_selected_experts: int = 2
) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    """A state dict of numpy arrays to (config, {our name: float32 array}); checks nothing against a model.

    Raises ValueError for names that CLIP-MoE does not have, and for lack of those that give the sizes.
    """
    arrays = dict(arrays)
    for entry in ("input_resolution", "context_length", "vocab_size"):  # OpenAI's files carry these scalars
        arrays.pop(entry, None)
    if missing := [name for name in SIZE_NAMES if name not in arrays]:
        raise ValueError(f"the checkpoint lacks {missing}")
    if (tail := arrays.pop(POSITIONS_RES, None)) is not None:
        arrays[POSITIONS] = np.concatenate([arrays[POSITIONS][:KEPT_POSITIONS], tail[KEPT_POSITIONS:]])
    leaves, unknown = to_ours(TABLE, arrays)
    if unknown:
        raise ValueError(f"the checkpoint has {len(unknown)} names that CLIP-MoE does not: {unknown[:10]}")
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}
    return infer_config(leaves, num_selected_experts), leaves


def export_state_dict(params: trees.Params) -> dict[str, np.ndarray]:
    """Our params to the released code's names and layout, both position tables included."""
    arrays, unknown = to_foreign(
        TABLE, {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    )
    if unknown:
        raise ValueError(f"the released format has no names for {unknown[:10]}")
    if len(arrays[POSITIONS]) > 77:
        arrays[POSITIONS_RES] = arrays[POSITIONS].copy()
    return arrays


def infer_config(leaves: Arrays, num_selected_experts: int) -> ClipConfig:
    """The architecture that leaves of our names and shapes belong to; quick-GELU, head width 64."""
    patch, _, _, vision_width = leaves["visual/conv1/kernel"].shape
    grid = round((len(leaves["visual/positional_embedding"]) - 1) ** 0.5)
    vocab_size, text_width = leaves["text/token_embedding/embedding"].shape
    return ClipConfig(
        embed_dim=leaves["visual/proj"].shape[1],
        vision=VisionConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=vision_width,
            num_layers=_count_blocks(leaves, "visual"),
            head_width=HEAD_WIDTH,
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            context_length=len(leaves["text/positional_embedding"]),
            width=text_width,
            num_layers=_count_blocks(leaves, "text"),
            head_width=HEAD_WIDTH,
        ),
        moe=_infer_moe(leaves, num_selected_experts),
    )


def _count_blocks(leaves: Arrays, tower: str) -> int:
    return len({m[1] for name in leaves if (m := re.match(rf"{tower}/(resblocks_\d+)/", name))})


def _infer_moe(leaves: Arrays, num_selected_experts: int) -> MoeConfig | None:
    routers = [name for name in leaves if name.endswith("moe/router/kernel")]
    if not routers:
        return None
    num_experts = leaves[routers[0]].shape[1]
    blocks = {tower: sum(name.startswith(tower) for name in routers) for tower in ("visual", "text")}
    everywhere = all(count == _count_blocks(leaves, tower) for tower, count in blocks.items())
    return MoeConfig(
        num_experts=num_experts,
        num_selected_experts=num_selected_experts,
        num_moe_layers=None if everywhere else max(blocks.values()),
    )
