"""Transformers' CLIPModel: the state dict in `model.safetensors`, the sizes in `config.json`; dense alone.

Against OpenAI's names: q, k and v are three linear layers, not one `in_proj`; both projections are linear
layers, so transposed; the vision tower's first norm is spelled `pre_layrnorm`. Old files hold `position_ids`,
which are counted numbers and no parameters. `eos_token_id` 2 in a config is a mark of old files and means
"the highest id", which is where this program reads the text feature too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clipmoe_jax import trees
from clipmoe_jax.interop.nametable import CONV, LINEAR, Arrays, Row, to_foreign, to_ours
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig

# What a config.json means by a field that it leaves out.
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LEGACY_EOS_ID = 2


def _norm_rows(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}.weight", f"{ours}/scale"), Row(f"{foreign}.bias", f"{ours}/bias")]


def _linear_rows(foreign: str, ours: str, part: str = "") -> list[Row]:
    return [
        Row(f"{foreign}.weight", f"{ours}/kernel{part}", LINEAR),
        Row(f"{foreign}.bias", f"{ours}/bias{part}"),
    ]


def _block_rows(foreign: str, ours: str) -> list[Row]:
    block, our_block = foreign + ".encoder.layers.{i}", ours + "/resblocks_{i}"
    return [
        *_norm_rows(f"{block}.layer_norm1", f"{our_block}/ln_1"),
        *_linear_rows(f"{block}.self_attn.q_proj", f"{our_block}/attn/in_proj", "[q]"),
        *_linear_rows(f"{block}.self_attn.k_proj", f"{our_block}/attn/in_proj", "[k]"),
        *_linear_rows(f"{block}.self_attn.v_proj", f"{our_block}/attn/in_proj", "[v]"),
        *_linear_rows(f"{block}.self_attn.out_proj", f"{our_block}/attn/out_proj"),
        *_norm_rows(f"{block}.layer_norm2", f"{our_block}/ln_2"),
        *_linear_rows(f"{block}.mlp.fc1", f"{our_block}/mlp/c_fc"),
        *_linear_rows(f"{block}.mlp.fc2", f"{our_block}/mlp/c_proj"),
    ]


TABLE = [
    Row("logit_scale", "logit_scale"),
    Row("vision_model.embeddings.class_embedding", "visual/class_embedding"),
    Row("vision_model.embeddings.patch_embedding.weight", "visual/conv1/kernel", CONV),
    Row("vision_model.embeddings.position_embedding.weight", "visual/positional_embedding"),
    *_norm_rows("vision_model.pre_layrnorm", "visual/ln_pre"),
    *_block_rows("vision_model", "visual"),
    *_norm_rows("vision_model.post_layernorm", "visual/ln_post"),
    Row("visual_projection.weight", "visual/proj", LINEAR),
    Row("text_model.embeddings.token_embedding.weight", "text/token_embedding/embedding"),
    Row("text_model.embeddings.position_embedding.weight", "text/positional_embedding"),
    *_block_rows("text_model", "text"),
    *_norm_rows("text_model.final_layer_norm", "text/ln_final"),
    Row("text_projection.weight", "text/text_projection", LINEAR),
]


def import_state_dict(arrays: Arrays, config: Mapping[str, Any]) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    """A state dict of numpy arrays to (config, {our name: float32 array}); checks nothing against a model.

    config: the contents of config.json. Raises ValueError for names that a CLIPModel does not have, and as
    `import_config` does.
    """
    arrays = {name: array for name, array in arrays.items() if not name.endswith(".position_ids")}
    leaves, unknown = to_ours(TABLE, arrays)
    if unknown:
        raise ValueError(f"the checkpoint has {len(unknown)} names that a CLIPModel does not: {unknown[:10]}")
    return import_config(config), {name: np.asarray(leaf, np.float32) for name, leaf in leaves.items()}


def export_state_dict(params: trees.Params) -> dict[str, np.ndarray]:
    """A dense model's params to CLIPModel's names and layout, contiguous arrays.

    Raises ValueError for a CLIP-MoE, which CLIPModel cannot hold.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    arrays, unknown = to_foreign(TABLE, leaves)
    if unknown:
        raise ValueError(f"transformers' CLIPModel has no names for {unknown[:10]}: export a dense model")
    # safetensors writes memory as it lies; np.ascontiguousarray would give logit_scale an axis.
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def import_config(config: Mapping[str, Any]) -> ClipConfig:
    """The architecture that a config.json describes.

    Raises ValueError for another kind of model, and for what this program's towers do not do.
    """
    if config.get("model_type") != "clip":
        raise ValueError(
            f"config.json has model_type={config.get('model_type')!r}: give a CLIPModel with both towers, "
            "whose model_type is 'clip'"
        )
    text = TEXT_DEFAULTS | (config.get("text_config") or {})
    vision = VISION_DEFAULTS | (config.get("vision_config") or {})
    for field in ("hidden_act", "layer_norm_eps"):
        if text[field] != vision[field]:
            raise ValueError(
                f"text_config.{field}={text[field]!r} is not vision_config.{field}={vision[field]!r}: this "
                "program's towers share it"
            )
    for name, tower in (("text_config", text), ("vision_config", vision)):
        if tower["intermediate_size"] != 4 * tower["hidden_size"]:
            raise ValueError(
                f"{name}.intermediate_size={tower['intermediate_size']} is not 4 times its hidden_size="
                f"{tower['hidden_size']}, as this program's feed-forward layers are"
            )
    if text["eos_token_id"] not in (LEGACY_EOS_ID, text["vocab_size"] - 1):
        raise ValueError(
            f"text_config.eos_token_id={text['eos_token_id']} is not the highest id "
            f"({text['vocab_size'] - 1}), by which this program finds the end of a caption"
        )
    return ClipConfig(
        embed_dim=config.get("projection_dim", 512),
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            num_layers=vision["num_hidden_layers"],
            head_width=vision["hidden_size"] // vision["num_attention_heads"],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            width=text["hidden_size"],
            num_layers=text["num_hidden_layers"],
            head_width=text["hidden_size"] // text["num_attention_heads"],
        ),
        activation=text["hidden_act"],
        layer_norm_eps=text["layer_norm_eps"],
    )
