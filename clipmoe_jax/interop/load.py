"""Reading a model from whatever it was saved as, recognised by content."""

import dataclasses
import json
import pickle
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath

from clipmoe_jax import checkpoints, trees
from clipmoe_jax.interop import huggingface, released
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.positions import stretch_positions, stretched_length

POSITIONS = "text/positional_embedding"
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
}


class Loaded(NamedTuple):
    """A model in numpy: params float32; source says in words what was found."""

    config: ClipConfig
    params: dict
    source: str


def read_model(
    path: str,
    *,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    context_length: int | None = None,
) -> Loaded:
    """Reads a model, recognised by content.

    path: a model folder of a run; a folder of transformers' CLIPModel (config.json and model.safetensors);
    or a `.pt` state dict of the released code (or of OpenAI's names).
    num_selected_experts: K of an MoE; None is what the file says, 2 for a `.pt`, which does not say.
    activation: of a `.pt`, which does not say; None is quick_gelu (open_clip's LAION models have "gelu").
    context_length: stretches a text tower of 77 positions to 248 when asked for 248; None keeps what there
    is.
    Raises FileNotFoundError, or ValueError naming what does not fit.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise FileNotFoundError(
            f"{path} does not exist: give a model folder of a run or of transformers, or a .pt file"
        )
    if folder.is_dir():
        found = next((f for f in (folder, folder / "params") if (f / "model.json").exists()), None)
        if found is not None:
            config, params = checkpoints.load_model(found)
            source = f"{_kind(config)} of a run"
        elif "model_type" in (described := _read_config_json(folder)):
            config, leaves = _read_huggingface(folder, described)
            params, source = trees.unflatten(leaves), f"{_kind(config)} in transformers' format"
        else:
            raise ValueError(
                f"{path} is not a model: it has neither a model.json (give RUN/base, RUN/moe/params, …) nor "
                "config.json and model.safetensors of transformers"
            )
    else:
        config, leaves = _read_state_dict(path, num_selected_experts or 2)
        config = dataclasses.replace(config, activation=activation or config.activation)
        params, source = trees.unflatten(leaves), f"{_kind(config)} in the released code's format"
    if activation not in (None, config.activation):
        raise ValueError(f"{path} says that its activation is {config.activation}, not {activation}")
    if config.moe and num_selected_experts not in (None, config.moe.num_selected_experts):
        moe = dataclasses.replace(config.moe, num_selected_experts=num_selected_experts)
        config = dataclasses.replace(config, moe=moe)
    if context_length is not None:
        config, params = _with_context_length(config, params, context_length, path)
    return Loaded(config, params, source)


def _read_state_dict(path: str, num_selected_experts: int) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a PyTorch file and PyTorch is not installed: pip install torch"
        ) from error
    try:
        # OpenAI's own files are TorchScript archives, which hold no pickled Python.
        if zipfile.is_zipfile(path) and _has_torchscript_code(path):
            state = dict(torch.jit.load(path, map_location="cpu").state_dict())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a PyTorch state dict: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: it holds a {type(state).__name__}")
    arrays = {name.removeprefix("module."): tensor.float().numpy() for name, tensor in state.items()}
    if not released.is_released(arrays):
        raise ValueError(
            f"{path} is not a ViT CLIP in the released code's names (visual.conv1.weight, …); its first "
            f"names are {list(arrays)[:3]}"
        )
    config, leaves = released.import_state_dict(arrays, num_selected_experts=num_selected_experts)
    checkpoints.check_params(config, {name: leaf.shape for name, leaf in leaves.items()}, path)
    return config, leaves


def _has_torchscript_code(path: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _read_config_json(folder: epath.Path) -> dict:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_huggingface(folder: epath.Path, described: dict) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    path = folder / "model.safetensors"
    huggingface.import_config(described)  # a wrong kind of model, before its file is read or missed
    if not path.exists():
        raise ValueError(
            f"{folder} has a config.json of transformers and no model.safetensors: write it in one piece "
            "with save_pretrained(…, safe_serialization=True)"
        )
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    # The package's own numpy loader does not know bfloat16, which JAX gives to numpy.
    arrays = {}
    for name, tensor in tensors:
        dtype = jnp.dtype(SAFETENSORS_DTYPES[tensor["dtype"]])
        arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    config, leaves = huggingface.import_state_dict(arrays, described)
    checkpoints.check_params(config, {name: leaf.shape for name, leaf in leaves.items()}, str(folder))
    return config, leaves


def _with_context_length(
    config: ClipConfig, params: dict, context_length: int, path: str
) -> tuple[ClipConfig, dict]:
    have = config.text.context_length
    if have == context_length:
        return config, params
    if stretched_length(have) != context_length:
        raise ValueError(
            f"{path} has {have} text positions and the config asks for {context_length}: they can be kept "
            f"({have}) or stretched ({stretched_length(have)})"
        )
    leaves = trees.flatten(params)
    leaves[POSITIONS] = stretch_positions(leaves[POSITIONS])
    text = dataclasses.replace(config.text, context_length=context_length)
    return dataclasses.replace(config, text=text), trees.unflatten(leaves)


def _kind(config: ClipConfig) -> str:
    if config.moe is None:
        return "dense CLIP"
    return f"CLIP-MoE ({config.moe.num_experts} experts, {config.moe.num_selected_experts} selected)"
