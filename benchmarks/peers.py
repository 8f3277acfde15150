"""PyTorch's side of `benchmarks.steps`: transformers' CLIPModel on the same weights, batch and device.

Images are normalised floats already, captions are padded to the context length.
"""

import dataclasses
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from benchmarks.timing import Program
from benchmarks.torch_moe import MaskedLoop
from benchmarks.workload import Workload
from clipmoe_jax.interop import huggingface
from clipmoe_jax.interop.modeling_clip_moe import CLIPMoEVisionConfig, MoE, load_balance
from clipmoe_jax.models.clip import normalize
from clipmoe_jax.train.step import MAX_LOGIT_SCALE

TRAINS = {"mcl": ".mlp.", "router": ".mlp.router.", "everything": ""}  # part of the names of those leaves


def make_program(kind: str, sizes: dict[str, Any]) -> tuple[Program, dict[str, Any]]:
    """Returns the program of a kind of step, or of "product", and {"sizes", "device"}.

    Raises ValueError where PyTorch has no device like ours.
    """
    workload = Workload(**sizes)
    if workload.platform == "tpu":
        raise ValueError(f"PyTorch has no device of the kind {workload.platform!r} here")
    on_cpu = workload.platform == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no GPU")
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on GPUs, as JAX's default has it
    versions = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    told = {"sizes": sizes, "device": versions | {"torch threads": torch.get_num_threads()}}

    def wait(result: Any) -> None:
        if not on_cpu:
            torch.cuda.synchronize()

    if kind == "product":
        size = workload.matrix_size
        a, b = (torch.randn(size, size).to(**placement(workload)) for _ in range(2))
        return Program(lambda: a @ b, wait, 2.0 * size**3), told
    return Program(Training(workload, kind), wait, workload.step_flops(kind), workload.batch), told


def placement(workload: Workload) -> dict[str, Any]:
    """Returns device and type of everything here."""
    device = "cpu" if workload.platform == "cpu" else "cuda"
    return {"device": device, "dtype": getattr(torch, workload.dtype)}


def make_model(workload: Workload, kind: str) -> CLIPModel:
    """Returns a CLIPModel with our params, on CPU in float32; a mixture's layers are masked loops."""
    config = workload.model(kind).config
    params = jax.tree.map(np.asarray, workload.params(kind))
    weights = {name: torch.tensor(array) for name, array in huggingface.export_state_dict(params).items()}
    dense = huggingface.export_config(dataclasses.replace(config, moe=None), "float32")
    model = CLIPModel(CLIPConfig.from_dict(dense))
    if config.moe:
        fields = huggingface.export_config(config, "float32")
        for tower in ("vision", "text"):
            for i, layer in enumerate(getattr(model, f"{tower}_model").encoder.layers):
                prefix = f"{tower}_model.encoder.layers.{i}.mlp."
                names = [name for name in weights if name.startswith(prefix)]
                moe = MoE(CLIPMoEVisionConfig(**fields[f"{tower}_config"]))
                moe.load_state_dict({name.removeprefix(prefix): weights.pop(name) for name in names})
                layer.mlp = MaskedLoop(moe, workload.expert_dropout_rate)
        weights |= {name: leaf for name, leaf in model.state_dict().items() if ".mlp." in name}
    model.load_state_dict(weights)
    return model


class Training:
    """One step after the other on the same batch: the work of train/step.py, in PyTorch."""

    def __init__(self, workload: Workload, kind: str):
        phase, self._loss = workload.phase(kind)
        device = placement(workload)["device"]
        self.model = make_model(workload, kind).to(**placement(workload)).train()
        self._moe = workload.model(kind).config.moe
        images = torch.tensor(np.array(normalize(jnp.asarray(workload.images()))))
        self._images = images.permute(0, 3, 1, 2).contiguous().to(**placement(workload))
        self._texts = torch.tensor(workload.padded_tokens(), dtype=torch.long, device=device)
        lengths = torch.tensor(workload.lengths())[:, None]
        self._mask = (torch.arange(workload.text) < lengths).to(device)
        groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, leaf in self.model.named_parameters():
            leaf.requires_grad_(TRAINS[kind] in name)
            if leaf.requires_grad:
                groups[leaf.ndim >= 2 and "position_embedding" not in name].append(leaf)
        self._optimizer = torch.optim.AdamW(
            [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
            lr=phase.learning_rate,
            betas=(phase.b1, phase.b2),
            eps=phase.eps,
            weight_decay=phase.weight_decay,
            fused=True,
        )

    def __call__(self) -> torch.Tensor:
        """Takes a step and returns its loss."""
        self._optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return loss.detach()

    def loss(self) -> torch.Tensor:
        """Returns the contrastive loss, and for a mixture the balance of its experts."""
        outputs = self.model.get_image_features(self._images), self.model.get_text_features(self._texts)
        images, texts = (functional.normalize(each.pooler_output.float(), dim=-1) for each in outputs)
        logits = self.model.logit_scale.float().exp() * images @ texts.t()
        own, smoothing = torch.arange(len(logits), device=logits.device), self._loss.label_smoothing
        loss = sum(
            functional.cross_entropy(rows, own, label_smoothing=smoothing) / 2
            for rows in (logits, logits.t())
        )
        if self._moe is None:
            return loss
        selected = self._moe.num_selected_experts
        image = load_balance(_router_logits(self.model.vision_model), selected)
        text = load_balance(_router_logits(self.model.text_model), selected, self._mask)
        return loss + self._loss.balance_coefficient * (image + text) / 2


def _router_logits(tower: torch.nn.Module) -> list[torch.Tensor]:
    return [layer.mlp.router_logits.float() for layer in tower.encoder.layers]
