"""What a run works out of its devices before the first stage."""

import pytest

from clipmoe_jax import config as configs
from clipmoe_jax.core import sharding
from clipmoe_jax.dmu import runner
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig

TINY = ClipConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=8, width=64, num_layers=2, head_width=32),
    text=TextConfig(vocab_size=512, context_length=24, width=48, num_layers=2, head_width=24),
)


@pytest.fixture
def config():
    config = configs.default_config()
    config.base.architecture = TINY.to_dict()
    config.mcl.batch_size = config.router.batch_size = 64
    return config


@pytest.mark.parametrize(
    ("given", "memory", "stage", "remat"),
    [
        ("auto", None, "", "none"),  # a CPU
        ("auto", 1e9, "", "none"),
        ("auto", 1e6, "", "dots"),
        ("auto", 1e6, "embed_1", "none"),  # which trains nothing
        ("none", 1e6, "", "none"),
        ("full", 1e9, "", "full"),
    ],
)
def test_backward_pass_computes_again_what_does_not_fit(monkeypatch, config, given, memory, stage, remat):
    monkeypatch.setattr(sharding, "usable_memory", lambda: memory)
    config.compute.remat = given
    assert runner._remat(config, sharding.make_mesh(**config.mesh), stage) == remat


def test_memory_of_a_cpu_is_no_limit():
    assert sharding.usable_memory() is None
