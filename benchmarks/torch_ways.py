"""Runs the exported CLIP-MoE and a dense CLIP as PyTorch programs do: traced, exported, offloaded, quantised.

    python -m benchmarks.torch_ways        # prints the table of docs/interop.md

Each way is made with one input and run on another, of another batch size, whose tokens choose other experts
and whose captions are padded. The number is the largest difference between image and text features and those
of the same model in eager mode. The models are small and random: the table tells whether a way computes the
same, not how fast.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import nn

from clipmoe_jax.interop import modeling_clip_moe as exported

LENGTH, END_ID = 12, 99
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 98,
    "eos_token_id": END_ID,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


class Input(NamedTuple):
    """pixel_values (B, 3, 32, 32), input_ids and attention_mask (B, L)."""

    pixel_values: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class Features(nn.Module):
    """A model as a function of tensors to tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids, attention_mask):
        """Returns image and text features, each (B, projection)."""
        image = self.model.get_image_features(pixel_values)
        text = self.model.get_text_features(input_ids, attention_mask)
        return image.pooler_output, text.pooler_output


def make_models(num_blocks: int = 2) -> dict[str, nn.Module]:
    """Returns a CLIP-MoE and a dense CLIP with the same random weights where both have them."""
    torch.manual_seed(0)
    depth = {"num_hidden_layers": num_blocks}
    towers = {"text_config": TEXT | depth, "vision_config": VISION | depth, "projection_dim": 24}
    models = {
        "CLIP-MoE": exported.CLIPMoEModel(exported.CLIPMoEConfig(**towers)),
        "dense": transformers.CLIPModel(transformers.CLIPConfig(**towers)),
    }
    for name, parameter in models["CLIP-MoE"].named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.15)
    shared = models["CLIP-MoE"].state_dict()
    own = models["dense"].state_dict()
    own |= {name: shared[name] if shared[name].shape == own[name].shape else shared[name][0] for name in own}
    models["dense"].load_state_dict(own)
    return {name: model.eval() for name, model in models.items()}


def make_input(captions: list[int], seed: int) -> Input:
    """Returns images and as many captions of these lengths, the end token included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, END_ID - 1, (len(captions), LENGTH), generator=generator)
    lengths = torch.tensor(captions)[:, None]
    positions = torch.arange(LENGTH)
    ids = torch.where(positions < lengths - 1, ids, END_ID)
    pixels = torch.randn(len(captions), 3, VISION["image_size"], VISION["image_size"], generator=generator)
    return Input(pixels, ids, (positions < lengths).long())


EXAMPLE, OTHER = make_input([LENGTH, LENGTH], seed=1), make_input([3, LENGTH, 7], seed=2)


def trace(model: nn.Module, folder: str) -> Callable:
    """Returns the features' TorchScript trace."""
    return torch.jit.trace(Features(model), tuple(EXAMPLE), check_trace=False)


def export(model: nn.Module, folder: str) -> Callable:
    """Returns the features' `torch.export`, for any batch size."""
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in Input._fields}
    return torch.export.export(Features(model), tuple(EXAMPLE), dynamic_shapes=shapes).module()


def compile_whole(model: nn.Module, folder: str, backend: str = "inductor") -> Callable:
    """Returns the features' compilation, which must be one graph."""
    compiled = torch.compile(Features(model), fullgraph=True, backend=backend)
    compiled(*EXAMPLE)
    return compiled


def offload_to_cpu(model: nn.Module, folder: str) -> Callable:
    """Returns features whose weights accelerate brings to the device one module at a time."""
    import accelerate

    return Features(accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu")))


def offload_to_disk(model: nn.Module, folder: str) -> Callable:
    """Returns features whose weights accelerate reads from a folder one module at a time."""
    import accelerate

    return Features(accelerate.disk_offload(copy.deepcopy(model), folder, torch.device("cpu")))


def load_with_device_map(model: nn.Module, folder: str) -> Callable:
    """Returns features of a model that `from_pretrained` spreads over memory and disk."""
    model.save_pretrained(f"{folder}/model")
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = type(model).from_pretrained(
        f"{folder}/model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=f"{folder}/rest"
    )
    assert "disk" in loaded.hf_device_map.values()
    return Features(loaded.eval())


def quantize(model: nn.Module, folder: str) -> Callable:
    """Returns features of a model whose linear layers multiply int8."""
    return Features(torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8))


def adapt(model: nn.Module, folder: str) -> Callable:
    """Returns features of a model with fresh LoRA adapters of all linear layers, which change nothing yet."""
    import peft

    adapters = peft.LoraConfig(target_modules="all-linear")
    return Features(peft.get_peft_model(copy.deepcopy(model), adapters).eval())


WAYS = {
    "`torch.jit.trace`": trace,
    "`torch.export`, any batch size": export,
    "`torch.compile(fullgraph=True)`": compile_whole,
    "accelerate's `cpu_offload`": offload_to_cpu,
    "accelerate's `disk_offload`": offload_to_disk,
    '`device_map="auto"`, half of it on disk': load_with_device_map,
    "`quantize_dynamic` of `nn.Linear` to int8": quantize,
    'peft, fresh LoRA on `"all-linear"`': adapt,
}


def difference(model: nn.Module, way: Callable[[nn.Module, str], Callable]) -> float:
    """Returns the largest difference of features on another input than the one that the way was made with."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = way(model, folder)(*OTHER)
        expected = Features(model)(*OTHER)
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    models = make_models()
    with torch.no_grad():
        sizes = [max(f.abs().max().item() for f in Features(model)(*OTHER)) for model in models.values()]
    print(f"| | {' | '.join(models)} |", "|---|---|---|", sep="\n")
    print("| largest feature in eager mode |", " | ".join(f"{size:.1f}" for size in sizes), "|")
    for name, way in WAYS.items():
        print(f"| {name} |", " | ".join(_cell(model, way) for model in models.values()), "|", flush=True)


def _cell(model: nn.Module, way: Callable) -> str:
    try:
        return f"{number:.0e}" if (number := difference(model, way)) else "0"
    except Exception as error:  # of whatever library: the table tells
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:60]}"


if __name__ == "__main__":
    main()
