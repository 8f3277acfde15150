"""FLOPs against XLA's count, parameters by hand, and that times are taken in turns."""

import dataclasses

import jax
import numpy as np
import pytest
from grids import quick

from clipmoe_jax.analysis import cost
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig

# ViT-B/32's widths and lengths, two blocks of its twelve; as a MoE, one of the two or both.
DENSE = ClipConfig(
    embed_dim=512,
    vision=VisionConfig(224, 32, 768, 2),
    text=TextConfig(vocab_size=1000, context_length=77, width=512, num_layers=2),
)
CONFIGS = {
    "dense": DENSE,
    "two of four experts": dataclasses.replace(DENSE, moe=MoeConfig(4, 2)),
    "one of three experts, last block": dataclasses.replace(DENSE, moe=MoeConfig(3, 1, 1)),
}


@pytest.mark.parametrize("tower", ["visual", "text"])
@pytest.mark.parametrize("config", quick(CONFIGS, "one of three experts, last block"))
def test_hand_and_xla_count_the_same_flops(config, tower):
    found = cost.hand_flops(config, tower)
    assert found == pytest.approx(cost.xla_flops(config, tower), rel=0.03)


def test_two_experts_cost_one_more_feed_forward_layer_and_the_routers():
    # 50 tokens of width 768, in the second block one, through 768 x 3072 and back; in both blocks 50 through
    # 768 x 4 for the router.
    extra = 2 * 2 * (50 + 1) * 768 * 3072 + 2 * 2 * 50 * 768 * 4
    dense, moe = (cost.hand_flops(CONFIGS[name], "visual") for name in ("dense", "two of four experts"))
    assert moe - dense == extra


def test_shorter_caption_is_counted_at_its_length():
    found = cost.hand_flops(DENSE, "text", 32)
    assert found == pytest.approx(cost.xla_flops(DENSE, "text", 32), rel=0.03)
    assert found < cost.hand_flops(DENSE, "text") / 2


def test_timed_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = cost.interleaved_seconds(calls, rounds=3)
    assert "".join(order) == "ab" + 3 * "ab"  # one untimed call each, then the rounds
    assert [len(seconds[name]) for name in "ab"] == [3, 3]


def test_peak_bytes_count_arguments_and_results_once():
    # Two arguments of 1,000 float32 and a result of as many; 4,000 bytes fewer where that takes x's place.
    x = jax.ShapeDtypeStruct((1000,), np.float32)
    assert cost.peak_bytes(jax.jit(lambda x, y: x + y).lower(x, x).compile()) == 12_000
    assert cost.peak_bytes(jax.jit(lambda x, y: x + y, donate_argnums=0).lower(x, x).compile()) == 8_000


@pytest.fixture(scope="module")
def measured(trained):
    """With a clock of its own: a call takes 2 s, or 3 s of 4 pairs and 8 s of 8, twice that for the MoE."""
    batch = trained.batches[0]
    models = {
        "base": (Clip(trained.dense, ComputeConfig()), trained.dense_params[0]),
        "CLIP-MoE": (trained.model, trained.params),
    }
    calls = []

    def seconds(calls_of_models, rounds):
        size = (1, 4, 8)[len(calls)]
        calls.append([call()[0].shape for call in calls_of_models.values()])
        of_base = {1: 2.0, 4: 3.0, 8: 8.0}[size]
        return {
            name: [factor * of_base, 100.0, factor * of_base]
            for name, factor in zip(calls_of_models, (1, 2), strict=True)
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "interleaved_seconds", seconds)
        found = cost.costs(models, batch["image"], batch["text"], batch_sizes=(8, 4), rounds=3)
    assert calls == [2 * [(1, 64)], 2 * [(4, 64)], 2 * [(8, 64)]]  # eight: the four images again
    return found


def test_latency_is_a_median_and_the_fastest_batch_is_kept(measured):
    assert list(measured) == ["base", "CLIP-MoE"]
    base, moe = measured.values()
    assert (base["latency_ms"], moe["latency_ms"]) == (2000, 4000)
    # 4 pairs in 3 s, 8 in 8 s: the smaller batch is faster.
    assert base["best_batch"] == moe["best_batch"] == 4
    assert (base["pairs_per_second"], moe["pairs_per_second"]) == pytest.approx((4 / 3, 4 / 6))


def test_parameters_flops_and_peak_bytes_equal_hand_counts(measured, trained):
    base, moe = measured.values()
    # A feed-forward layer of width 64: 64 * 256 + 256 + 256 * 64 + 64; a router 64 * 4; four MoE blocks.
    layer, router = 64 * 256 + 256 + 256 * 64 + 64, 64 * 4
    assert moe["parameters"] - base["parameters"] == 4 * (3 * layer + router)
    assert moe["active_parameters"] - base["active_parameters"] == 4 * (layer + router)
    assert base["active_parameters"] == base["parameters"]
    # The programs hold at least their float32 parameters, and little beside them at this size.
    for found in (base, moe):
        assert 4 * found["parameters"] < found["peak_bytes"] < 4 * found["parameters"] + 20e6
        assert isinstance(found["best_batch"], int) and isinstance(found["peak_bytes"], int)
    # One more feed-forward layer for all tokens of the first block and one of the second; routers of both.
    for name, length in (("image", 5), ("caption", 64)):
        extra = 2 * 2 * (length + 1) * 64 * 256 + 2 * 2 * length * 64 * 4
        assert moe[f"flops_per_{name}"] - base[f"flops_per_{name}"] == extra
    assert 1 < moe["xla_flops_per_image"] / moe["flops_per_image"] < 1.3  # norms count for more at width 64
