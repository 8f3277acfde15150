"""The baselines that the demo does not make: what they train, from the base, by which losses."""

import json

import numpy as np
import pytest
from etils import epath
from killed_run import config as tiny_config

from clipmoe_jax.core import trees
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu import runner
from clipmoe_jax.dmu.recipes import find_recipe
from clipmoe_jax.models.model_folder import load_model

NAMES = ("full_ft", "long_clip", "drop_upcycling", "clip_up")
FFN, ATTENTION = "visual/resblocks_0/mlp/c_fc/kernel", "visual/resblocks_0/attn/out_proj/kernel"
EXPERTS = "visual/resblocks_0/moe/c_fc/kernel"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, results), seven steps each."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("baselines")), tiny_config()
    config.baselines = NAMES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmu_results, "_diagnose", lambda run, folder: {})  # of the CLIP-MoE alone
        [results] = runner.run_variants(config, workdir)[""]
    return workdir, results


@pytest.fixture(scope="module")
def leaves(run):
    """name of a model's folder -> its leaves"""
    return lambda name: trees.flatten(load_model(run[0] / name)[1])


@pytest.fixture(scope="module")
def lines(run):
    """phase -> its lines of metrics"""
    found = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    return lambda phase: [line for line in found if line["phase"] == phase]


def test_every_baseline_has_a_row(run):
    titles = [find_recipe(name).title for name in NAMES]
    assert list(run[1]) == ["base", *titles, "stage 1 alone", "CLIP-MoE"]


@pytest.mark.parametrize(
    ("name", "changed", "same"),
    [
        ("full_ft", [FFN, ATTENTION, "text/token_embedding/embedding"], []),
        ("long_clip", [FFN, ATTENTION, "text/token_embedding/embedding"], []),
        ("drop_upcycling", [], [ATTENTION, "logit_scale"]),
        ("clip_up", [ATTENTION, "text/token_embedding/embedding"], []),
    ],
)
def test_what_trains(leaves, name, changed, same):
    before, after = leaves("base"), leaves(f"baselines/{name}")
    assert [leaf for leaf in changed if np.array_equal(before[leaf], after[leaf])] == []
    assert [leaf for leaf in same if not np.array_equal(before[leaf], after[leaf])] == []
    if EXPERTS in after:
        for e, expert in enumerate(after[EXPERTS]):
            assert not np.array_equal(expert, leaves(f"baselines/{name}_upcycled")[EXPERTS][e])


def test_half_of_the_hidden_units_of_drop_upcycling_were_drawn_anew(leaves):
    dense = leaves("base")[FFN]
    for upcycled, share in (("drop_upcycling", 0.5), ("clip_up", 0)):
        for expert in leaves(f"baselines/{upcycled}_upcycled")[EXPERTS]:
            assert np.mean((expert != dense).any(axis=0)) == share


def test_which_losses(lines):
    """The total is the sum of its parts, and no other parts are there."""
    parts = {
        "full_ft": ["contrastive_loss"],
        "long_clip": ["contrastive_loss", "short_caption_loss"],
        "drop_upcycling": ["contrastive_loss", "balance_loss"],
        "clip_up": ["contrastive_loss", "balance_loss", "router_z_loss"],
    }
    for name, names in parts.items():
        assert len(lines(name)) == 7  # log_every = 1
        for line in lines(name):
            assert {key for key in line if key.endswith("_loss")} == set(names)
            assert line["loss"] == pytest.approx(sum(line[key] for key in names), rel=1e-5)
    # Routers start near 0, where logsumexp is ln 2 for each token: 1e-3 of its square.
    assert lines("clip_up")[0]["router_z_loss"] == pytest.approx(1e-3 * np.log(2) ** 2, rel=0.2)
