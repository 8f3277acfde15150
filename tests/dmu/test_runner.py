"""What a run works out of its devices before the first stage."""

import json
import math

import pytest
from etils import epath

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
        ("auto", math.inf, "", "none"),  # a CPU
        ("auto", 0, "", "dots"),  # a device that does not say
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


def test_stages_one_by_one_choose_each_for_itself(monkeypatch, config, tmp_path):
    """The first trains nothing, and leaves "auto" to the second: in the config, and in the run's."""
    chosen = []

    def stages_of(config):
        return {name: lambda run: chosen.append(run.config.compute.remat) for name in ("embed_1", "mcl_1")}

    monkeypatch.setattr(sharding, "usable_memory", lambda: 1e6)
    monkeypatch.setattr(runner, "stages_of", stages_of)
    for stage in ("embed_1", "mcl_1"):
        runner._run_seed(config, 0, epath.Path(tmp_path), "", [""], {}, stage, range(0), None)
    assert chosen == ["none", "dots"] and config.compute.remat == "auto"
    assert json.loads((tmp_path / "config.json").read_text())["compute"]["remat"] == "auto"


def test_memory_is_no_limit_on_a_cpu_and_unknown_where_a_device_does_not_say(monkeypatch):
    assert sharding.usable_memory() == math.inf
    monkeypatch.setattr(sharding, "platform", lambda: "cuda")
    assert sharding.usable_memory() == 0
