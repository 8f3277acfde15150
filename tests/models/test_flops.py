"""FLOPs counted by hand, against XLA's own count of the compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.dmu.recipe import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import LossConfig, abstract_state, make_train_step

# ViT-B/32's widths and lengths, two blocks of its twelve.
DENSE = ClipConfig(
    embed_dim=512,
    vision=VisionConfig(224, 32, 768, 2),
    text=TextConfig(vocab_size=1000, context_length=248, width=512, num_layers=2),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1))
SEQUENCE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, num_moe_layers=1, sequence_share=2.0))
BLOCKS = dataclasses.replace(
    DENSE, moe=MoeConfig(4, 2, num_moe_layers=1, expert_layers="attention_and_feed_forward")
)
BATCH = {
    "image": jax.ShapeDtypeStruct((8, 224, 224, 3), np.uint8),
    "text": jax.ShapeDtypeStruct((8, 248), np.int32),
}


def test_a_block_by_hand():
    # 50 tokens of width 768: in_proj 2*50*768*2304, attention 2*2*50*50*768, out_proj 2*50*768*768,
    # c_fc and c_proj 2*2*50*768*3072.
    attention, ffn = 176_947_200 + 7_680_000 + 58_982_400, 471_859_200
    # 49 patches of 3*32*32 values; the class token's projection.
    ends = 2 * 49 * 3072 * 768 + 2 * 768 * 512
    # The second block's feed-forward layer sees the class token alone.
    blocks = 2 * attention + ffn + ffn // 50
    assert sum(layer.flops for layer in flops.layers(DENSE, "visual")) == blocks + ends


def test_gradients_by_hand():
    """Only the last feed-forward layer trains: its kernels' gradients, and the input's of what comes after
    its first kernel. Nothing before it is differentiated."""
    names = list(trees.flatten(abstract_params(DENSE)))
    trains = {name: name.startswith("visual/resblocks_1/mlp/") for name in names}
    c_fc = c_proj = 2 * 768 * 3072
    extra = (c_fc + c_proj) + (c_proj + 2 * 768 * 512)
    assert flops.forward_backward(DENSE, trains) == flops.forward(DENSE) + extra


def xla_flops(compiled) -> float:
    found = compiled.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"] / 8


@pytest.mark.parametrize("config", [DENSE, SEQUENCE], ids=["dense", "MoE by token and sequence"])
def test_forward(config):
    params = abstract_params(config)
    model = Clip(config, ComputeConfig(dispatch="dense"))
    encode = jax.jit(lambda params, batch: model.apply({"params": params}, batch["image"], batch["text"]))
    found = flops.forward(config, slots=4)  # dense dispatch: every expert on every token
    assert found == pytest.approx(xla_flops(encode.lower(params, BATCH).compile()), rel=0.03)


@pytest.mark.parametrize(
    ("config", "rules", "compute", "slots"),
    [
        (BLOCKS, TRAIN_ROUTERS, ComputeConfig(dispatch="dense"), 4),
        pytest.param(BLOCKS, TRAIN_MOE, ComputeConfig(dispatch="dense"), 4, marks=exhaustive),
        pytest.param(DENSE, TRAIN_EVERYTHING, ComputeConfig(), 0, marks=exhaustive),
        (DENSE, TRAIN_FFN, ComputeConfig(), 0),
        pytest.param(MOE, TRAIN_ROUTERS, ComputeConfig(dispatch="dense"), 4, marks=exhaustive),
        (MOE, TRAIN_MOE, ComputeConfig(dispatch="capacity", capacity_factor=1.5), 3),
    ],
    ids=[
        *("routers of blocks", "routers and experts of blocks", "everything", "feed-forward layers"),
        *("routers", "routers and experts"),
    ],
)
def test_a_training_step(config, rules, compute, slots):
    phase, mesh = PhaseConfig(8, 1e-3, 0.1), sharding.make_mesh(devices=jax.devices()[:1])
    params = abstract_params(config)
    trainable, frozen = trees.partition(params, rules)
    step = make_train_step(Clip(config, compute), LossConfig(0.1, 0.01), phase)
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    state = abstract_state(mesh, phase, trainable)
    found = flops.forward_backward(config, trees.match_rules(rules, list(trees.flatten(params))), slots=slots)
    compiled = step.lower(state, frozen, BATCH, rate, key).compile()
    assert found == pytest.approx(xla_flops(compiled), rel=0.03)


def test_shorter_captions_cost_less():
    text = flops.forward(DENSE, 124) - flops.forward(DENSE, 62)
    assert 0 < text < flops.forward(DENSE) / 2
