"""FLOPs of a model's matrix products, counted by hand from its architecture.

A product of (m, k) by (k, n) is 2 m k n FLOPs. Norms, activations and softmax do not count: at the sizes of
CLIP they are one per cent of XLA's own count (tests/models/test_flops.py). The last feed-forward layer of a
tower is computed for the one token of an image or caption that is pooled.

Towers go by their key in the parameters, "visual" and "text".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.models.clip import ClipConfig, VisionConfig
from clipmoe_jax.models.expert_params import EXPERT_LEAF
from clipmoe_jax.models.transformer import MoeConfig, first_moe_layer


class Layer(NamedTuple):
    """One layer of the forward pass of one image or caption. name: of its parameters, "" if it has none.

    flops: of its products. num_operands: how many operands of each product are activations, whose gradients
    cost as much as the product itself.
    """

    name: str
    flops: float
    num_operands: int = 1


def layers(config: ClipConfig, tower: str, length: int | None = None, slots: float = 0) -> Iterator[Layer]:
    """Yields the layers of a tower in order.

    length: of the captions, None is the context length. slots: how many experts compute on each token; 0 is
    num_selected_experts, as dispatch="ragged" has it.
    """
    shape = config.vision if tower == "visual" else config.text
    assert shape is not None, "the architecture has no text tower"
    width, hidden = shape.width, shape.mlp_width or 4 * shape.width
    if isinstance(shape, VisionConfig):
        num_patches, pixels = shape.grid**2, 3 * shape.patch_size**2
        length = num_patches + 1
        yield Layer("visual/conv1", 2 * num_patches * pixels * width, 0)
        for name in ("class_embedding", "positional_embedding", "ln_pre"):
            yield Layer(f"visual/{name}", 0)
    else:
        length = length or shape.context_length
        yield Layer("text/token_embedding", 0)
        yield Layer("text/positional_embedding", 0)
    moe, first_moe = config.moe, first_moe_layer(shape.num_layers, config.moe)
    for i in range(shape.num_layers):
        block = f"{tower}/resblocks_{i}"
        of_block = moe if i >= first_moe else None
        num_visited = (slots or of_block.num_selected_experts) if of_block else 1
        has_attention = of_block is not None and of_block.has_attention
        attn, mlp = "moe" if has_attention else "attn", "moe" if of_block else "mlp"
        times = num_visited if has_attention else 1
        yield Layer(f"{block}/ln_1", 0)
        # The router comes before the first layer whose input its gates multiply (models/feed_forward.py).
        if of_block and has_attention:
            yield from _routing(block, tower, length, width, of_block)
        yield Layer(f"{block}/{attn}/in_proj", 2 * times * length * width * 3 * width)
        yield Layer("", 2 * 2 * length * length * width, 2)  # scores, and their product with the values
        yield Layer(f"{block}/{attn}/out_proj", 2 * times * length * width * width)
        yield Layer(f"{block}/ln_2", 0)
        tokens = num_visited * (length if i < shape.num_layers - 1 else 1)
        yield Layer(f"{block}/{mlp}/c_fc", 2 * tokens * width * hidden)
        if of_block and not has_attention:
            yield from _routing(block, tower, length, width, of_block)
        yield Layer(f"{block}/{mlp}/c_proj", 2 * tokens * hidden * width)
    last = ("ln_post", "proj") if tower == "visual" else ("ln_final", "text_projection")
    yield Layer(f"{tower}/{last[0]}", 0)
    yield Layer(f"{tower}/{last[1]}", 2 * width * config.embed_dim)


def _routing(block: str, tower: str, length: int, width: int, moe: MoeConfig) -> Iterator[Layer]:
    """Yields the layers of a block's router."""
    yield Layer(f"{block}/moe/router", 2 * length * moe.router_width(width) * moe.num_experts)
    if moe.sequence_share and tower == "text":  # of router logits
        yield Layer(f"{block}/moe/sequence_mean", 2 * length * length * moe.num_experts)


def forward(config: ClipConfig, length: int | None = None, slots: float = 0) -> float:
    """Returns the FLOPs of encoding one pair, an image and a caption of `length` tokens."""
    return sum(layer.flops for tower in _towers(config) for layer in layers(config, tower, length, slots))


def scores(config: ClipConfig) -> float:
    """Returns the FLOPs of attention's scores for one pair, half of those of attention's products."""
    return sum(layer.flops / 2 for t in _towers(config) for layer in layers(config, t) if not layer.name)


def forward_backward(
    config: ClipConfig,
    trains: Mapping[str, bool],
    length: int | None = None,
    slots: float = 0,
    towers: Sequence[str] | None = None,
) -> float:
    """Returns the FLOPs of encoding one pair and of the gradient for the leaves that train.

    trains: {leaf name: whether}. towers: None is all of the model. The gradient for a kernel costs as much as
    the product; so does that for the input, which is needed only if something before the layer trains.
    """
    trained = trained_layers(trains)
    return sum(
        layer.flops * (1 + layer.num_operands * reached + (layer.name in trained))
        for tower in towers or _towers(config)
        for layer, reached in _reached(config, tower, trained, length, slots)
    )


def input_gradients(config: ClipConfig, trains: Mapping[str, bool]) -> set[str]:
    """Returns the names of the layers that have a gradient for their input: something before them trains."""
    trained = trained_layers(trains)
    pairs = (pair for tower in _towers(config) for pair in _reached(config, tower, trained))
    return {layer.name for layer, reached in pairs if reached}


def _reached(
    config: ClipConfig, tower: str, trained: set[str], length: int | None = None, slots: float = 0
) -> Iterator[tuple[Layer, bool]]:
    """Yields the layers of a tower, each with whether something before it trains."""
    reached = False
    for layer in layers(config, tower, length, slots):
        yield layer, reached
        reached |= layer.name in trained


def trained_layers(trains: Mapping[str, bool]) -> set[str]:
    """Returns the names of the layers that have a parameter that trains."""
    names = {name for name, yes in trains.items() if yes}
    return names | {name.rpartition("/")[0] for name in names if "/" in name}


def _towers(config: ClipConfig) -> tuple[str, ...]:
    return ("visual",) if config.text is None else ("visual", "text")


def count_active_parameters(params: trees.Params, config: ClipConfig) -> int:
    """Returns the number of parameters that one token uses: of the experts only the selected ones count."""
    total = 0
    for name, leaf in trees.flatten(params).items():
        size = int(np.prod(leaf.shape))
        if config.moe is not None and EXPERT_LEAF.fullmatch(name):
            size = size // config.moe.num_experts * config.moe.num_selected_experts
        total += size
    return total
