"""CLIP-MoE for PyTorch and transformers: two CLIP towers whose layers are mixtures of experts.

Method: arXiv 2409.19291. `clipmoe_jax` writes this file beside the weights that it loads; it needs only torch
and transformers. Licence: Apache-2.0.

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)      # a CLIPMoEModel
    tower = CLIPMoEVisionModel.from_pretrained(folder)                     # its vision tower alone

Letters: B batch, L length, D width, H heads, M MoE blocks, E experts, K selected experts, N tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput, can_return_tuple

LEGACY_EOS_ID = 2  # means in old configs that the end token is the highest id of a row

# {name: (f, s)}: an activation is f(s x) / s, so that the products around it can absorb the scaling.
ACTIVATIONS = {"quick_gelu": (functional.silu, 1.702), "gelu": (functional.gelu, 1.0)}

# What an expert is: a block's feed-forward layer, or its attention too.
EXPERT_LAYERS = ("feed_forward", "attention_and_feed_forward")

# What a forward returns beside features: its arguments, and the config's fields that they override.
OPTIONS = ("output_hidden_states", "output_attentions", "output_router_logits")


class _TowerConfig(PretrainedConfig):
    """The fields of both towers. num_moe_layers: the last n blocks are MoE; None means all.

    router_sequence_share: how often the mean over an image's tokens, or over a caption's own, is added to
    what a router sees, the token, both with their centred absolute values; 0 routes by the token alone.
    expert_layers: one of EXPERT_LAYERS.
    """

    def __init__(
        self,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        projection_dim=512,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        initializer_range=0.02,
        num_experts=4,
        num_experts_per_tok=2,
        num_moe_layers=None,
        router_sequence_share=0.0,
        expert_layers="feed_forward",
        output_router_logits=False,
        **kwargs,
    ):
        if expert_layers not in EXPERT_LAYERS:
            raise ValueError(f"expert_layers={expert_layers!r}: choose one of {', '.join(EXPERT_LAYERS)}")
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={hidden_act!r}: choose one of {sorted(ACTIVATIONS)}")
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ValueError(
                f"num_experts_per_tok={num_experts_per_tok} must lie between 1 and num_experts={num_experts}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.projection_dim = projection_dim
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.num_moe_layers = num_moe_layers
        self.router_sequence_share = router_sequence_share
        self.expert_layers = expert_layers
        self.output_router_logits = output_router_logits
        super().__init__(**kwargs)

    def is_moe(self, layer):
        """Returns whether block `layer`, counted from 0, is a mixture of experts."""
        return self.num_moe_layers is None or layer >= self.num_hidden_layers - self.num_moe_layers


class CLIPMoETextConfig(_TowerConfig):
    """The text tower. A caption's feature is that of the first `eos_token_id` in its row."""

    model_type = "clip_moe_text_model"
    base_config_key = "text_config"

    def __init__(
        self,
        vocab_size=49408,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**special, **kwargs)


class CLIPMoEVisionConfig(_TowerConfig):
    """The vision tower."""

    model_type = "clip_moe_vision_model"
    base_config_key = "vision_config"

    def __init__(self, image_size=224, patch_size=32, num_channels=3, **kwargs):
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        super().__init__(**kwargs)


class CLIPMoEConfig(PretrainedConfig):
    """Both towers, their joint embedding space, and the weight of the load-balancing loss."""

    model_type = "clip_moe"
    # transformers declares it as a property of the class and lets models assign a dict.
    sub_configs = {"text_config": CLIPMoETextConfig, "vision_config": CLIPMoEVisionConfig}  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        projection_dim=512,
        logit_scale_init_value=2.6592,
        router_aux_loss_coef=0.01,
        output_router_logits=False,
        **kwargs,
    ):
        for name, value in (("text_config", text_config), ("vision_config", vision_config)):
            if not isinstance(value, PretrainedConfig):
                value = self.sub_configs[name](**(value or {}))
            setattr(self, name, value)
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        super().__init__(**kwargs)


@dataclass
class CLIPMoETowerOutput(ModelOutput):
    """The outputs of a tower.

    last_hidden_state (B, L, D); pooler_output (B, D), or (B, projection) from `get_image_features` and
    `get_text_features`; hidden_states: after the embeddings and after each block, (B, L, D), None where
    indices were asked for and not this one; attentions: of each block, (B, H, L, L); router_logits: of each
    MoE block, (B, L, E) float32.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class CLIPMoEOutput(ModelOutput):
    """The outputs of both towers: CLIP's, and `aux_loss` (), the load-balancing loss, which is 1 at best."""

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: CLIPMoETowerOutput | None = None
    vision_model_output: CLIPMoETowerOutput | None = None
    aux_loss: torch.Tensor | None = None

    def to_tuple(self):
        """Returns the outputs that there are, those of the towers as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class Routing(NamedTuple):
    """The experts that a router chose for N = B * L tokens.

    logits (B, L, E) float32; gates (N, K) float32, its K largest probabilities, divided by their sum;
    expert_ids (N, K) int64.
    """

    logits: torch.Tensor
    gates: torch.Tensor
    expert_ids: torch.Tensor


class MLP(nn.Module):
    """Linear, activation, linear: the feed-forward layer of a dense block."""

    def __init__(self, config):
        super().__init__()
        self.activation, self.scale = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(self.activation(self.scale * self.fc1(x)) / self.scale)


class StackedLinear(nn.Module):
    """E linear layers: weight (E, out, in), bias (E, out)."""

    def __init__(self, num_layers, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_layers, out_features))

    def forward(self, groups, weight_scale=1.0, bias_scale=1.0):
        """Applies layer e to groups[e]: E tensors (N_e, in) -> list of E tensors (N_e, out)."""
        # Unbound rather than indexed, so that the gradient is stacked once, not summed from E tensors of
        # zeros.
        layers = zip(groups, self.weight.unbind(), self.bias.unbind(), strict=True)
        return [
            torch.addmm(bias, rows, weight.t(), beta=bias_scale, alpha=weight_scale)
            for rows, weight, bias in layers
        ]


class SeparateLinear(nn.ModuleList):
    """The layers of a StackedLinear, each an `nn.Linear`, which quantisation knows."""

    def __init__(self, stacked):
        super().__init__()
        for weight, bias in zip(stacked.weight.detach(), stacked.bias.detach(), strict=True):
            layer = nn.Linear(*reversed(weight.shape), device="meta")
            layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
            self.append(layer)

    def forward(self, groups, weight_scale=1.0, bias_scale=1.0):
        """As StackedLinear's."""
        layers = zip(groups, self, strict=True)
        return [bias_scale * layer(weight_scale / bias_scale * rows) for rows, layer in layers]


class Router(nn.Linear):
    """Logits of the experts, in float32 whatever the dtype of the model."""

    def forward(self, input):
        """(..., D) -> (..., E) float32."""
        return functional.linear(input.float(), self.weight.float())


class MoE(nn.Module):
    """A router and E feed-forward layers, K of which run for each token. No token is dropped."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, self.num_selected = config.num_experts, config.num_experts_per_tok
        self.sequence_share = config.router_sequence_share
        self.activation, self.scale = ACTIVATIONS[config.hidden_act]
        router_width = 2 * config.hidden_size if self.sequence_share else config.hidden_size
        self.router = Router(router_width, self.num_experts, bias=False)
        self.fc1 = StackedLinear(self.num_experts, config.hidden_size, config.intermediate_size)
        self.fc2 = StackedLinear(self.num_experts, config.intermediate_size, config.hidden_size)

    def route(self, x, real=None):
        """Chooses experts: x (B, L, D) -> Routing. real (B, L) bool: False for padding; None for none."""
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in float32
            logits = self.router(_magnitudes(x.float()) if self.sequence_share else x).float()
            if self.sequence_share:
                logits = logits + self.sequence_share * _sequence_mean(logits, real)
            gates, expert_ids = logits.flatten(0, 1).softmax(dim=-1).topk(self.num_selected, dim=-1)
            return Routing(logits, gates / gates.sum(dim=-1, keepdim=True), expert_ids)

    def forward(self, x, routing):
        """(B, L, D) -> (B, L, D)."""
        return _mixture(self._run, self.num_experts, x, routing)

    def _run(self, groups):
        """Applies expert e to groups[e]: E tensors (N_e, D) -> list of E tensors (N_e, D)."""
        hidden = self.fc1(groups, self.scale, self.scale)
        return self.fc2([self.activation(h) for h in hidden], 1 / self.scale)


def unstack(model):
    """Makes every expert of a model layers of its own, in place; returns the model, which computes the same.

    Its weights then have other names than those in a file.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, StackedLinear):
                setattr(module, name, SeparateLinear(child))
    return model


def _mixture(run, num_experts, x, routing):
    """Returns the sum of what a token's experts make of it, by gate: x (B, L, D) -> (B, L, out).

    run: E tensors (N_e, D) -> list of E tensors (N_e, out).
    """
    tokens = x.flatten(0, 1)
    run_experts = _run_all if _shapes_are_static(tokens) else _run_selected
    y = run_experts(run, num_experts, tokens, routing.expert_ids)
    return torch.bmm(routing.gates.to(x.dtype).unsqueeze(1), y).squeeze(1).unflatten(0, x.shape[:2])


def _run_selected(run, num_experts, x, expert_ids):
    """Runs each token's K experts: x (N, D), expert_ids (N, K) int64 -> (N, K, out).

    Slots are sorted by expert, so that each expert's rows are contiguous and need one product.
    """
    slots = expert_ids.flatten()
    order = slots.argsort()
    counts = torch.bincount(slots, minlength=num_experts).tolist()
    y = torch.cat(run(x.index_select(0, order // expert_ids.shape[1]).split(counts)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return y.index_select(0, place).view(*expert_ids.shape, -1)


def _run_all(run, num_experts, x, expert_ids):
    """Runs every expert for every token and picks each token's K. No shape depends on a value."""
    y = torch.stack(run([x] * num_experts))  # (E, N, out)
    return y[expert_ids, torch.arange(x.shape[0], device=x.device).unsqueeze(1)]


class Attention(nn.Module):
    """Multi-head self-attention; is_moe: with E of each projection, K of which run for each token."""

    def __init__(self, config, is_moe=False):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads

        def projection():
            if is_moe:
                return StackedLinear(config.num_experts, config.hidden_size, config.hidden_size)
            return nn.Linear(config.hidden_size, config.hidden_size)

        self.q_proj, self.k_proj, self.v_proj = projection(), projection(), projection()
        self.out_proj = projection()

    def forward(self, x, mask, is_causal, with_probabilities, routing=None):
        """x (B, L, D), mask broadcast to (B, H, L, L) bool or None -> (B, L, D), probabilities or None.

        routing: of the tokens, if the projections are experts.
        """

        def project(layer, x):
            return layer(x) if routing is None else _mixture(layer, self.config.num_experts, x, routing)

        q, k, v = (
            project(layer, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        probabilities = None
        if with_probabilities or self.config._attn_implementation == "eager":
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if mask is None and is_causal:
                mask = _causal_mask(x)
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
            y = probabilities @ v
        else:
            y = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal and mask is None
            )
        return project(self.out_proj, y.transpose(1, 2).flatten(2)), probabilities


class Block(GradientCheckpointingLayer):
    """One residual block, LayerNorms first."""

    def __init__(self, config, layer):
        super().__init__()
        is_moe = config.is_moe(layer)
        self.routes_attention = is_moe and config.expert_layers == EXPERT_LAYERS[1]
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, self.routes_attention)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MoE(config) if is_moe else MLP(config)

    def forward(self, x, mask, is_causal, with_probabilities, real=None):
        """x (B, L, D) -> x, attention probabilities or None, router logits or None."""
        h, routing = self.layer_norm1(x), None
        if self.routes_attention and isinstance(self.mlp, MoE):
            routing = self.mlp.route(h, real)
        y, probabilities = self.self_attn(h, mask, is_causal, with_probabilities, routing)
        x = x + y
        h = self.layer_norm2(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(h), probabilities, None
        routing = routing or self.mlp.route(h, real)
        return x + self.mlp(h, routing), probabilities, routing.logits


class Encoder(nn.Module):
    """The blocks of a tower."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Block(config, i) for i in range(config.num_hidden_layers)])

    def forward(self, x, mask, is_causal, real=None, **options):
        """x (B, L, D) -> x and the fields of a CLIPMoETowerOutput that the options ask for.

        real (B, L) bool: False for padding, which routers do not see; None is all tokens.
        """
        options = _with_defaults(options, self.config)
        with_attentions = bool(options["output_attentions"])
        wanted = _indices(options["output_hidden_states"], len(self.layers) + 1)
        hidden_states, attentions, router_logits = [x if 0 in wanted else None], [], []
        for layer in self.layers:
            x, probabilities, logits = layer(x, mask, is_causal, with_attentions, real)
            hidden_states.append(x if len(hidden_states) in wanted else None)
            attentions.append(probabilities)
            if logits is not None:
                router_logits.append(logits)
        return x, {
            "hidden_states": tuple(hidden_states) if wanted else None,
            "attentions": tuple(attentions) if with_attentions else None,
            "router_logits": tuple(router_logits) if options["output_router_logits"] else None,
        }


class VisionEmbeddings(nn.Module):
    """Class token and patches, with their positions."""

    def __init__(self, config):
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=self.patch_size, stride=self.patch_size, bias=False
        )
        self.position_embedding = nn.Embedding((self.image_size // self.patch_size) ** 2 + 1, width)

    def forward(self, pixel_values, interpolate_pos_encoding):
        """(B, 3, height, width) -> (B, L, D)."""
        size = tuple(pixel_values.shape[-2:])
        if size != (self.image_size, self.image_size) and not interpolate_pos_encoding:
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels; this model takes {self.image_size} x "
                f"{self.image_size}, or others with interpolate_pos_encoding=True"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = patches.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(tokens.shape[0], 1, -1)
        side = self.image_size // self.patch_size
        positions = self.position_embedding(torch.arange(side**2 + 1, device=tokens.device))
        if interpolate_pos_encoding:
            positions = _resized(positions, side, patches.shape[-2:])
        return torch.cat([class_token, tokens], dim=1) + positions


class TextEmbeddings(nn.Module):
    """Tokens with their positions."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids, position_ids):
        """(B, L) int64 -> (B, L, D)."""
        length, most = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > most:
            raise ValueError(f"input_ids have length {length}; this model takes at most {most} tokens")
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class CLIPMoEPreTrainedModel(PreTrainedModel):
    """The three models' common part: initialisation, and what transformers may do with them."""

    config_class = CLIPMoEConfig
    base_model_prefix = "clip_moe"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block", "VisionEmbeddings", "TextEmbeddings"]

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # Attention reads it from the config in each call

    def _init_weights(self, module):
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, StackedLinear)):
            nn.init.normal_(module.weight, std=std)
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, VisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=std)
        elif isinstance(module, CLIPMoEModel):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)


class CLIPMoEVisionModel(CLIPMoEPreTrainedModel):
    """The vision tower, with CLIPVisionModel's interface."""

    config_class = CLIPMoEVisionConfig
    base_model_prefix = "vision_model"  # so that a whole model's file loads here
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"_projection\.", r"^logit_scale$"]

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )  # CLIPModel's spelling
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.patch_embedding

    def set_input_embeddings(self, value):
        self.embeddings.register_module("patch_embedding", value)

    @can_return_tuple
    def forward(
        self,
        pixel_values=None,
        interpolate_pos_encoding=False,
        output_hidden_states=None,
        output_attentions=None,
        output_router_logits=None,
        **kwargs,
    ) -> CLIPMoETowerOutput:
        """pixel_values (B, 3, height, width), as the processor gives them.

        output_hidden_states: True for all, or the index of the one or the indices of those to return. None
        takes the config's value, as in the other options.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is None: give images (B, 3, height, width)")
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        x, further = self.encoder(
            x,
            mask=None,
            is_causal=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )
        pooled = self.post_layernorm(x[:, 0])
        return CLIPMoETowerOutput(last_hidden_state=x, pooler_output=pooled, **further)


class CLIPMoETextModel(CLIPMoEPreTrainedModel):
    """The text tower, with CLIPTextModel's interface."""

    config_class = CLIPMoETextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"_projection\.", r"^logit_scale$"]

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value):
        self.embeddings.register_module("token_embedding", value)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        output_hidden_states=None,
        output_attentions=None,
        output_router_logits=None,
        **kwargs,
    ) -> CLIPMoETowerOutput:
        """input_ids, attention_mask (1 for tokens), position_ids (B, L); options as in the vision tower."""
        if input_ids is None:
            raise ValueError("input_ids is None: give token ids (B, L)")
        x = self.embeddings(input_ids, position_ids)
        mask = None
        if attention_mask is not None and (_shapes_are_static(x) or not attention_mask.all()):
            mask = _causal_mask(x) & attention_mask.bool()[:, None, None, :]
            mask = mask | ~mask.any(dim=-1, keepdim=True)  # no row is all False
        x, further = self.encoder(
            x,
            mask,
            is_causal=True,
            real=self.caption_mask(input_ids) if self.config.router_sequence_share else None,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )
        x = self.final_layer_norm(x)
        pooled = x[torch.arange(x.shape[0], device=x.device), self.end_position(input_ids)]
        return CLIPMoETowerOutput(last_hidden_state=x, pooler_output=pooled, **further)

    def end_position(self, input_ids):
        """Returns the position of the first end token in each row. (B, L) -> (B,) int64."""
        if self.config.eos_token_id == LEGACY_EOS_ID:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)

    def caption_mask(self, input_ids):
        """Returns which tokens are a caption's, the end token included. (B, L) -> (B, L) bool."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return positions <= self.end_position(input_ids)[:, None]


class CLIPMoEModel(CLIPMoEPreTrainedModel):
    """Both towers and their projections into one embedding space, with CLIPModel's interface."""

    def __init__(self, config):
        super().__init__(config)
        self.text_model = CLIPMoETextModel._from_config(config.text_config)
        self.vision_model = CLIPMoEVisionModel._from_config(config.vision_config)
        projection_dim = config.projection_dim
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self):
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values, interpolate_pos_encoding=False, **options):
        """Returns the vision tower's outputs; pooler_output is (B, projection) features, not normalised."""
        options = self._for_tower(options)
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding, **options, return_dict=True)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(self, input_ids, attention_mask=None, position_ids=None, **options):
        """Returns the text tower's outputs; pooler_output is (B, projection) features, not normalised."""
        options = self._for_tower(options)
        outputs = self.text_model(input_ids, attention_mask, position_ids, **options, return_dict=True)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def _for_tower(self, options):
        """Returns the options that are given or on in this config; the tower's config decides the others."""
        here = {name: value for name in OPTIONS if (value := getattr(self.config, name))}
        return here | {name: value for name, value in options.items() if value is not None}

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        return_loss=None,
        interpolate_pos_encoding=False,
        output_hidden_states=None,
        output_attentions=None,
        output_router_logits=None,
        **kwargs,
    ) -> CLIPMoEOutput:
        """Captions (T, L) and images (B, 3, height, width).

        return_loss: computes the symmetric cross-entropy of B = T pairs in order; with output_router_logits
        (None takes the config's), router_aux_loss_coef times aux_loss, the mean of both towers', is added.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits or None
        options = {
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "output_router_logits": output_router_logits,
            "return_dict": True,
        }
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding, **options)
        text = self.get_text_features(input_ids, attention_mask, position_ids, **options)
        image_embeds = functional.normalize(vision.pooler_output, dim=-1)
        text_embeds = functional.normalize(text.pooler_output, dim=-1)
        device = text_embeds.device  # the towers may lie on two devices
        logits_per_text = self.logit_scale.exp().to(device) * text_embeds @ image_embeds.to(device).t()

        loss = aux_loss = None
        if output_router_logits:
            of_vision = load_balance(vision.router_logits, self.config.vision_config.num_experts_per_tok)
            of_text = load_balance(
                text.router_logits,
                self.config.text_config.num_experts_per_tok,
                self.text_model.caption_mask(input_ids),
            )
            aux_loss = (of_text.to(device) + of_vision.to(device)) / 2
        if return_loss:
            target = torch.arange(logits_per_text.shape[0], device=device)
            rows, columns = logits_per_text.float(), logits_per_text.float().t()
            loss = functional.cross_entropy(rows, target) / 2 + functional.cross_entropy(columns, target) / 2
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss
        return CLIPMoEOutput(
            loss=loss,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
            aux_loss=aux_loss,
        )


def load_balance(router_logits, num_selected, mask=None):
    """Returns E * sum_e f_e P_e, averaged over blocks: 1 at perfect balance (arXiv 2409.19291, eq. 6-9).

    f_e is the share of routed slots that went to expert e, P_e its mean probability. router_logits: of each
    MoE block, (B, L, E) float32. mask (B, L) bool: tokens that count; None counts all.
    """
    device = router_logits[-1].device  # blocks may lie on several
    logits = torch.stack([block.flatten(0, 1).to(device) for block in router_logits])  # (M, N, E)
    weights = torch.ones_like(logits[0, :, 0]) if mask is None else mask.flatten().to(logits)
    weights = weights / weights.sum()
    probabilities = logits.softmax(dim=-1)
    slots = functional.one_hot(probabilities.topk(num_selected, dim=-1).indices, logits.shape[-1])
    fraction = weights @ slots.sum(dim=2).float() / num_selected  # (M, E)
    return logits.shape[-1] * (fraction * (weights @ probabilities)).sum(dim=-1).mean()


def _magnitudes(x):
    """Returns x beside its centred absolute values: (..., D) -> (..., 2 D)."""
    absolute = x.abs()
    return torch.cat([x, absolute - absolute.mean(dim=-1, keepdim=True)], dim=-1)


def _sequence_mean(logits, real):
    """Returns the mean over each token's sequence: (B, L, E) -> (B, L, E). real (B, L) bool or None, all.

    Padding, which no caption sees, has its own mean.
    """
    if real is None:
        return logits.mean(dim=1, keepdim=True)
    same = (real[:, :, None] == real[:, None, :]).to(logits)
    return same @ logits / same.sum(dim=-1, keepdim=True)


def _shapes_are_static(x):
    """Returns whether no shape may depend on a value: x is traced, exported or compiled."""
    return (
        torch.compiler.is_compiling()
        or is_tracing()
        or type(x) is not torch.Tensor  # a tensor without values, or one that records what is done with it
    )


def _with_defaults(options, config):
    """Returns {name: value} of OPTIONS, the config's for those that are None."""
    return {name: getattr(config, name) if options[name] is None else options[name] for name in OPTIONS}


def _indices(asked, count):
    """Returns which of `count` hidden states are asked for: all (True), none, one index or several."""
    if asked is None or isinstance(asked, bool):
        return range(count) if asked else ()
    return {range(count)[i] for i in ([asked] if isinstance(asked, int) else asked)}


def _resized(positions, side, size):
    """Resizes a grid of positions as CLIPVisionModel does: (1 + side², D) -> (1 + height * width, D)."""
    if tuple(size) == (side, side) and not is_tracing():  # a trace must hold for other sizes too
        return positions
    grid = positions[1:].unflatten(0, (side, side)).permute(2, 0, 1).unsqueeze(0)
    grid = functional.interpolate(grid, tuple(size), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid[0].flatten(1).t()])


def _causal_mask(x):
    """Returns (L, L) bool, True where a token (row) attends to another (column). x (B, L, D)."""
    length = x.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=x.device).tril()


def register():
    """Registers the three models with transformers' Auto classes, so that other configs can name them."""
    for config, model in (
        (CLIPMoEConfig, CLIPMoEModel),
        (CLIPMoETextConfig, CLIPMoETextModel),
        (CLIPMoEVisionConfig, CLIPMoEVisionModel),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(CLIPMoEConfig, CLIPMoEModel, exist_ok=True)
