"""Writing a model for other programs: one function for each format, from config and params to a folder.

`clipmoe` is a state dict for the released code, `huggingface` a folder for transformers, `openclip` one for
open_clip. A tensor keeps its dtype.
"""

import json
import pathlib

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, processors
from tokenizers import Tokenizer as Backend

from clipmoe_jax.core import trees
from clipmoe_jax.interop import huggingface, openclip, released, tensor_files
from clipmoe_jax.interop.load import RELEASED_CONFIG, RELEASED_FILE
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.inputs import END_ID, MEAN, SPECIAL_IDS, STD
from clipmoe_jax.models.positions import stretched_length
from clipmoe_jax.models.transformer import first_moe_layer

RELEASED_LENGTH = stretched_length(77)


def write_clipmoe(folder: pathlib.Path, config: ClipConfig, params: trees.Params) -> None:
    """model.pt, a state dict for the released code's loaders; clipmoe.json, what that file does not say.

    Raises ValueError naming the first property that the released code, which fixes it, does not have.
    """
    text = config.text
    if text is None:
        raise ValueError("the released code has no vision tower alone: convert it to huggingface")
    fixed = {
        "text.context_length": (text.context_length, RELEASED_LENGTH),
        "activation": (config.activation, "quick_gelu"),
        "layer_norm_eps": (config.layer_norm_eps, 1e-5),
        "vision.head_width": (config.vision.head_width, released.HEAD_WIDTH),
        "text.head_width": (text.head_width, released.HEAD_WIDTH),
        "vision.mlp_width": (config.vision.mlp_width or 4 * config.vision.width, 4 * config.vision.width),
        "text.mlp_width": (text.mlp_width or 4 * text.width, 4 * text.width),
        "text.eos_token_id": (text.eos_token_id, None),
    }
    for name, (ours, theirs) in fixed.items():
        if ours != theirs:
            fix = f": add --context_length={theirs}" if name == "text.context_length" else ""
            raise ValueError(f"the released code has {name}={theirs} alone, this model {ours}{fix}")
    beside = {"activation": config.activation}
    if config.moe:
        depth = config.vision.num_layers
        beside |= {
            "num_experts": config.moe.num_experts,
            "num_selected_experts": config.moe.num_selected_experts,
            "num_moe_layers": depth - first_moe_layer(depth, config.moe),
        }
    _write_json(folder / RELEASED_CONFIG, beside)
    tensor_files.write_torch(folder / RELEASED_FILE, released.export_state_dict(params))


def write_huggingface(
    folder: pathlib.Path,
    config: ClipConfig,
    params: trees.Params,
    tokenizer: Backend,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """A folder for `from_pretrained`: config, safetensors, processor; for a CLIP-MoE its PyTorch module too.

    tokenizer: CLIP's byte-pair encoder, which is written for a model that has CLIP's vocabulary.
    """
    arrays = huggingface.export_state_dict(params)
    dtypes = {array.dtype.name for array in arrays.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    _write_json(folder / "config.json", huggingface.export_config(config, dtype))
    _write_image_processor(folder, config.vision.image_size)
    if config.text and config.text.vocab_size == END_ID + 1:
        _write_tokenizer(folder, tokenizer, config.text.context_length)
    if config.moe:
        source = pathlib.Path(__file__).with_name(huggingface.MODELING_FILE)
        (folder / huggingface.MODELING_FILE).write_text(source.read_text())
    tensor_files.write_safetensors(folder, arrays, shard_bytes=shard_bytes)


def write_openclip(folder: pathlib.Path, config: ClipConfig, params: trees.Params) -> None:
    """A folder for open_clip's `local-dir:` schema. Raises ValueError for what open_clip does not build."""
    _write_json(folder / openclip.CONFIG_FILE, openclip.export_config(config))
    arrays = released.export_state_dict(params)
    arrays.pop(released.POSITIONS_RES, None)
    tensor_files.write_safetensors(folder, arrays, openclip.WEIGHTS_STEM, shard_bytes=np.iinfo(np.int64).max)


def _write_image_processor(folder: pathlib.Path, image_size: int) -> None:
    fields = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
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
    _write_json(folder / "preprocessor_config.json", fields)


def _write_tokenizer(folder: pathlib.Path, encoder: Backend, context_length: int) -> None:
    """Our byte-pair encoder with what CLIPTokenizer does around it; it does not repair text as ours does."""
    start, end = SPECIAL_IDS
    tokenizer = Backend.from_str(encoder.to_str())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    ends = (end, SPECIAL_IDS[end]), (start, SPECIAL_IDS[start])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_IDS])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "model_max_length": context_length,
    }
    _write_json(folder / "tokenizer_config.json", fields)


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
