"""Writes a model for other programs: one function per format, from architecture and params to a folder.

`clipmoe` is a state dict for the released code, `huggingface` a folder for transformers,
`sentence_transformers` for the library of that name, `openclip` for open_clip; there every tensor keeps its
dtype. `onnx` and `stablehlo` are programs, in float32. Params must have the shapes of their architecture.
"""

import json
import pathlib

import chex
import numpy as np
from etils import epath
from tokenizers import AddedToken, Regex, normalizers, processors
from tokenizers import Tokenizer as Backend

from clipmoe_jax.core import trees
from clipmoe_jax.interop import huggingface, openclip, programs, released, tensor_files
from clipmoe_jax.models.clip import ClipConfig, abstract_params
from clipmoe_jax.models.inputs import SPECIAL_IDS
from clipmoe_jax.models.positions import stretched_length
from clipmoe_jax.models.transformer import first_moe_layer

RELEASED_LENGTH = stretched_length(77)


def write_clipmoe(folder: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes model.pt, a state dict for the released code's loaders, and clipmoe.json, which says the rest.

    Raises ValueError naming every property whose value the released code does not support.
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
        "moe.sequence_share": (config.moe.sequence_share if config.moe else 0.0, 0.0),
        "moe.expert_layers": (config.moe.expert_layers if config.moe else "feed_forward", "feed_forward"),
    }
    if odd := {name: values for name, values in fixed.items() if values[0] != values[1]}:
        has = ", ".join(f"{name}={ours}" for name, (ours, _) in odd.items())
        wants = ", ".join(f"{name}={theirs}" for name, (_, theirs) in odd.items())
        can_stretch = stretched_length(text.context_length) == RELEASED_LENGTH
        only_short = can_stretch and odd.keys() == {"text.context_length"}
        fix = f"ask for context_length={RELEASED_LENGTH}" if only_short else "convert it to huggingface"
        raise ValueError(f"the released code supports only {wants}, this model has {has}: {fix}")
    chex.assert_trees_all_equal_shapes(params, abstract_params(config))
    beside = {"activation": config.activation}
    if config.moe:
        depth = config.vision.num_layers
        beside |= {
            "num_experts": config.moe.num_experts,
            "num_selected_experts": config.moe.num_selected_experts,
            "num_moe_layers": depth - first_moe_layer(depth, config.moe),
        }
    _write_json(folder / released.CONFIG_FILE, beside)
    tensor_files.write_torch(folder / released.FILE, released.export_state_dict(params))


def write_huggingface(
    folder: epath.Path,
    config: ClipConfig,
    params: trees.Params,
    tokenizer: Backend,
    preprocessing: pathlib.Path,
    shard_bytes: int = tensor_files.SHARD_BYTES,
) -> None:
    """Writes a folder for `from_pretrained`: config, weights, processor, and a CLIP-MoE's PyTorch module.

    tokenizer: CLIP's byte-pair encoder, written only if the model has CLIP's vocabulary. preprocessing: the
    folder of the image processor's modules.
    """
    chex.assert_trees_all_equal_shapes(params, abstract_params(config))
    arrays = huggingface.export_state_dict(params)
    dtypes = {array.dtype.name for array in arrays.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    _write_json(folder / "config.json", huggingface.export_config(config, dtype))
    _write_image_processor(folder, config, preprocessing)
    _write_tokenizer(folder, config, tokenizer)
    if config.moe:
        source = pathlib.Path(__file__).with_name(huggingface.MODELING_FILE)
        (folder / huggingface.MODELING_FILE).write_text(source.read_text())
    tensor_files.write_safetensors(folder, arrays, shard_bytes=shard_bytes)


def write_sentence_transformers(
    folder: epath.Path,
    config: ClipConfig,
    params: trees.Params,
    tokenizer: Backend,
    preprocessing: pathlib.Path,
) -> None:
    """Writes a folder for `SentenceTransformer`, which has all that `write_huggingface` writes.

    Arguments as there. Raises ValueError for a vision tower alone, and for another vocabulary than CLIP's.
    """
    if config.text is None or not config.text.has_clips_tokens:
        raise ValueError("sentence-transformers takes models of both towers with CLIP's tokens")
    write_huggingface(folder, config, params, tokenizer, preprocessing)
    features = {"method_output_name": "pooler_output"}
    modalities = {name: {"method": f"get_{name}_features", **features} for name in ("text", "image")}
    module = {"modality_config": modalities, "module_output_name": "sentence_embedding"}
    _write_json(folder / "sentence_bert_config.json", module)
    kind = "sentence_transformers.models.Transformer"
    _write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": kind}])


def write_onnx(
    folder: epath.Path,
    config: ClipConfig,
    params: trees.Params,
    tokenizer: Backend,
    preprocessing: pathlib.Path,
    *,
    int8: bool = False,
) -> None:
    """Writes `programs.write_onnx`'s files and a processor for transformers. Arguments as of both."""
    chex.assert_trees_all_equal_shapes(params, abstract_params(config))
    _write_image_processor(folder, config, preprocessing)
    _write_tokenizer(folder, config, tokenizer)
    programs.write_onnx(folder, config, params, int8=int8)


def write_stablehlo(
    folder: epath.Path,
    config: ClipConfig,
    params: trees.Params,
    tokenizer: Backend,
    preprocessing: pathlib.Path,
) -> None:
    """Writes `programs.write_stablehlo`'s files, model.safetensors, the module that prepares images and
    tokenizer.json. Arguments as of `write_huggingface`."""
    chex.assert_trees_all_equal_shapes(params, abstract_params(config))
    programs.write_stablehlo(folder, config, params)
    module = huggingface.PROCESSOR_FILES[1]
    (folder / module).write_text((preprocessing / module).read_text())
    _write_tokenizer(folder, config, tokenizer)
    arrays = {name: np.asarray(leaf) for name, leaf in trees.flatten(params).items()}
    tensor_files.write_safetensors(folder, arrays, shard_bytes=np.iinfo(np.int64).max)


def write_openclip(folder: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes a folder for open_clip's `local-dir:` schema. Raises ValueError if open_clip cannot build it."""
    fields = openclip.export_config(config)
    chex.assert_trees_all_equal_shapes(params, abstract_params(config))
    _write_json(folder / openclip.CONFIG_FILE, fields)
    arrays = released.export_state_dict(params)
    arrays.pop(released.POSITIONS_RES, None)
    tensor_files.write_safetensors(folder, arrays, openclip.WEIGHTS_STEM, shard_bytes=np.iinfo(np.int64).max)


def _write_image_processor(folder: epath.Path, config: ClipConfig, preprocessing: pathlib.Path) -> None:
    """Writes our image processor. Transformers' own takes its place where a dense model is loaded without
    trust_remote_code; who loads a CLIP-MoE has to give that anyway."""
    modules, name = huggingface.PROCESSOR_FILES, huggingface.PROCESSOR_CLASS
    for file in modules:
        (folder / file).write_text((preprocessing / file).read_text())
    fields = {
        "auto_map": {"AutoImageProcessor": f"{modules[0].removesuffix('.py')}.{name}"},
        "image_processor_type": name if config.moe else huggingface.PROCESSORS[0],
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        **huggingface.image_processor(config.vision.image_size),
    }
    _write_json(folder / huggingface.IMAGE_PROCESSOR_FILE, fields)


def _write_tokenizer(folder: epath.Path, config: ClipConfig, encoder: Backend) -> None:
    """Writes our byte-pair encoder with CLIPTokenizer's steps around it, which do not repair text.

    Nothing for a model that takes no text, or other tokens than CLIP's.
    """
    if config.text is None or not config.text.has_clips_tokens:
        return
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
        "model_max_length": config.text.context_length,
    }
    _write_json(folder / "tokenizer_config.json", fields)


def _write_json(path: epath.Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
