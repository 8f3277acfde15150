"""A CLIP-MoE of width 64 whose experts differ, and two batches as the loader gives them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.dmu.upcycling import stack_experts
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

CAPTIONS = (
    "a small red two upright on striped navy background",
    "dogs.",
    "the 7 anticlockwise, it's yellow",
    "a large lime digit with teal border mark southeast and, as far as one can see, three or four more words "
    "than there is room for in a row of tokens: a b c d e f g h i j k l m n o p q r s t u v w x y z a b c d",
)


class Trained(NamedTuple):
    dense: ClipConfig
    dense_params: list[dict]  # that the experts came from
    model: Clip
    params: Any
    mesh: Any
    batches: list[dict[str, np.ndarray]]
    router_logits: Callable[..., np.ndarray]  # (params, inputs, method) -> (B, M, L, E)


@pytest.fixture(scope="session")
def trained():
    dense = ClipConfig(
        embed_dim=64,
        vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2, head_width=32),
        text=TextConfig(context_length=64, width=64, num_layers=2, head_width=32),
    )
    rng = np.random.default_rng(0)
    base = trees.flatten(
        jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype("f4"), abstract_params(dense))
    )

    def other():  # as a stage leaves it: feed-forward layers of its own, everything else the base's
        leaves = {name: leaf.copy() for name, leaf in base.items()}
        for name in leaves:
            if "/mlp/" in name:
                leaves[name] += rng.normal(0, 0.1, leaves[name].shape).astype("f4")
        return trees.unflatten(leaves)

    dense_params = [trees.unflatten(base), other(), other(), other()]
    params = stack_experts(dense_params, jax.random.key(0), router_stddev=0.3)
    config = ClipConfig(**{**vars(dense), "moe": MoeConfig(4, 2)})
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    images = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    tokens = Tokenizer(64)([CAPTIONS[i % 4] for i in range(8)])
    valid = np.array([True] * 6 + [False] * 2)
    tokens[~valid] = 0
    batches = [
        {"image": images[:4], "text": tokens[:4], "valid": valid[:4]},
        {"image": images[4:], "text": tokens[4:, :32], "valid": valid[4:]},
    ]
    model = Clip(config, ComputeConfig())

    @functools.partial(jax.jit, static_argnames="method")
    def router_logits(params, inputs, method):
        return model.apply({"params": params}, inputs, method=method)[1]["router_logits"]

    def on_host(*arguments):
        return np.asarray(router_logits(*arguments))

    return Trained(dense, dense_params, model, params, mesh, batches, on_host)
