"""The largest batches of a plan, by hand."""

import dataclasses

import pytest

from clipmoe_jax.config import default_config
from clipmoe_jax.dmu.phases import phases_of, steps_of_section
from clipmoe_jax.planning import limits
from clipmoe_jax.planning.memory import Memory, similarity_bytes
from clipmoe_jax.planning.plan import make_plan
from clipmoe_jax.reporting.plan_tables import format_plan

NUM_PAIRS = 1_246_000  # of ShareGPT4V-PT


@pytest.fixture(scope="module")
def stages():
    """{name: phase} of the default config."""
    return {phase.name: phase for phase in phases_of(default_config(), "cuda", NUM_PAIRS)}


@pytest.mark.parametrize(
    ("number", "largest"),
    [(1, 138_444), (2, 15_382), (3, 1_709)],  # 1,246,000 / 9, / 81, / 729
)
@pytest.mark.parametrize(
    ("small_clusters", "fate"), [("backoff", "parent clusters do"), ("drop", "are left out")]
)
def test_mean_cluster_fills_a_batch(stages, number, largest, small_clusters, fate):
    config = default_config()
    config.mcl.small_clusters = small_clusters
    limit = limits.cluster_limit(config, stages[f"mcl_{number}"], number, NUM_PAIRS)
    assert (limit.largest, limit.exceeded) == (largest, False) and limit.effect.endswith(fate)


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_warmup_limit_is_where_training_refuses(stages, num_epochs):
    """200 steps of warm-up want 201 steps: 6,199 pairs in one epoch, 3 * 67 steps of 18,597 in three."""
    settings = dataclasses.replace(stages["mcl_1"].hyperparameters, num_epochs=num_epochs)
    phase = dataclasses.replace(stages["mcl_1"], hyperparameters=settings)
    [limit] = limits.warmup_limit(phase, NUM_PAIRS)
    assert limit.largest == {1: 6_199, 3: 18_597}[num_epochs]
    steps_of_section("mcl", dataclasses.replace(settings, batch_size=limit.largest), NUM_PAIRS)
    with pytest.raises(ValueError, match="mcl: warmup_steps=200 does not fit into"):
        steps_of_section("mcl", dataclasses.replace(settings, batch_size=limit.largest + 1), NUM_PAIRS)


def test_warmup_of_a_fixed_number_of_steps_fits_no_number_of_pairs(stages):
    """So that no flags for so many pairs are advised."""
    hyperparameters = dataclasses.replace(stages["mcl_1"].hyperparameters, num_steps=100)
    with pytest.raises(ValueError, match="mcl: warmup_steps=200 does not fit into 100 steps") as refused:
        steps_of_section("mcl", hyperparameters, NUM_PAIRS)
    assert "--config" not in str(refused.value)


def test_fixed_number_of_steps_has_no_warmup_limit(stages):
    settings = dataclasses.replace(stages["mcl_1"].hyperparameters, num_steps=300)
    phase = dataclasses.replace(stages["mcl_1"], hyperparameters=settings)
    assert limits.warmup_limit(phase, NUM_PAIRS) == []


@pytest.mark.parametrize("accumulation_steps", [1, 8])
def test_largest_batch_fills_nine_tenths_of_the_memory(stages, accumulation_steps):
    """8 devices of 16 GB: 14.4 - 4 GB are left for 5 MB of activations a pair of a microbatch and 12 B^2 / 8
    bytes."""
    settings = dataclasses.replace(stages["mcl_1"].hyperparameters, accumulation_steps=accumulation_steps)
    phase = dataclasses.replace(stages["mcl_1"], hyperparameters=settings)

    def memory(batch_size):
        activations = 5e6 * batch_size / 8 / accumulation_steps
        return Memory(1e9, 2e9, 1e9, 0, activations, similarity_bytes(batch_size, 8))

    limit = limits.memory_limit(phase, memory(phase.hyperparameters.batch_size), 16e9, 8)
    assert limit.largest % (8 * accumulation_steps) == 0
    assert sum(memory(limit.largest)) <= 14.4e9 < sum(memory(limit.largest + 8 * accumulation_steps))


def test_no_batch_fits_beside_too_large_a_model(stages):
    memory = Memory(1e10, 2e10, 1e10, 0, 1e9, 1e6)
    assert limits.memory_limit(stages["mcl_1"], memory, 16e9, 8).largest == 0


def test_plan_lists_limits_and_marks_those_exceeded():
    config = default_config()
    config.base.architecture.vision.num_layers = config.base.architecture.text.num_layers = 1
    config.mcl.batch_size = 4096
    lines = format_plan(make_plan(config, "h100", 8, mfu=0.4, num_pairs=NUM_PAIRS)).splitlines()
    marked = [line.split()[:3] for line in lines if line.endswith("(so here)")]
    assert marked == [["mcl_3", "4,096", "1,709"]]
    with pytest.raises(ValueError, match="router.batch_size=800 is more than the 700 training pairs"):
        config.mcl.batch_size, config.mcl.num_steps = 100, 300
        make_plan(config, "h100", 8, mfu=0.4, num_pairs=700)
