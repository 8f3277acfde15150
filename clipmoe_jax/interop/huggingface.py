"""Transformers' formats: CLIPModel, CLIPVisionModelWithProjection, and the CLIP-MoE that we write for it.

They differ from OpenAI's: q, k and v are three linear layers, not one `in_proj`; both projections are linear
layers, so transposed; the vision tower's first norm is spelled `pre_layrnorm`. Old files hold `position_ids`,
which are no parameters but 0, 1, 2, …; in their configs, `eos_token_id` 2 means "the highest id of a row".
The experts of an MoE block are stacked under the names of a dense block's layers, which have an axis less: a
program that takes them for a dense block's fails, where it would leave layers of another name random.
`modeling_clip_moe.py` computes them.
"""

import dataclasses
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.core.checks import number, whole_number
from clipmoe_jax.core.json_files import field
from clipmoe_jax.interop.nametable import BIAS, CONV, LINEAR, STACKED_BIAS, STACKED_LINEAR, Row, to_foreign
from clipmoe_jax.interop.tensor_files import Tensors
from clipmoe_jax.models.clip import MOST_OF_ANY, ClipConfig, TextConfig, VisionConfig, check_size
from clipmoe_jax.models.inputs import MEAN, START_ID, STD, check_preprocessing
from clipmoe_jax.models.transformer import MOST_EXPERTS, MoeConfig

CLIP, CLIP_MOE, VISION_ALONE = "clip", "clip_moe", "clip_vision_model"  # model_type in a config.json
MODELING_FILE = "modeling_clip_moe.py"
# Files that describe an image processor: as its own fields, or (transformers 5) under "image_processor".
IMAGE_PROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
# Our own image processor: its modules, of which the first has its class.
PROCESSOR_FILES = ("image_processing_openai_clip.py", "preprocess.py")
PROCESSOR_CLASS = "OpenAICLIPImageProcessor"
# Classes that prepare images as CLIP does, unless a field says otherwise.
PROCESSORS = (
    *("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor"),
    PROCESSOR_CLASS,
)
# MoeConfig's, in its order, and the value of one that an older config.json leaves out.
MOE_FIELDS = (
    *("num_experts", "num_experts_per_tok", "num_moe_layers", "router_sequence_share", "expert_layers"),
)
MOE_DEFAULTS: dict[str, Any] = {"router_sequence_share": 0.0, "expert_layers": "feed_forward"}

# Names of a folder's weights. The first that exists is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Values of fields that a config.json leaves out.
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
PAD_ID = 1  # as in OpenAI's own configs; padding follows the end token, so nothing attends to it


def _norm_rows(foreign: str, ours: str) -> list[Row]:
    return [Row(f"{foreign}.weight", f"{ours}/scale"), Row(f"{foreign}.bias", f"{ours}/bias")]


def _linear_rows(foreign: str, ours: str, part: str = "") -> list[Row]:
    return [
        Row(f"{foreign}.weight", f"{ours}/kernel{part}", LINEAR),
        Row(f"{foreign}.bias", f"{ours}/bias{part}", BIAS),
    ]


def _stacked_rows(foreign: str, ours: str, part: str = "") -> list[Row]:
    return [
        Row(f"{foreign}.weight", f"{ours}/kernel{part}", STACKED_LINEAR),
        Row(f"{foreign}.bias", f"{ours}/bias{part}", STACKED_BIAS),
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
        Row(f"{block}.mlp.router.weight", f"{our_block}/moe/router/kernel", LINEAR),
        *_stacked_rows(f"{block}.self_attn.q_proj", f"{our_block}/moe/in_proj", "[q]"),
        *_stacked_rows(f"{block}.self_attn.k_proj", f"{our_block}/moe/in_proj", "[k]"),
        *_stacked_rows(f"{block}.self_attn.v_proj", f"{our_block}/moe/in_proj", "[v]"),
        *_stacked_rows(f"{block}.self_attn.out_proj", f"{our_block}/moe/out_proj"),
        *_stacked_rows(f"{block}.mlp.fc1", f"{our_block}/moe/c_fc"),
        *_stacked_rows(f"{block}.mlp.fc2", f"{our_block}/moe/c_proj"),
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


def has_these_names(names: Mapping[str, Any]) -> bool:
    """Returns whether a state dict has one of these formats."""
    return "vision_model.embeddings.class_embedding" in names


def normalise(tensors: Tensors) -> Tensors:
    """Returns the tensors of old files under today's names, without those that are no parameters."""
    return {
        name.replace(".mlp.experts.", ".mlp."): tensor
        for name, tensor in tensors.items()
        if not name.endswith(".position_ids")
    }


def import_config(config: Mapping[str, Any]) -> ClipConfig:
    """Returns the architecture that a config.json describes.

    Raises ValueError for another kind of model, for one that this program's towers cannot compute, and for
    sizes that cannot be.
    """
    kind = config.get("model_type")
    if kind not in (CLIP, CLIP_MOE, VISION_ALONE):
        raise ValueError(
            f"model_type={kind!r}: give a CLIP ({CLIP!r}), a CLIP-MoE ({CLIP_MOE!r}) or a "
            f"CLIPVisionModelWithProjection ({VISION_ALONE!r})"
        )
    if kind == VISION_ALONE:
        vision, text = VISION_DEFAULTS | dict(config), None
        _check_sizes(vision, VISION_DEFAULTS)
    else:
        vision = VISION_DEFAULTS | MOE_DEFAULTS | _tower(config, "vision_config")
        text = TEXT_DEFAULTS | MOE_DEFAULTS | _tower(config, "text_config")
        _check_sizes(vision, VISION_DEFAULTS, "vision_config.")
        _check_sizes(text, TEXT_DEFAULTS, "text_config.")
        _check_shared(text, vision, MOE_FIELDS if kind == CLIP_MOE else ())
    if kind == CLIP_MOE:
        for name in MOE_FIELDS[:2]:
            whole_number(f"vision_config.{name}", vision[name], MOST_EXPERTS)
    return ClipConfig(
        embed_dim=check_size("projection_dim", config.get("projection_dim", 512)),
        vision=VisionConfig(
            image_size=vision["image_size"], patch_size=vision["patch_size"], **_tower_fields(vision)
        ),
        text=None
        if text is None
        else TextConfig(
            vocab_size=text["vocab_size"],
            context_length=text["max_position_embeddings"],
            eos_token_id=_import_eos(text),
            **_tower_fields(text),
        ),
        activation=vision["hidden_act"],
        layer_norm_eps=vision["layer_norm_eps"],
        moe=MoeConfig(*(vision[field] for field in MOE_FIELDS)) if kind == CLIP_MOE else None,
    )


def export_config(config: ClipConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of an architecture. The inverse of `import_config`.

    dtype: of the weights beside it.
    """
    shared = {
        "hidden_act": config.activation,
        "layer_norm_eps": config.layer_norm_eps,
        "projection_dim": config.embed_dim,
    }
    if config.moe:
        shared |= dict(zip(MOE_FIELDS, dataclasses.astuple(config.moe), strict=True))
    vision = shared | {
        "model_type": "clip_moe_vision_model" if config.moe else VISION_ALONE,
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        **_export_tower(config.vision),
    }
    if config.text is None:
        return {"architectures": ["CLIPVisionModelWithProjection"], "dtype": dtype, **vision}
    eos_token_id = config.text.eos_token_id
    text = shared | {
        "model_type": "clip_moe_text_model" if config.moe else "clip_text_model",
        "vocab_size": config.text.vocab_size,
        "max_position_embeddings": config.text.context_length,
        "bos_token_id": START_ID if config.text.vocab_size > START_ID else None,
        "eos_token_id": config.text.vocab_size - 1 if eos_token_id is None else eos_token_id,
        "pad_token_id": PAD_ID,
        **_export_tower(config.text),
    }
    both = {
        "dtype": dtype,
        "projection_dim": config.embed_dim,
        "text_config": text,
        "vision_config": vision,
    }
    if config.moe is None:
        return {"architectures": ["CLIPModel"], "model_type": CLIP, **both}
    module = MODELING_FILE.removesuffix(".py")
    model = f"{module}.CLIPMoEModel"
    auto_map = {
        "AutoConfig": f"{module}.CLIPMoEConfig",
        "AutoModel": model,
        "AutoModelForZeroShotImageClassification": model,
    }
    return {"architectures": ["CLIPMoEModel"], "model_type": CLIP_MOE, "auto_map": auto_map, **both}


def export_state_dict(params: trees.Params) -> dict[str, np.ndarray]:
    """Converts params to these names and layouts, as views where possible.

    Raises ValueError for names that are no CLIP's.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    arrays, unknown = to_foreign(TABLE, leaves)
    if unknown:
        raise ValueError(f"transformers' CLIP has no names for {unknown[:10]}")
    return arrays


def _tower(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a tower's fields. In old files `…_config_dict` replaces them all, as in transformers."""
    name = f"{name}_dict" if config.get(f"{name}_dict") is not None else name
    return field(config, name, dict) if config.get(name) else {}


def _check_sizes(tower: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> None:
    for name, default in defaults.items():
        if isinstance(default, int) and name != "eos_token_id":
            check_size(prefix + name, tower[name])
    number(f"{prefix}layer_norm_eps", tower["layer_norm_eps"], 1.0)
    width, heads = tower["hidden_size"], tower["num_attention_heads"]
    if width % heads:
        raise ValueError(f"{prefix}hidden_size={width} is not a multiple of num_attention_heads={heads}")


def _check_shared(text: Mapping[str, Any], vision: Mapping[str, Any], further: tuple[str, ...]) -> None:
    for name in ("hidden_act", "layer_norm_eps", *further):
        for prefix, tower in (("text_config", text), ("vision_config", vision)):
            if name not in tower:
                raise ValueError(f"{prefix} has no field {name!r}")
        if text[name] != vision[name]:
            raise ValueError(
                f"text_config.{name}={reprlib.repr(text[name])} is not vision_config.{name}="
                f"{reprlib.repr(vision[name])}: this program's towers share one value"
            )


def _tower_fields(tower: Mapping[str, Any]) -> dict[str, Any]:
    width, mlp_width = tower["hidden_size"], tower["intermediate_size"]
    return {
        "width": width,
        "num_layers": tower["num_hidden_layers"],
        "head_width": width // tower["num_attention_heads"],
        "mlp_width": None if mlp_width == 4 * width else mlp_width,
    }


def _export_tower(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width or 4 * tower.width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.width // tower.head_width,
    }


def _import_eos(text: Mapping[str, Any]) -> int | None:
    """Returns the end token's id; None if it is the highest id of every row."""
    eos_token_id = text["eos_token_id"]
    if eos_token_id in (LEGACY_EOS_ID, text["vocab_size"] - 1):
        return None
    if isinstance(eos_token_id, list):
        shown = reprlib.repr(eos_token_id)
        raise ValueError(f"text_config.eos_token_id={shown}: this program looks for a single id")
    return whole_number("text_config.eos_token_id", eos_token_id, MOST_OF_ANY, least=0)


def image_processor(image_size: int) -> dict[str, Any]:
    """Returns the fields of a CLIPImageProcessor that prepares images as this program does."""
    return {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(value), 8) for value in MEAN],
        "image_std": [round(float(value), 8) for value in STD],
    }


def check_image_processor(fields: Mapping[str, Any], image_size: int, source: str) -> None:
    """Raises ValueError naming all fields of an image processor that prepares images otherwise.

    fields: of a preprocessor_config.json, or what a processor_config.json has of one; empty if there is none.
    """
    fields, expected = dict(fields), image_processor(image_size) | {"do_pad": False}
    if isinstance(fields.get("size"), int):  # as in older files
        fields["size"] = {"shortest_edge": fields["size"]}
    if isinstance(fields.get("crop_size"), int):
        fields["crop_size"] = {"height": fields["crop_size"], "width": fields["crop_size"]}
    # Other processors have other values for the fields that their files leave out.
    kind = fields.get("image_processor_type", fields.get("feature_extractor_type"))
    if kind not in (None, *PROCESSORS):
        fields["image_processor_type"], expected["image_processor_type"] = kind, PROCESSORS[0]
    check_preprocessing(fields, expected, source)
