"""Runs models, losses, a step and clustering with their annotations checked; test_annotations.py starts it.

The import hook only reaches modules that are imported after it, so this is a process of its own.
"""

import dataclasses
import functools

from jaxtyping import install_import_hook

install_import_hook(
    ["clipmoe_jax.models", "clipmoe_jax.train", "clipmoe_jax.dmu.clustering"], "typeguard.typechecked"
)

import jax  # noqa: E402 (after the hook)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from clipmoe_jax.core import sharding, trees  # noqa: E402
from clipmoe_jax.dmu.clustering import accumulate_labels, fit_centres, nearest_centre  # noqa: E402
from clipmoe_jax.models.attention import attention  # noqa: E402
from clipmoe_jax.models.clip import (  # noqa: E402
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    abstract_params,
    normalize_features,
)
from clipmoe_jax.models.inputs import PackedText  # noqa: E402
from clipmoe_jax.models.moe import route  # noqa: E402
from clipmoe_jax.models.positions import resize_grid, stretch_positions  # noqa: E402
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig  # noqa: E402
from clipmoe_jax.train import losses  # noqa: E402
from clipmoe_jax.train.phase import PhaseConfig  # noqa: E402
from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step  # noqa: E402

DENSE = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=16, num_layers=2, head_width=8),
    text=TextConfig(vocab_size=50, context_length=12, width=16, num_layers=2, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1))
BLOCKS = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, expert_layers="attention_and_feed_forward"))
IMAGES = np.zeros((3, 16, 16, 3), np.uint8)
TOKENS = jnp.tile(jnp.array([[48, 5, 7, 49, 0, 0]], jnp.int32), (3, 1))
PACKED = PackedText(
    jnp.array([[48, 5, 49, 48, 7, 49], [48, 9, 11, 12, 49, 0]], jnp.int32),
    jnp.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0]], jnp.int32),
    jnp.array([2, 5, 10], jnp.int32),
)
PHASE = PhaseConfig(3, 1e-3, 0.1, num_steps=4, warmup_steps=1)


def trace_step(config: ClipConfig, compute: ComputeConfig, loss: LossConfig, text) -> None:
    """Traces a step in which everything trains; nothing is compiled."""
    model, mesh = Clip(config, compute), sharding.make_mesh(devices=jax.devices()[:1])
    rules = ((r"(visual|text)/.*", True), (r"logit_scale", False))
    trainable, frozen = trees.partition(abstract_params(config), rules)
    state = abstract_state(mesh, PHASE, trainable)
    batch = {"image": jnp.asarray(IMAGES), "text": text, "short_text": TOKENS}
    step = make_train_step(model, loss, PHASE)
    _, metrics = jax.eval_shape(step, state, frozen, batch, jnp.float32(1e-3), jax.random.key(1))
    assert metrics["loss"].shape == ()


def refuses(function, *arguments) -> None:
    """Asserts that arguments of a wrong shape or dtype are refused: the annotations are checked."""
    try:
        function(*arguments)
    except Exception as error:
        assert "type" in f"{type(error).__name__} {error}".lower(), error
    else:
        raise AssertionError(f"{function.__name__} took arguments that its annotations exclude")


chunked = ComputeConfig(attention="chunked", mlp_chunk_rows=4)
trace_step(DENSE, chunked, LossConfig(0.1, short_caption_weight=0.5), PACKED)
full_loss = LossConfig(0.1, 0.01, z_loss_coefficient=0.1)
for fields in (
    {"dispatch": "dense"},
    {"dispatch": "capacity", "remat": "dots"},
    {"grouped_mlp": "blocks"},
    {"grouped_mlp": "fixed_blocks", "remat": "full"},
    {"grouped_mlp": "ragged_dot"},
):
    for config in (MOE, BLOCKS):
        trace_step(config, ComputeConfig(expert_dropout_rate=0.1, **fields), full_loss, TOKENS)
for config in (DENSE, BLOCKS):
    apply = functools.partial(Clip(config).apply, method="encode_image", output="patches")
    jax.eval_shape(apply, {"params": abstract_params(config)}, IMAGES)
stretch_positions(np.zeros((77, 4), np.float32))
resize_grid(np.zeros((5, 4), np.float32), 3)
normalize_features(jnp.ones((2, 4)))
features = [np.eye(4, dtype=np.float16)[:3], np.eye(4, dtype=np.float16)]  # parts of a pass
labels = nearest_centre(features[0], fit_centres(features, [3, 4], 2, seed=0, max_fit=10))
accumulate_labels(np.zeros(3, np.int32), labels, labels, 2)

refuses(route, jnp.zeros((3, 4), jnp.int32), 2)
refuses(normalize_features, jnp.ones((2, 3, 4)))
refuses(lambda qkv: attention(qkv, causal=True), jnp.ones((2, 5, 3, 8)))
refuses(nearest_centre, features[0], np.ones((2, 5), np.float32))
refuses(accumulate_labels, np.zeros(4, np.int32), labels, labels, 2)
refuses(losses.contrastive_loss, jnp.ones((3, 4)), jnp.ones((2, 4)), jnp.float32(0))
print("annotations hold")
