"""PyTorch's side of `benchmarks.run`: transformers' CLIPModel on the same weights, batches and device.

Each section is a function `(workload, group) -> {program: function that makes it}`. Images are normalised
floats already, captions are padded to the context length.
"""

import dataclasses
import functools
import gc
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

from benchmarks.timing import Program
from benchmarks.torch_moe import MaskedLoop
from benchmarks.workload import ATTENTION, Workload
from clipmoe_jax.interop import huggingface
from clipmoe_jax.interop.modeling_clip_moe import MLP, CLIPMoEVisionConfig, MoE, load_balance
from clipmoe_jax.models.clip import normalize
from clipmoe_jax.train.step import MAX_LOGIT_SCALE

NAME = "PyTorch"
TOWERS = {"image": "visual", "text": "text"}  # of a batch, of the params
TRAINS = {"mcl": ".mlp.", "router": ".mlp.router.", "everything": ""}  # what the names of those leaves have
Builders = dict[str, Callable[[], Program]]


def describe(platform: str) -> dict[str, str]:
    """With what this runs. Raises ValueError where PyTorch has no device like ours."""
    versions = {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers")}
    if platform not in ("cpu", "cuda", "gpu"):
        raise ValueError(f"PyTorch has no device of the kind {platform!r} here")
    if platform != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no GPU")
    torch.set_float32_matmul_precision("high")  # TensorFloat-32 on GPUs, as JAX's default has it
    return versions | {"torch threads": torch.get_num_threads()}


def where(workload: Workload) -> dict[str, Any]:
    """Device and type of everything here."""
    device = "cpu" if workload.platform == "cpu" else "cuda"
    return {"device": device, "dtype": getattr(torch, workload.dtype)}


def free_memory() -> None:
    """After programs are forgotten."""
    gc.collect()
    torch.cuda.empty_cache()


def _program(
    workload: Workload, call: Callable[[], Any], flops: float, pairs: int = 0, no_grad: bool = True
) -> Program:
    on_gpu = workload.platform != "cpu"
    wait = (lambda _: torch.cuda.synchronize()) if on_gpu else (lambda _: None)
    return Program(torch.inference_mode()(call) if no_grad else call, wait, flops, pairs)


def make_model(workload: Workload, kind: str) -> CLIPModel:
    """transformers' CLIPModel with our params, on CPU in float32; a mixture's layers are masked loops."""
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
        mixtures = {name: leaf for name, leaf in model.state_dict().items() if ".mlp." in name}
        weights |= mixtures
    model.load_state_dict(weights)
    return model


def make_inputs(workload: Workload, num_pairs: int) -> dict[str, torch.Tensor]:
    """image (B, 3, H, W) normalised, text (B, L) int64."""
    images = np.array(normalize(jax.numpy.asarray(workload.images(num_pairs))))
    place = where(workload)
    return {
        "image": torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(**place),
        "text": torch.tensor(workload.padded_tokens(num_pairs), dtype=torch.long, device=place["device"]),
    }


def peak(workload: Workload, group: str) -> Builders:
    """The product of two square matrices."""

    def build() -> Program:
        size = workload.matrix_size
        a, b = (torch.randn(size, size).to(**where(workload)) for _ in range(2))
        return _program(workload, lambda: a @ b, 2.0 * size**3)

    return {NAME: build}


def towers(workload: Workload, group: str) -> Builders:
    """The features of a batch of images or captions."""

    def build() -> Program:
        model = make_model(workload, "mcl").eval().to(**where(workload))
        inputs = make_inputs(workload, workload.batch)[group]
        flops = workload.forward_flops(TOWERS[group], workload.batch)
        return _program(workload, lambda: encode(model, group, inputs), flops, workload.batch)

    return {NAME: build}


def encode(model: CLIPModel, tower: str, inputs: torch.Tensor) -> torch.Tensor:
    """Features (B, embed) of images or captions."""
    if tower == "image":
        return model.get_image_features(inputs).pooler_output
    return model.get_text_features(inputs).pooler_output


def attend(workload: Workload, group: str) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """`scaled_dot_product_attention` on (B, L, H, W), as models call it, and its arguments."""
    _, causal, gradient = ATTENTION[group]
    arguments = [torch.tensor(a).to(**where(workload)) for a in workload.attention_inputs(group)]

    def forward(query, key, value):
        heads_first = (a.transpose(1, 2) for a in (query, key, value))
        return functional.scaled_dot_product_attention(*heads_first, is_causal=causal).transpose(1, 2)

    def forward_and_gradient(query, key, value, target):
        y = forward(query, key, value)
        return y, *torch.autograd.grad(y, (query, key, value), target)

    if not gradient:
        return forward, arguments[:3]
    return forward_and_gradient, [a.requires_grad_() for a in arguments[:3]] + arguments[3:]


def attention(workload: Workload, group: str) -> Builders:
    """The kernel that PyTorch chooses."""

    def build() -> Program:
        function, arguments = attend(workload, group)
        flops, gradient = workload.attention_flops(group), ATTENTION[group][2]
        return _program(workload, lambda: function(*arguments), flops, workload.batch, no_grad=not gradient)

    return {NAME: build}


def moe(workload: Workload, group: str) -> Builders:
    """A feed-forward layer, dense and as a mixture: the one that we export, and the released code's way."""
    sizes, gradient = workload.moe_sizes, group != "forward"

    def build(kind: str) -> Program:
        torch.manual_seed(0)
        config = CLIPMoEVisionConfig(
            hidden_size=sizes["width"],
            intermediate_size=sizes["hidden"],
            num_experts=sizes["experts"],
            num_experts_per_tok=sizes["selected"],
        )
        layer = MLP(config) if kind == "dense FFN" else MoE(config)
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, std=0.02)
            parameter.requires_grad_("router" in name)
        if kind == "masked loop":
            layer = MaskedLoop(layer)
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_("router" in name)
        layer = layer.to(**where(workload))
        x, target = (torch.randn(1, sizes["tokens"], sizes["width"]).to(**where(workload)) for _ in range(2))
        wanted = [x.requires_grad_(gradient), *(p for p in layer.parameters() if p.requires_grad)]

        def call():
            y = layer(x) if kind == "masked loop" else layer(x)[0]
            return (y, *torch.autograd.grad(y, wanted, target)) if gradient else y

        flops = workload.moe_flops(kind == "dense FFN", gradient)
        return _program(workload, call, flops, no_grad=not gradient)

    kinds = ("dense FFN", "exported", "masked loop")
    return {f"{NAME} {kind}": functools.partial(build, kind) for kind in kinds}


class Training:
    """One step after the other on the same batch: what train/step.py does, in PyTorch."""

    def __init__(self, workload: Workload, kind: str):
        phase, self._loss = workload.phase(kind)
        self.model = make_model(workload, kind).to(**where(workload)).train()
        self._batch, self._moe = make_inputs(workload, workload.batch), workload.model(kind).config.moe
        lengths = torch.tensor(workload.lengths(workload.batch))[:, None]
        self._mask = (torch.arange(workload.text) < lengths).to(self._batch["text"].device)
        groups = {True: [], False: []}
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
        """Takes a step; its loss."""
        self._optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return loss.detach()

    def loss(self) -> torch.Tensor:
        """The contrastive loss, and for a mixture the balance of its experts."""
        features = [encode(self.model, tower, self._batch[tower]).float() for tower in TOWERS]
        images, texts = (functional.normalize(each, dim=-1) for each in features)
        logits = self.model.logit_scale.float().exp() * images @ texts.t()
        own = torch.arange(len(logits), device=logits.device)
        smoothing = self._loss.label_smoothing
        loss = sum(
            functional.cross_entropy(rows, own, label_smoothing=smoothing) / 2
            for rows in (logits, logits.t())
        )
        if self._moe is None:
            return loss
        selected = self._moe.num_selected_experts
        image = load_balance(self._router_logits(self.model.vision_model), selected)
        text = load_balance(self._router_logits(self.model.text_model), selected, self._mask)
        return loss + self._loss.balance_coefficient * (image + text) / 2

    @staticmethod
    def _router_logits(tower: torch.nn.Module) -> list[torch.Tensor]:
        return [layer.mlp.router_logits.float() for layer in tower.encoder.layers]


def steps(workload: Workload, group: str) -> Builders:
    """A whole step of training."""

    def build() -> Program:
        flops = workload.step_flops(group)
        return _program(workload, Training(workload, group), flops, workload.batch, no_grad=False)

    return {NAME: build}


def embed(workload: Workload, group: str) -> Builders:
    """Unit features of images and captions. group: the batch size."""
    size = int(group)

    def build() -> Program:
        model = make_model(workload, "mcl").eval().to(**where(workload))
        inputs = make_inputs(workload, size)

        def call() -> list[torch.Tensor]:
            features = (encode(model, tower, inputs[tower]).float() for tower in TOWERS)
            return [functional.normalize(each, dim=-1) for each in features]

        return _program(workload, call, workload.pair_flops(size), size)

    return {NAME: build}


SECTIONS = {
    "peak": peak,
    "towers": towers,
    "attention": attention,
    "moe": moe,
    "steps": steps,
    "settings": lambda workload, group: {},
    "embed": embed,
}
