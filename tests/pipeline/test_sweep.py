"""A sweep over variants of a config: what they have in common is made once."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from grids import exhaustive
from test_configs import get_config
from tiny_config import get_config as tiny_config

from clipmoe_jax import config as configs
from clipmoe_jax.core.errors import SeveralErrors
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu import runner
from clipmoe_jax.models.model_folder import load_model
from clipmoe_jax.plan import plan
from clipmoe_jax.reporting.text_tables import format_variants

VARIANTS = {"one": {"moe.num_selected_experts": 1}, "two": {"moe.num_selected_experts": 2}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(workdir, {variant: results of each seed})."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("sweep")), tiny_config()
    configs.set_variants(config, VARIANTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dmu_results, "_diagnose", lambda run, folder, progress: {}
        )  # is looked at in test_pipeline.py
        patch.setattr(dmu_results, "_nothing_changed", lambda run: [])
        return workdir, runner.run_variants(config, workdir)


def phases(workdir) -> set[str]:
    return {json.loads(line)["phase"] for line in (workdir / "metrics.jsonl").read_text().splitlines()}


@exhaustive
def test_stages_that_variants_share_are_trained_once(sweep):
    workdir, _ = sweep
    assert phases(workdir / "one") == {"base", "mcl_1", "consolidation", "router"} and phases(
        workdir / "two"
    ) == {"router"}
    for name in ("base", "stage_1/features", "stage_1/clusters", "stage_1/params"):
        done = [json.loads((workdir / variant / name / "done.json").read_text()) for variant in VARIANTS]
        assert done[1].pop("copied_from") == str(workdir / "one" / name)
        assert done[0] == done[1]
    for name in ("base", "stage_1/params"):
        one, two = (load_model(workdir / variant / name)[1] for variant in VARIANTS)
        jax.tree.map(np.testing.assert_array_equal, one, two)


@exhaustive
def test_model_that_the_varied_field_changes_is_made_for_each_variant(sweep):
    workdir, _ = sweep
    for variant, num_selected in (("one", 1), ("two", 2)):
        config, _ = load_model(workdir / variant / "moe" / "params")
        assert config.moe.num_selected_experts == num_selected
        assert "copied_from" not in json.loads((workdir / variant / "moe/params/done.json").read_text())
        written = json.loads((workdir / variant / "config.json").read_text())
        assert written["moe"]["num_selected_experts"] == num_selected and not written["variants"]


@exhaustive
def test_table_has_a_row_for_each_variant(sweep):
    _, found = sweep
    header, *lines = format_variants(found).splitlines()
    assert header.split()[-4:] == ["params", "active", "pairs", "FLOPs"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[:2]}
    assert list(rows) == ["one", "two"]
    for variant, cells in rows.items():
        [results] = found[variant]
        assert cells[0] == f"{100 * results['CLIP-MoE']['image_to_text_r1']:.1f}"
        assert cells[3] == f"{100 * results['CLIP-MoE']['text_to_image_r5']:.1f}"
    assert rows["one"][-3] != rows["two"][-3]  # active parameters
    assert rows["one"][-1] == rows["two"][-1]  # of routers whose gradient reaches all experts


@exhaustive
def test_row_of_several_seeds_is_their_mean_and_standard_deviation(sweep):
    _, found = sweep
    [results] = found["one"]
    other = json.loads(json.dumps(results))
    other["CLIP-MoE"]["image_to_text_r1"] = results["CLIP-MoE"]["image_to_text_r1"] + 0.02
    row = format_variants({"one": [results, other], "two": [results, results]}).splitlines()[1]
    # Two values 2 points apart: their mean is 1 from each, their standard deviation sqrt(2).
    assert f"{100 * results['CLIP-MoE']['image_to_text_r1'] + 1:.1f} ± 1.4" in row


@exhaustive
def test_finished_sweep_trains_nothing_more(sweep):
    workdir, found = sweep
    config = tiny_config()
    configs.set_variants(config, VARIANTS)
    before = (workdir / "two" / "metrics.jsonl").read_text()
    assert runner.run_variants(config, workdir) == found
    assert (workdir / "two" / "metrics.jsonl").read_text() == before


BAD_VARIANTS = {
    "no such field": ({"mcl.num_stage": 1}, r"variants\.bad: 'mcl.num_stage' is not a field"),
    "no such group": ({"mlc.num_stages": 1}, r"variants\.bad: 'mlc.num_stages' is not a field"),
    "a field of a field": ({"log_every.x": 1}, r"variants\.bad: 'log_every.x' is not a field"),
    "a group": ({"mcl": 1}, r"variants\.bad: 'mcl' is a group of fields"),
    "seeds": ({"seeds": (1, 2)}, r"variants\.bad: 'seeds' is not a field"),
    "wrong type": ({"mcl.num_stages": 1.5}, r"variants\.bad: mcl.num_stages=1.5 must be of type int"),
    "a bool for a number": (
        {"mcl.num_stages": True},
        r"variants\.bad: mcl.num_stages=True must be of type int",
    ),
    "a value that cannot work": (
        {"moe.num_selected_experts": 5},
        r"variants\.bad: moe.num_selected_experts=5 must lie between 1 and the number of experts, 4",
    ),
    "a batch that cannot be split": ({"router.batch_size": 12}, r"variants\.bad: router: batch size 12"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_VARIANTS.values(), ids=BAD_VARIANTS)
def test_bad_variant_is_named_before_anything_is_made(tmp_path, fields, message):
    config = tiny_config()
    configs.set_variants(config, {"good": {}, "bad": fields})
    with pytest.raises(ValueError, match=message):
        runner.run_variants(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def published_config():
    """The tiny config without consolidation, its experts those of the paper."""
    config = tiny_config()
    config.moe.experts, config.consolidation.num_steps, config.consolidation.num_epochs = (), 0, 0
    return config


def test_all_that_is_wrong_with_a_sweep_is_told_at_once(tmp_path):
    config = published_config()
    config.mcl.num_stages, config.cluster.num_clusters = 0, 0
    variants = {
        "../up": {},
        "typos": {"mcl.num_stage": 1, "mcl": 1},
        "values": {"router.batch_size": 12, "data.test": "folder:/nowhere"},
        "wrong": {"moe.dispatch": "x", "base.checkpoint": "nowhere.pt", "baselines": ("none",)},
    }
    configs.set_variants(config, variants)
    config.evaluations = ("knn:x", "zero:y")
    with pytest.raises(SeveralErrors) as refused:
        runner.run_variants(config, epath.Path(tmp_path / "run"))
    assert [message.partition(":")[0] for message in refused.value.messages] == [
        "moe.num_selected_experts=2 must lie between 1 and the number of experts, 1 (mcl.num_stages + 1)",
        "cluster.num_clusters=0 must lie between 1 and 1000",
        "mcl.num_stages=0 must lie between 1 and 9",
        "variants",  # '../up' must be the name of a folder
        "variants.typos",  # 'mcl' is a group of fields
        "variants.typos",  # 'mcl.num_stage' is not a field
        "variants.../up, variants.typos, variants.values, variants.wrong",  # evaluation 'knn:x'
        "variants.../up, variants.typos, variants.values, variants.wrong",  # evaluation 'zero:y'
        "variants.values",  # data.test: source folder:/nowhere
        "variants.wrong",  # moe.dispatch='x'
        "variants.wrong",  # baselines='none'
        "variants.wrong",  # base.checkpoint=nowhere.pt
    ]
    assert not (tmp_path / "run").exists()


def test_plan_ends_with_all_that_the_run_would_refuse():
    """In each variant, with its own data and with the pairs that its base is trained on."""
    config = published_config()
    config.data.base = "digit_scenes:train?pairs=8"
    variants = {
        "a": {"data.train": "digit_scenes:train?pairs=15"},
        "b": {},
        "c": {"router.batch_size": 65, "mcl.b1": 2.0},
        "d": {"baselines": ("base_ft_moe",), "moe.dispatch": "x"},
    }
    configs.set_variants(config, variants)
    with pytest.raises(SeveralErrors) as refused:
        plan(config, "h100", 1)

    def too_few(section: str) -> str:
        names = {"batch_size": 4, "num_steps": 200, "warmup_steps": 20}
        flags = " ".join(f"--config.{section}.{name}={value}" for name, value in names.items())
        return f"training pairs: take more data, or {flags}"

    assert refused.value.messages == (
        f"variants.a, variants.b: base.train.batch_size=16 is more than the 8 {too_few('base.train')}",
        f"variants.a: mcl.batch_size=16 is more than the 15 {too_few('mcl')}",
        f"variants.a: router.batch_size=16 is more than the 15 {too_few('router')}",
        "variants.c: mcl.b1=2.0 must lie between 0.0 and 0.999999999",
        "variants.d: moe.dispatch='x': choose one of ragged, dense, capacity",
        "variants.d: baselines: 'base_ft_moe' is made from 'direct_ft': add it",
    )


def test_name_of_a_variant_must_be_a_folder_name():
    config = tiny_config()
    configs.set_variants(config, {"../up": {}})
    with pytest.raises(ValueError, match="'../up' must be the name of a folder"):
        configs.variant_configs(config)


def test_variant_takes_an_int_for_a_float_and_a_tuple():
    config = tiny_config()
    configs.set_variants(config, {"x": {"mcl.weight_decay": 1, "baselines": ("full_ft",)}})
    [variant] = configs.variant_configs(config).values()
    assert variant.mcl.weight_decay == 1.0 and variant.baselines == ("full_ft",)
    assert not variant.variants and config.mcl.weight_decay == 0.2


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("experts", ["mcl.num_stages"] * 3),
        ("selected", ["moe.num_selected_experts"] * 4),
        ("clusters", ["cluster.num_clusters"] * 3),
        ("init_from", ["mcl.init_from"] * 2),
        ("baselines", []),
    ],
)
@pytest.mark.parametrize("arg", ["", ",small,seeds=2"])
def test_ready_made_sweeps_are_valid(what, fields, arg):
    config = get_config("sweep", f"what={what}{arg}")
    assert [field for variant in config.variants.values() for field in variant] == fields
    for variant in configs.variant_configs(config).values():
        runner.check_config(variant)
    assert len(config.seeds) == (2 if arg else 1)


def test_unknown_sweep_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="what='routers': choose one of experts, selected, clusters"):
        get_config("sweep", "what=routers")
