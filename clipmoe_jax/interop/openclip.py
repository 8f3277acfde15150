"""open_clip's `open_clip_config.json`. Its state dicts have OpenAI's names (`released.TABLE`)."""

import reprlib
from collections.abc import Mapping
from typing import Any

from clipmoe_jax.core.checks import number, whole_number
from clipmoe_jax.core.json_files import field
from clipmoe_jax.interop import huggingface
from clipmoe_jax.models.clip import MOST_OF_ANY, ClipConfig, TextConfig, VisionConfig, check_size
from clipmoe_jax.models.inputs import MEAN, STD, check_preprocessing

CONFIG_FILE, WEIGHTS_STEM = "open_clip_config.json", "open_clip_model"
# Names of a folder's weights. The first that exists is read.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.safetensors",
    *huggingface.WEIGHT_FILES,
)

# Fields of open_clip's tower configs with the only value that this program's towers can compute.
FIXED = {
    "ls_init_value": None,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "act_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "timm_model_name": None,
    "hf_model_name": None,
    "embed_cls": False,
    "no_causal_mask": False,
    "proj_bias": False,
    "proj_type": "linear",
}
# Fields that `import_config` reads.
READ = {
    *("layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"),
    *("context_length", "vocab_size", "pool_type", "eos_id"),
}
# Fields that change no feature of a trained model.
IGNORED = {
    *("patch_dropout", "output_tokens", "pad_id", "attn_pooler_queries", "attn_pooler_heads"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained", "hf_proj_type"),
    *("hf_pooler_type", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"),
    "timm_drop_path",
}
# The fields of `preprocess_cfg`, apart from the size, which open_clip takes from the model.
PREPROCESSING = {
    "mode": "RGB",
    "mean": [round(float(value), 8) for value in MEAN],
    "std": [round(float(value), 8) for value in STD],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
DEFAULT_EPS = 1e-5


def import_config(config: Mapping[str, Any]) -> ClipConfig:
    """Returns the architecture that an open_clip_config.json, or one of open_clip's model configs, describes.

    Raises ValueError naming the first field that this program's towers cannot follow.
    """
    model = field(config, "model_cfg", dict) if "model_cfg" in config else config
    if missing := [name for name in ("embed_dim", "vision_cfg", "text_cfg") if name not in model]:
        raise ValueError(f"{CONFIG_FILE} lacks {', '.join(missing)}")
    vision, text = field(model, "vision_cfg", dict), field(model, "text_cfg", dict)
    if isinstance(vision.get("layers"), list):
        raise ValueError(f"vision_cfg.layers={vision['layers']} is a ResNet, not a ViT: give a ViT CLIP")
    if "init_logit_bias" in model:
        raise ValueError(f"init_logit_bias={model['init_logit_bias']} is a SigLIP's, not a CLIP's")
    if "multimodal_cfg" in model:
        raise ValueError("multimodal_cfg is a CoCa's, not a CLIP's")
    for name, tower in (("vision_cfg", vision), ("text_cfg", text)):
        for key, value in tower.items():
            shown = reprlib.repr(value)
            if key in FIXED and value != FIXED[key]:
                raise ValueError(f"{name}.{key}={shown}: this program's towers have {FIXED[key]!r}")
            if key not in (FIXED.keys() | READ | IGNORED):
                raise ValueError(f"{name}.{key}={shown} is unknown to this program")
    if vision.get("pool_type", "tok") != "tok":
        raise ValueError(f"vision_cfg.pool_type={vision['pool_type']!r}: this program pools the class token")
    preprocessing = field(config, "preprocess_cfg", dict) if config.get("preprocess_cfg") else {}
    check_preprocessing(preprocessing, PREPROCESSING, CONFIG_FILE)
    if _eps(vision) != _eps(text):
        raise ValueError(
            f"vision_cfg has LayerNorms of eps {_eps(vision)}, text_cfg of {_eps(text)}: this program's "
            "towers share one value"
        )
    width, text_width = _size(vision, "vision_cfg.width", 768), _size(text, "text_cfg.width", 512)
    heads = _size(text, "text_cfg.heads", 8)
    if text_width % heads:
        raise ValueError(f"text_cfg.width={text_width} is not a multiple of text_cfg.heads={heads}")
    return ClipConfig(
        embed_dim=check_size("embed_dim", model["embed_dim"]),
        vision=VisionConfig(
            image_size=_side(vision, "image_size", 224),
            patch_size=_side(vision, "patch_size", 16),
            width=width,
            num_layers=_size(vision, "vision_cfg.layers", 12),
            head_width=_size(vision, "vision_cfg.head_width", 64),
            mlp_width=_mlp_width("vision_cfg", vision, width),
        ),
        text=TextConfig(
            vocab_size=_size(text, "text_cfg.vocab_size", 49408),
            context_length=_size(text, "text_cfg.context_length", 77),
            width=text_width,
            num_layers=_size(text, "text_cfg.layers", 12),
            head_width=text_width // heads,
            mlp_width=_mlp_width("text_cfg", text, text_width),
            eos_token_id=_eos_token_id(text),
        ),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        layer_norm_eps=_eps(vision),
    )


def export_config(config: ClipConfig) -> dict[str, Any]:
    """Returns the open_clip_config.json of a dense model. The inverse of `import_config`.

    Raises ValueError for models that open_clip does not build: a CLIP-MoE, a vision tower alone.
    """
    if config.moe:
        raise ValueError(
            "open_clip builds no CLIP-MoE: convert it to huggingface, or one of its experts (--expert=N), or "
            "a dense model of its run (RUN/dense/params)"
        )
    if config.text is None:
        raise ValueError("open_clip builds no vision tower alone: convert it to huggingface")
    vision = {
        "image_size": config.vision.image_size,
        "patch_size": config.vision.patch_size,
        "head_width": config.vision.head_width,
        **_export_tower(config.vision, config.layer_norm_eps),
    }
    text = {
        "context_length": config.text.context_length,
        "vocab_size": config.text.vocab_size,
        "heads": config.text.width // config.text.head_width,
        **_export_tower(config.text, config.layer_norm_eps),
    }
    if config.text.eos_token_id is not None:
        text |= {"pool_type": "eos", "eos_id": config.text.eos_token_id}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": PREPROCESSING,
    }


def _export_tower(tower: VisionConfig | TextConfig, eps: float) -> dict[str, Any]:
    fields: dict[str, Any] = {"width": tower.width, "layers": tower.num_layers}
    if tower.mlp_width is not None:
        # open_clip rounds width * mlp_ratio down; the half keeps float error from costing a unit.
        fields["mlp_ratio"] = (tower.mlp_width + 0.5) / tower.width
    if eps != DEFAULT_EPS:
        fields["norm_kwargs"] = {"eps": eps}
    return fields


def _eps(tower: Mapping[str, Any]) -> float:
    kwargs = field(tower, "norm_kwargs", dict) if tower.get("norm_kwargs") else {}
    if odd := sorted(kwargs.keys() - {"eps"}):
        raise ValueError(f"norm_kwargs has {odd}: this program's LayerNorms have only an eps")
    return number("norm_kwargs.eps", kwargs.get("eps", DEFAULT_EPS), 1.0)


def _size(fields: Mapping[str, Any], name: str, default: int) -> int:
    """Returns a size. name: as errors call it; the fields have its last part."""
    return check_size(name, fields.get(name.rpartition(".")[2], default))


def _mlp_width(name: str, tower: Mapping[str, Any], width: int) -> int | None:
    mlp_width = int(width * number(f"{name}.mlp_ratio", tower.get("mlp_ratio", 4.0), 1000.0))
    return None if mlp_width == 4 * width else mlp_width


def _side(tower: Mapping[str, Any], name: str, default: int) -> int:
    """Returns a number of pixels, which open_clip may write as [height, width]."""
    value = tower.get(name, default)
    values = value if isinstance(value, list) else [value]
    sides = {check_size(f"vision_cfg.{name}", side) for side in values}
    if len(sides) != 1:
        raise ValueError(
            f"vision_cfg.{name}={reprlib.repr(value)}: this program takes square images and patches"
        )
    return sides.pop()


def _eos_token_id(text: Mapping[str, Any]) -> int | None:
    """Returns the end token's id; None for open_clip's default, the highest id of a row."""
    pool_type = text.get("pool_type", "argmax")
    if pool_type == "argmax":
        return None
    if pool_type == "eos":
        return whole_number("text_cfg.eos_id", text.get("eos_id", 2), MOST_OF_ANY, least=0)
    raise ValueError(f"text_cfg.pool_type={pool_type!r}: this program pools the end token ('argmax', 'eos')")
