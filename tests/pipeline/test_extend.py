"""A run whose base is a CLIP-MoE: its experts and routers stay, and one more expert joins them."""

import io
import shutil
import sys

import chex
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image
from tiny_config import get_config as tiny_config
from transformers import AutoModel, dynamic_module_utils

from benchmarks import torchvision_operators
from clipmoe_jax import convert, load, plan
from clipmoe_jax.core import trees
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu import runner
from clipmoe_jax.models.expert_params import EXPERT_LEAF, expert_as_dense
from clipmoe_jax.models.model_folder import load_model
from clipmoe_jax.reporting.expert_sections import expert_names
from clipmoe_jax.reporting.output import write_results
from clipmoe_jax.reporting.read import Folder
from clipmoe_jax.train import loop


def config_of(mixture):
    config = tiny_config()
    config.base.checkpoint, config.base.expert = str(mixture / "moe" / "params"), 2
    config.data.train = "glyphs:train?pairs=64&alphabet=1"
    config.data.retention, config.retention = "glyphs:test?pairs=16", "zero_shot:data.retention"
    config.evaluations = (f"retrieval:{mixture / 'data' / 'test'}",)
    config.moe.experts = ("base", "consolidation")
    return config


@pytest.fixture(scope="module")
def extended(uninterrupted, tmp_path_factory):
    """(workdir, results) of a run that was stopped while its routers trained, and started again."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("extended")), config_of(uninterrupted)
    report = loop._Reporter.report

    def stop_in_router(self, done, numbers):
        report(self, done, numbers)
        if self._name == "router" and done == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmu_results, "_diagnose", lambda run, folder, progress: {})
        patch.setattr(dmu_results, "_nothing_changed", lambda run: [])
        with pytest.MonkeyPatch.context() as stopping, pytest.raises(KeyboardInterrupt):
            stopping.setattr(loop._Reporter, "report", stop_in_router)
            runner.run_variants(config, workdir)
        [results] = runner.run_variants(config, workdir)[""]
    return workdir, results


def leaves_of(folder) -> dict[str, np.ndarray]:
    return trees.flatten(load_model(epath.Path(folder))[1])


def test_all_of_the_old_mixture_stays_bit_for_bit(uninterrupted, extended):
    old, new = leaves_of(uninterrupted / "moe" / "params"), leaves_of(extended[0] / "moe" / "params")
    assert old.keys() == new.keys()
    for name, leaf in old.items():
        if name.endswith("router/kernel"):
            np.testing.assert_array_equal(new[name][:, :4], leaf, name)
            assert new[name].shape == (leaf.shape[0], 5)
        elif name != "logit_scale":  # base.logit_scale sets it
            found = new[name][:4] if EXPERT_LEAF.fullmatch(name) else new[name]
            np.testing.assert_array_equal(found, leaf, name)


def test_new_expert_starts_from_the_one_that_the_config_names(uninterrupted, extended):
    config, params = load_model(extended[0] / "moe" / "params")
    _, last = expert_as_dense(params, config, 4)
    chex.assert_trees_all_equal(last, load_model(extended[0] / "dense" / "params")[1])
    old_config, old = load_model(epath.Path(uninterrupted) / "moe" / "params")
    start = trees.flatten(expert_as_dense(old, old_config, 2)[1])
    for name, leaf in leaves_of(extended[0] / "stage_1" / "params").items():
        trained = "/mlp/" in name or "/attn/" in name
        assert trained or name == "logit_scale" or np.array_equal(leaf, start[name]), name
        # A step is at most the learning rate for a parameter.
        assert np.abs(leaf - start[name]).max() < 0.1 or name == "logit_scale"


def test_only_the_new_columns_train(extended):
    before, after = (leaves_of(extended[0] / "moe" / name) for name in ("upcycled", "params"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("router/kernel")}


def test_stopped_and_resumed_is_as_uninterrupted(uninterrupted, extended, tmp_path):
    shutil.copytree(extended[0], tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "moe")
    for stage in ("upcycle", "router"):
        runner.run_variants(config_of(uninterrupted), epath.Path(tmp_path / "again"), stage)
    chex.assert_trees_all_equal(
        *(load_model(f / "moe" / "params")[1] for f in (extended[0], tmp_path / "again"))
    )


def test_rehearsal_imitates_the_old_mixture(uninterrupted, extended):
    old = load(str(uninterrupted / "moe" / "params"))
    image = Image.open(io.BytesIO(Records(str(extended[0] / "data" / "rehearsal"))[0]["image"]))
    features = old.encode_image(image, normalize=True)
    found = np.load(extended[0] / "rehearsal" / "features" / "image.npy")[0]
    np.testing.assert_allclose(found, features[0], atol=1e-5)


def test_table_has_old_mixture_new_expert_and_extended_mixture(extended):
    workdir, results = extended
    assert list(results) == ["base", "stage 1 alone", "dense curriculum", "CLIP-MoE"]
    assert [numbers["expert"] for numbers in results.values()] == [None, None, 4, None]
    assert results["base"]["pairs"] == 0 < results["CLIP-MoE"]["pairs"]
    assert results["base"]["parameters"] < results["CLIP-MoE"]["parameters"]
    assert (
        results["base"]["active_parameters"] < results["CLIP-MoE"]["active_parameters"]
    )  # the router's column
    for numbers in results.values():
        assert len(numbers["evaluations"]) == 2 and 0 <= numbers["retention"] <= 1
    assert "CLIP-MoE" in write_results({"": [results]}, workdir)
    names = [*((e, f"expert {e} of the base") for e in range(4)), (4, "dense curriculum")]
    assert expert_names(Folder(workdir, workdir), 5) == names


def test_plan_counts_the_steps_that_it_takes(uninterrupted, extended):
    text = plan.plan(config_of(uninterrupted), "h100", 1, 64)
    assert "base, CLIP-MoE of 4" in text and "CLIP-MoE of 5" in text


def test_exported_module_equals_ours(extended, tmp_path, monkeypatch):
    torchvision_operators.declare()
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = str(extended[0] / "moe" / "params")
    convert.convert(source, "huggingface", str(tmp_path / "exported"))
    theirs, ours = (
        AutoModel.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval(),
        load(source),
    )
    rng = np.random.default_rng(0)
    images, tokens = (
        rng.normal(size=(3, 32, 32, 3)).astype(np.float32),
        ours.tokenize(["a red 7", "an otter"]),
    )
    with torch.no_grad():
        of_images = theirs.get_image_features(torch.tensor(images.transpose(0, 3, 1, 2)))
        of_texts = theirs.get_text_features(torch.tensor(tokens))
    for found, expected in ((of_images, ours.encode_image(images)), (of_texts, ours.encode_text(tokens))):
        found = getattr(found, "pooler_output", found)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


BAD = {
    "feed-forward layers alone": (
        {"moe.expert_layers": "feed_forward"},
        "moe.expert_layers=feed_forward: .* set moe.expert_layers=attention_and_feed_forward",
    ),
    "published routing": (
        {"moe.routing": "token"},
        "moe.routing=token: .* set moe.routing=token_and_sequence moe.sequence_share=4",
    ),
    "another K": ({"moe.num_selected_experts": 3}, "set moe.num_selected_experts=2"),
    "other blocks": ({"moe.num_moe_layers": 1}, "set moe.num_moe_layers=0"),
    "the base second": (
        {"moe.experts": ("last_stage", "base", "consolidation")},
        "whose experts come first and once",
    ),
    "the base twice": (
        {"moe.experts": ("base", "base", "consolidation")},
        "whose experts come first and once",
    ),
    "nothing added": ({"moe.experts": ("base",), "router.loss": "contrastive"}, "then what is added"),
    "no such expert": ({"base.expert": 4}, "base.expert=4 is none of the base's: choose one of 0 to 3"),
    "blends": ({"blends": ("consolidation",)}, "blends: the base is a CLIP-MoE"),
    "a baseline": ({"baselines": ("direct_ft", "base_ft_moe")}, "'base_ft_moe' has the base as one expert"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_what_does_not_go_with_a_mixture_is_named_with_the_fix(uninterrupted, fields, message):
    config = config_of(uninterrupted)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        runner.check_config(config)
