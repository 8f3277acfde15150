"""Reads a model from any format; the content tells which it is."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clipmoe_jax.core import trees
from clipmoe_jax.core.errors import naming
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.interop import hub, huggingface, nametable, openclip, released, tensor_files
from clipmoe_jax.interop.tensor_files import Tensors
from clipmoe_jax.models.clip import ClipConfig, abstract_params
from clipmoe_jax.models.model_folder import check_files, load_model, read_config
from clipmoe_jax.models.positions import resize_grid, stretch_positions, stretched_length

TEXT_POSITIONS, VISION_POSITIONS = "text/positional_embedding", "visual/positional_embedding"

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
# Parts of names that torch's wrappers of modules add: DistributedDataParallel, compile, FSDP, checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The name of a tensor that every CLIP has, after what may stand before it.
A_CLIP = re.compile(r"(.*\.)?(visual\.conv1\.weight|vision_model\.embeddings\.class_embedding)")
Place = Callable[[str, np.ndarray], Any]  # (our name, array) -> the leaf of the param tree


class Loaded(NamedTuple):
    """A model: its architecture, its params, and its kind and format in words."""

    config: ClipConfig
    params: dict
    source: str


class _Asked(NamedTuple):
    """The arguments of `read_model` for what a state dict may not say."""

    num_selected_experts: int | None
    activation: str | None
    vision_head_width: int | None
    text_head_width: int | None


class _Checkpoint(NamedTuple):
    """An opened checkpoint: its name table, architecture and tensors, its kind and format in words, and the
    file that it is read from, which may name others."""

    table: list[nametable.Row]
    config: ClipConfig
    tensors: Tensors
    source: str
    weights: epath.Path


def read_model(
    path: str,
    *,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
    dtype: str | None = "float32",
    place: Place = lambda _, leaf: leaf,
) -> Loaded:
    """Reads a model from any format in docs/interop.md.

    path: a file or folder, or a name of `hub.local_path`.
    num_selected_experts: K of an MoE; None takes what the file says, or 2 if it does not. activation:
    "quick_gelu" or "gelu" for a bare state dict, which does not say it; None means quick_gelu.
    vision_head_width, text_head_width: of a bare state dict too; None means 64, or what open_clip's vision
    towers of that width have.
    context_length: 248 stretches a text tower of 77 positions; None keeps them. image_size: resizes the
    vision tower's grid of positions; None keeps it. dtype: of the params; None keeps each tensor's own.
    place: turns a leaf's name and array into the leaf to keep, before the next one is read, so that the model
    is never in memory twice, nor all of it on one device if it is sharded.
    Raises FileNotFoundError, or ValueError naming what does not fit, and the first tensor that has NaN or
    infinite values, in the file or in `dtype`.
    """
    asked = _Asked(num_selected_experts, activation, vision_head_width, text_head_width)
    location, run_folder = _find(path)
    if run_folder is not None:
        config, params = load_model(run_folder)
        leaves = trees.flatten(params)
        del params
        for name in list(leaves):
            leaves[name] = place(name, tensor_files.finite(np.asarray(leaves.pop(name)), name, dtype, path))
        params, source = trees.unflatten(leaves), f"{describe(config)} of a run"
    else:
        table, config, tensors, source, weights = _open(location, asked)
        abstract = abstract_params(config)
        shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract).items()}
        nametable.check_shapes(table, shapes, tensors, path)
        with naming(path):
            check_files(abstract, tensor_files.files_of(weights))
        params = trees.unflatten(nametable.to_ours(table, tensor_files.read_as(tensors, dtype, path), place))
    _check_asked(asked, config, path)
    if config.moe and num_selected_experts not in (None, config.moe.num_selected_experts):
        moe = dataclasses.replace(config.moe, num_selected_experts=num_selected_experts)
        config = dataclasses.replace(config, moe=moe)
    if context_length is not None:
        config, params = _with_context_length(config, params, context_length, path, place)
    if image_size is not None:
        config, params = _with_image_size(config, params, image_size, place)
    return Loaded(config, params, source)


def read_architecture(
    path: str,
    *,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
) -> ClipConfig:
    """Returns the architecture of a model, without its params; arguments and errors as of `read_model`."""
    location, run_folder = _find(path)
    if run_folder is not None:
        return read_config(run_folder)
    return _open(location, _Asked(None, activation, vision_head_width, text_head_width)).config


def describe(config: ClipConfig) -> str:
    """Returns the kind of model that an architecture is, in words."""
    kind = "CLIP" if config.text else "CLIP vision tower"
    if config.moe is None:
        return f"dense {kind}"
    return f"{kind}-MoE ({config.moe.num_experts} experts, {config.moe.num_selected_experts} selected)"


def _check_asked(asked: _Asked, config: ClipConfig, path: str) -> None:
    properties = {
        "activation": (config.activation, asked.activation),
        "vision.head_width": (config.vision.head_width, asked.vision_head_width),
        "text.head_width": (config.text and config.text.head_width, asked.text_head_width),
    }
    if config.text is None and asked.text_head_width is not None:
        raise ValueError(f"{path} has no text tower: leave text_head_width={asked.text_head_width} out")
    differing = {name: both for name, both in properties.items() if both[1] not in (None, both[0])}
    if differing:
        told = " and its ".join(f"{name} is {has}, not {wanted}" for name, (has, wanted) in differing.items())
        fields = " and ".join(f"base.architecture.{name}" for name in differing)
        raise ValueError(
            f"{path} says that its {told}: ask for {' and '.join(str(has) for has, _ in differing.values())} "
            f"({fields} of a config) or for none"
        )


def _find(path: str) -> tuple[epath.Path, epath.Path | None]:
    """Returns where a model lies, and its model folder if it is a run's."""
    location = epath.Path(hub.local_path(path))
    if not location.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a file or a folder of OpenAI's CLIP, transformers, open_clip, the "
            "released CLIP-MoE, a model folder of a run, or a name: hf-hub:OWNER/NAME, or "
            "open_clip:MODEL/TAG (of open_clip, in Python also with pretrained=TAG)"
        )
    return location, next((f for f in (location, location / "params") if (f / "model.json").exists()), None)


def _open(location: epath.Path, asked: _Asked) -> _Checkpoint:
    return (_open_folder if location.is_dir() else _open_file)(location, asked)


def _open_folder(folder: epath.Path, asked: _Asked) -> _Checkpoint:
    weights = _first(folder, huggingface.WEIGHT_FILES)
    described = _read_described(folder / "config.json")
    if "model_type" in described and not (
        weights is None and _first(folder, openclip.WEIGHT_FILES) and (folder / openclip.CONFIG_FILE).exists()
    ):
        with naming(folder / "config.json"):  # another kind of model is refused before a missing file
            config = huggingface.import_config(described)
        if weights is None:
            raise ValueError(f"{folder} has transformers' config.json and none of {huggingface.WEIGHT_FILES}")
        return _huggingface(weights, _open_weights(weights), config, folder)
    if (folder / openclip.CONFIG_FILE).exists():
        weights = _first(folder, openclip.WEIGHT_FILES)
        if weights is None:
            raise ValueError(f"{folder} has an {openclip.CONFIG_FILE} and none of {openclip.WEIGHT_FILES}")
        return _openclip(weights, _open_weights(weights), folder)
    files = sorted(f for f in folder.iterdir() if f.suffix in WEIGHT_SUFFIXES)
    if len(files) == 1:
        return _open_file(files[0], asked)
    fix = f": give one of its files {[f.name for f in files][:10]}" if files else ""
    raise ValueError(
        f"{folder} is not a model{fix}: it has neither model.json (a run's; give RUN/base, "
        f"RUN/moe/params, …), nor transformers' config.json, nor {openclip.CONFIG_FILE}"
    )


def _open_file(path: epath.Path, asked: _Asked) -> _Checkpoint:
    tensors = _open_weights(path)
    if huggingface.has_these_names(tensors):
        described = _read_described(path.parent / "config.json")
        if "model_type" not in described:
            raise ValueError(
                f"{path} has transformers' names, but no config.json beside it says its sizes: put it there"
            )
        with naming(path.parent / "config.json"):
            config = huggingface.import_config(described)
        return _huggingface(path, tensors, config, path)
    if (other := _other_kind(tensors)) is None and released.has_these_names(tensors):
        if (path.parent / openclip.CONFIG_FILE).exists():
            return _openclip(path, tensors, path.parent)
        tensors, kind = released.normalise(tensors)
        beside = path.parent / released.CONFIG_FILE
        said = _read_described(beside)
        is_bare = kind == released.BARE and not said
        widths = asked.vision_head_width, asked.text_head_width
        with naming(beside if said else path):
            config = released.infer_config(
                tensors,
                activation=said.get("activation") or asked.activation or "quick_gelu",
                num_selected_experts=asked.num_selected_experts or said.get("num_selected_experts", 2),
                head_widths=widths if is_bare else (released.HEAD_WIDTH, released.HEAD_WIDTH),
            )
        note = _assumed(asked, config) if is_bare else ""
        return _Checkpoint(released.TABLE, config, tensors, f"{describe(config)} in {kind}{note}", path)
    raise ValueError(f"{path} is not a ViT CLIP: {other or f'its first names are {list(tensors)[:3]}'}")


def _assumed(asked: _Asked, config: ClipConfig) -> str:
    """Returns what a bare state dict does not say and nobody asked for, as a note in parentheses."""
    assumed = {
        "activation": None if asked.activation else config.activation,
        "vision.head_width": None if asked.vision_head_width else config.vision.head_width,
        "text.head_width": None if asked.text_head_width or not config.text else config.text.head_width,
    }
    values = ", ".join(f"{name}={value}" for name, value in assumed.items() if value)
    return f" (assumed, as the file does not say it: {values})" if values else ""


def _huggingface(
    weights: epath.Path, tensors: Tensors, config: ClipConfig, source: epath.Path
) -> _Checkpoint:
    folder = source if source.is_dir() else source.parent
    for name in (huggingface.IMAGE_PROCESSOR_FILE, huggingface.PROCESSOR_FILE):
        fields = _read_described(folder / name)
        if name == huggingface.PROCESSOR_FILE:
            where = f"{folder}/{name}"
            fields = field(fields, "image_processor", dict, where) if fields.get("image_processor") else {}
        huggingface.check_image_processor(fields, config.vision.image_size, f"{folder}/{name}")
    tensors = huggingface.normalise(tensors)
    if "embeddings.class_embedding" in tensors:
        raise ValueError(
            f"{source} is a vision tower without its projection: give the whole CLIPModel, or "
            "CLIPVisionModelWithProjection"
        )
    told = f"{describe(config)} in transformers' format"
    return _Checkpoint(huggingface.TABLE, config, tensors, told, weights)


def _openclip(weights: epath.Path, tensors: Tensors, folder: epath.Path) -> _Checkpoint:
    described = read_json(folder / openclip.CONFIG_FILE)
    with naming(folder / openclip.CONFIG_FILE):
        config = openclip.import_config(described)
    tensors, _ = released.normalise(tensors)
    told = f"{describe(config)} in open_clip's format"
    return _Checkpoint(released.TABLE, config, tensors, told, weights)


def _other_kind(tensors: Tensors) -> str | None:
    """Returns, in words, the kind of model that a state dict is if it is known and no ViT CLIP."""
    if "visual.layer1.0.conv1.weight" in tensors:
        return "its vision tower is a ResNet"
    if "logit_bias" in tensors:
        return "it has a logit_bias, as SigLIP does"
    if any(name.startswith("visual.trunk.") for name in tensors):
        return "its vision tower is one of timm's"
    return None


def _open_weights(path: epath.Path) -> Tensors:
    """Opens the tensors of the one CLIP in a file, without what its names have before or amid CLIP's own.

    A training checkpoint has an optimizer beside the model, a module that contains a CLIP has other tensors:
    these are left out. Raises ValueError if there are several CLIPs, such as a student and a teacher.
    """
    is_index = tensor_files.is_index(path)
    opened = (tensor_files.open_sharded if is_index else tensor_files.open_tensors)(path)
    names = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in opened}
    prefixes = sorted({match[1] or "" for name in names.values() if (match := A_CLIP.fullmatch(name))})
    if len(prefixes) > 1 or len(set(names.values())) < len(names):
        firsts = [name for name in opened if A_CLIP.fullmatch(names[name])]
        raise ValueError(f"{path} holds several models ({', '.join(firsts)}): save one of them alone")
    [prefix] = prefixes or [""]
    return {n.removeprefix(prefix): opened[name] for name, n in names.items() if n.startswith(prefix)}


def _first(folder: epath.Path, names: tuple[str, ...]) -> epath.Path | None:
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read_described(path: epath.Path) -> dict[str, Any]:
    """Returns the contents of a JSON file that may be absent; then they are empty."""
    return read_json(path) if path.exists() else {}


def _with_context_length(
    config: ClipConfig, params: dict, context_length: int, path: str, place: Place
) -> tuple[ClipConfig, dict]:
    if config.text is None or config.text.context_length == context_length:
        return config, params
    length = config.text.context_length
    if stretched_length(length) != context_length:
        raise ValueError(
            f"{path} has {length} text positions, not {context_length}: keep them ({length}) or stretch them "
            f"({stretched_length(length)})"
        )
    leaves = trees.flatten(params)
    leaves[TEXT_POSITIONS] = place(TEXT_POSITIONS, stretch_positions(np.asarray(leaves[TEXT_POSITIONS])))
    text = dataclasses.replace(config.text, context_length=context_length)
    return dataclasses.replace(config, text=text), trees.unflatten(leaves)


def _with_image_size(
    config: ClipConfig, params: dict, image_size: int, place: Place
) -> tuple[ClipConfig, dict]:
    if config.vision.image_size == image_size:
        return config, params
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    leaves = trees.flatten(params)
    positions = np.asarray(leaves[VISION_POSITIONS])
    resized = resize_grid(positions, image_size // config.vision.patch_size)
    leaves[VISION_POSITIONS] = place(VISION_POSITIONS, resized)
    return config, trees.unflatten(leaves)
