"""OpenAI CLIP's state dicts, and those with its names: open_clip's, Long-CLIP's, the released CLIP-MoE's.

The text tower has no prefix. Long-CLIP's two position tables become one: rows 0 to 19 come from
`positional_embedding` and the others from `positional_embedding_res`, as its code reads them. Export writes
both. Such a file says neither its activation, nor its head width, nor how many experts it selects.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.interop.nametable import CONV, LINEAR, Row, to_foreign
from clipmoe_jax.interop.tensor_files import Tensor, Tensors
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.positions import KEPT_POSITIONS
from clipmoe_jax.models.transformer import MoeConfig

# {width: head width} of open_clip's vision towers H, g, bigG and e. All others of open_clip, and all of
# OpenAI's and the released code, have HEAD_WIDTH.
# A state dict for the released code as we write it, and the file beside it with what it does not say.
FILE, CONFIG_FILE = "model.pt", "clipmoe.json"
VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
HEAD_WIDTH = 64

POSITIONS, POSITIONS_RES = "positional_embedding", "positional_embedding_res"
VISION_POSITIONS = "visual.positional_embedding"
# Tensors whose shapes give the architecture, and how many axes they have.
SIZE_AXES = {
    "visual.conv1.weight": 4,
    VISION_POSITIONS: 2,
    "visual.proj": 2,
    "token_embedding.weight": 2,
    POSITIONS: 2,
    "visual.transformer.resblocks.0.ln_1.weight": 1,
    "transformer.resblocks.0.ln_1.weight": 1,
}
# Those that a file may lack, by the end of their names.
FURTHER_AXES = {".c_fc.bias": 1, ".gate.weight": 2}
OPENAI_SCALARS = ("input_resolution", "context_length", "vocab_size")
BARE = "OpenAI's names"  # the format of a state dict that does not say whose it is
CUSTOM_TEXT = "text."  # the prefix of the text tower in open_clip's CustomTextCLIP


def _tower_rows(foreign: str, ours: str) -> list[Row]:
    """Returns the rows of one tower's blocks."""
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


def has_these_names(names: Mapping[str, Any]) -> bool:
    """Returns whether a state dict has one of these formats."""
    return "visual.conv1.weight" in names and ("visual.proj" in names or "ln_final.weight" in names)


def normalise(tensors: Tensors) -> tuple[Tensors, str]:
    """Returns the tensors under TABLE's names, and their format in words.

    Raises ValueError if the two tables of positions differ in shape.
    """
    tensors = {name.removeprefix(CUSTOM_TEXT): tensor for name, tensor in tensors.items()}
    kind = BARE
    if any(name in tensors for name in OPENAI_SCALARS):
        kind = "OpenAI's format"
    if POSITIONS_RES in tensors or any(".experts." in name for name in tensors):
        kind = "the released code's format"
    for name in (*OPENAI_SCALARS, "attn_mask"):
        tensors.pop(name, None)
    if (tail := tensors.pop(POSITIONS_RES, None)) is not None and POSITIONS in tensors:
        head = tensors[POSITIONS]
        if head.shape != tail.shape:
            raise ValueError(f"{POSITIONS_RES} has the shape {tail.shape}, {POSITIONS} has {head.shape}")
        tensors[POSITIONS] = Tensor(
            head.shape, lambda: np.concatenate([head.read()[:KEPT_POSITIONS], tail.read()[KEPT_POSITIONS:]])
        )
    return tensors, kind


def infer_config(
    tensors: Tensors,
    *,
    activation: str = "quick_gelu",
    num_selected_experts: int = 2,
    head_widths: tuple[int | None, int | None] = (None, None),
) -> ClipConfig:
    """Returns the architecture that tensors of these names and shapes belong to.

    head_widths: of the vision and the text tower; None is what open_clip's models of that width have.
    Raises ValueError if tensors that give the sizes are missing or have other axes, or a tower's width is no
    multiple of the head width that it would be given.
    """
    if missing := [name for name in SIZE_AXES if name not in tensors]:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}")
    shapes = {name: tensors[name].shape for name in tensors}
    for name, shape in shapes.items():
        further = (axes for end, axes in FURTHER_AXES.items() if name.endswith(end))
        axes = SIZE_AXES.get(name) or next(further, len(shape))
        if len(shape) != axes or 0 in shape:
            raise ValueError(f"{name} has the shape {shape}: it must have {axes} axes, none of length 0")
    vision_width, _, patch, _ = shapes["visual.conv1.weight"]
    vocab_size, text_width = shapes["token_embedding.weight"]
    grid = round((shapes[VISION_POSITIONS][0] - 1) ** 0.5)
    vision = VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=vision_width,
        num_layers=_count_blocks(tensors, "visual."),
        head_width=_head_width("vision", vision_width, head_widths[0]),
        mlp_width=_infer_mlp_width(shapes, "visual.", vision_width),
    )
    text = TextConfig(
        vocab_size=vocab_size,
        context_length=shapes[POSITIONS][0],
        width=text_width,
        num_layers=_count_blocks(tensors, ""),
        head_width=_head_width("text", text_width, head_widths[1]),
        mlp_width=_infer_mlp_width(shapes, "", text_width),
    )
    return ClipConfig(
        embed_dim=shapes["visual.proj"][1],
        vision=vision,
        text=text,
        activation=activation,
        moe=_infer_moe(shapes, vision, text, num_selected_experts),
    )


def export_state_dict(params: trees.Params) -> dict[str, np.ndarray]:
    """Converts params to the released code's names and layout, both position tables included.

    Raises ValueError for names that are no CLIP's.
    """
    arrays, unknown = to_foreign(
        TABLE, {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    )
    if unknown:
        raise ValueError(f"the released format has no names for {unknown[:10]}")
    if POSITIONS in arrays and len(arrays[POSITIONS]) > 77:
        arrays[POSITIONS_RES] = arrays[POSITIONS].copy()
    return arrays


def _head_width(tower: str, width: int, asked: int | None) -> int:
    if asked is not None:
        return asked
    usual = VISION_HEAD_WIDTHS.get(width, HEAD_WIDTH) if tower == "vision" else HEAD_WIDTH
    if width % usual:
        raise ValueError(
            f"the state dict does not say how wide the heads of its {tower} tower are, and its width {width} "
            f"is not a multiple of {usual}: give {tower}_head_width"
        )
    return usual


def _count_blocks(tensors: Tensors, tower: str) -> int:
    count = 0
    while f"{tower}transformer.resblocks.{count}.ln_1.weight" in tensors:
        count += 1
    return count


def _infer_mlp_width(shapes: Mapping[str, tuple[int, ...]], tower: str, width: int) -> int | None:
    block = f"{tower}transformer.resblocks.0."
    for name in (f"{block}mlp.c_fc.bias", f"{block}experts.0.c_fc.bias"):
        if name in shapes and shapes[name][0] != 4 * width:
            return shapes[name][0]
    return None


def _infer_moe(
    shapes: Mapping[str, tuple[int, ...]], vision: VisionConfig, text: TextConfig, num_selected_experts: int
) -> MoeConfig | None:
    routers = [name for name in shapes if name.endswith(".gate.weight")]
    if not routers:
        return None
    in_vision = sum(name.startswith("visual.") for name in routers)
    in_text = len(routers) - in_vision
    everywhere = in_vision == vision.num_layers and in_text == text.num_layers
    return MoeConfig(
        num_experts=shapes[routers[0]][0],
        num_selected_experts=num_selected_experts,
        num_moe_layers=None if everywhere else max(in_vision, in_text),
    )
