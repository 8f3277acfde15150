"""Writes a model's towers as programs that compute without this package: ONNX files, and StableHLO.

Each tower is a file that takes a batch of any size and gives features, float32 (B, d), not of unit length.
Letters: B batch, S image size, L context length, d embedding.
"""

import importlib.util
import logging
import os
import tempfile
import warnings
from typing import Any

import jax
import jax.export
import numpy as np
from etils import epath

from clipmoe_jax.core import trees
from clipmoe_jax.interop import huggingface
from clipmoe_jax.models.clip import METHODS, Clip, ClipConfig
from clipmoe_jax.models.transformer import ComputeConfig

NEEDED = ("torch", "transformers", "onnx", "onnxscript")  # to write ONNX files, and onnxruntime for int8
PLATFORMS = ("cpu", "cuda", "tpu")
EXAMPLES = 2  # rows of the batch that PyTorch traces: of one it would take the size for fixed


def write_onnx(folder: epath.Path, config: ClipConfig, params: trees.Params, *, int8: bool = False) -> None:
    """Writes image.onnx, `pixel_values` (B, 3, S, S) float32 as transformers' processor gives them ->
    `image_features`, and text.onnx, `input_ids` (B, L) int64 -> `text_features`; weights lie beside them.

    A mixture runs all its experts on each token, since no shape may depend on a value: E / K times the work
    in these layers. int8: stores matrices as int8, and quantises what they are multiplied with as it comes.
    Raises ValueError naming packages that are not installed.
    """
    needed = (*NEEDED, "onnxruntime") if int8 else NEEDED
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ONNX files are written with {', '.join(missing)}: pip install {' '.join(missing)}")
    import torch

    modules, size = torch_towers(config, params), config.vision.image_size
    inputs = {"image": ("pixel_values", torch.zeros(EXAMPLES, 3, size, size))}
    if config.text:
        ids = torch.full((EXAMPLES, config.text.context_length), config.text.vocab_size - 1)
        inputs["text"] = ("input_ids", ids)
    for name, (input_name, example) in inputs.items():
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch about itself
            path = (epath.Path(temporary) if int8 else folder) / f"{name}.onnx"
            torch.onnx.export(
                modules[name],
                (example,),
                path,
                dynamo=True,
                external_data=True,
                verbose=False,
                input_names=[input_name],
                output_names=[f"{name}_features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
            if int8:
                _quantize(path, folder / path.name)


def write_stablehlo(folder: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes image.stablehlo and text.stablehlo, programs of `jax.export` for cpu, cuda and tpu.

    They take the weights, {name: array} as in the model.safetensors beside them, and pixels uint8
    (B, S, S, 3) or token ids int32 (B, L). A mixture runs all its experts on each token.
    """
    model, size = Clip(config, ComputeConfig(dispatch="dense")), config.vision.image_size
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.float32) for name, leaf in trees.flatten(params).items()
    }
    (batch,) = jax.export.symbolic_shape("batch")
    inputs = {"image": jax.ShapeDtypeStruct((batch, size, size, 3), np.uint8)}
    if config.text:
        inputs["text"] = jax.ShapeDtypeStruct((batch, config.text.context_length), np.int32)
    for name, shape in inputs.items():

        def encode(weights, batch, method=METHODS[name]):
            return model.apply({"params": trees.unflatten(weights)}, batch, method=method)[0]

        exported = jax.export.export(jax.jit(encode), platforms=PLATFORMS)(weights, shape)
        (folder / f"{name}.stablehlo").write_bytes(bytes(exported.serialize()))


def torch_towers(config: ClipConfig, params: trees.Params) -> dict[str, Any]:
    """Returns each tower as a PyTorch module from a batch to features.

    It is our own module, whose experts are separate layers here; a dense model is one without MoE blocks.
    """
    import torch

    from clipmoe_jax.interop import modeling_clip_moe

    class Tower(torch.nn.Module):
        def __init__(self, model: Any, projection: Any):
            super().__init__()
            self.model, self.projection = model, projection

        def forward(self, batch: Any) -> Any:
            return self.projection(self.model(batch).pooler_output)

    fields = huggingface.export_config(config, "float32")
    described = {"vision_config": fields} if config.text is None else fields
    dense = {} if config.moe else {"num_experts": 1, "num_experts_per_tok": 1, "num_moe_layers": 0}
    towers: Any = {
        name: {field: value for field, value in (described[name] | dense).items() if field != "model_type"}
        for name in ("vision_config", "text_config")
        if name in described
    }
    with torch.device("meta"):
        model = modeling_clip_moe.CLIPMoEModel(
            modeling_clip_moe.CLIPMoEConfig(**towers, projection_dim=config.embed_dim)
        )
    arrays = huggingface.export_state_dict(params)
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    model.load_state_dict(tensors, assign=True, strict=config.text is not None)
    model = modeling_clip_moe.unstack(model).eval()
    modules = {"image": Tower(model.vision_model, model.visual_projection)}
    if config.text:
        modules["text"] = Tower(model.text_model, model.text_projection)
    return modules


def _quantize(path: epath.Path, out: epath.Path) -> None:
    """Writes an ONNX file with int8 matrices, a scale for each column. What they are multiplied with gets its
    scale as it comes."""
    from onnxruntime import quantization

    logging.disable(logging.WARNING)  # of advice that changes nothing here
    try:
        quantization.quantize_dynamic(
            os.fspath(path),
            os.fspath(out),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            use_external_data_format=True,
        )
    finally:
        logging.disable(logging.NOTSET)
