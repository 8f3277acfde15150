"""Patch features by PyTorch's models, for comparison."""

import copy

import torch


def patch_features(model: torch.nn.Module, pixels: torch.Tensor, value_attention: bool) -> torch.Tensor:
    """Returns (B, patches, embed) of a CLIPModel, or of an exported CLIP-MoE, which has its layers' names.

    Every patch's token goes through what CLIP has for the class token. value_attention: the last block's
    layers of queries and keys become that of values.
    """
    model = copy.deepcopy(model)
    if value_attention:
        attention = model.vision_model.encoder.layers[-1].self_attn
        attention.q_proj = attention.k_proj = attention.v_proj
    with torch.no_grad():
        tokens = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        return model.visual_projection(model.vision_model.post_layernorm(tokens))
