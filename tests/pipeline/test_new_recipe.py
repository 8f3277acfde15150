"""A further baseline or stage is one row of the recipe table: a run makes, plans and shows it."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from compilations import recorded
from etils import epath
from grids import exhaustive
from tiny_config import get_config as tiny_config

from clipmoe_jax import convert
from clipmoe_jax.core import trees
from clipmoe_jax.dmu import recipes, runner
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu.recipe import TRAIN_FFN, Recipe, from_base
from clipmoe_jax.models.model_folder import load_model
from clipmoe_jax.planning.plan import make_plan
from clipmoe_jax.reporting.output import write_results
from clipmoe_jax.reporting.plan_tables import format_plan
from clipmoe_jax.train.step_programs import CompiledAhead

ATTENTION_ALONE = [(r".*/attn/.*", True), (r".*", False)]
ROW = Recipe(
    "attention_ft",
    "attention fine-tuned",
    "baseline",
    from_base,
    ATTENTION_ALONE,
    num_steps=recipes.one_stage,
    ignores=recipes.ORDINARY,
)
STAGE = Recipe(
    "polish",
    "polished",
    "stage",
    lambda config: ("mcl_1",),
    TRAIN_FFN,
    ignores=recipes.STAGE_COUNT,
)
COMPILED: list[list[str]] = []
TITLE, FOLDER = ROW.title, "baselines/attention_ft"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, config, results) of a run with the further rows; COMPILED tells where its steps compiled."""
    workdir, config = epath.Path(tmp_path_factory.mktemp("row")), tiny_config()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(recipes, "BASELINES", (*recipes.BASELINES, ROW))
        patch.setattr(recipes, "STAGES", (*recipes.STAGES, STAGE))
        patch.setattr(dmu_results, "_diagnose", lambda run, folder, progress: {})  # of the CLIP-MoE alone
        patch.setattr(dmu_results, "_nothing_changed", lambda run: [])
        config.baselines = (ROW.name,)
        begin = CompiledAhead.begin

        def begin_and_wait(ahead, *arguments):
            begin(ahead, *arguments)
            ahead._thread.submit(lambda: None).result()

        patch.setattr(CompiledAhead, "begin", begin_and_wait)  # or a phase may come before the thread
        COMPILED.append(stack.enter_context(recorded("train_step")))
        first = []
        [results] = runner.run_variants(config, workdir, show_first=first.append)[""]
        assert first == [{title: numbers for title, numbers in results.items() if title != TITLE}]
        yield workdir, config, results


@exhaustive
def test_steps_compile_ahead_but_for_the_base(run):
    """Two kinds of consolidation's, of which one is both stages' too, two kinds of the routers', and the new
    baseline's."""
    [threads] = COMPILED
    assert [name for name in threads if not name.startswith("compile")] == threads[:1]
    assert len(threads) == 1 + 5


@exhaustive
def test_new_baseline_trains_what_its_rules_say(run):
    workdir, *_ = run
    before, after = (trees.flatten(load_model(workdir / name)[1]) for name in ("base", FOLDER))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all("/attn/" in name for name in changed)


@exhaustive
def test_new_baseline_has_a_row_in_the_table(run):
    workdir, _, results = run
    assert list(results) == ["base", TITLE, "stage 1 alone", "dense curriculum", STAGE.title, "CLIP-MoE"]
    table = write_results({"": [results]}, workdir)
    for title in (TITLE, STAGE.title):
        assert 0 <= results[title]["image_to_text_r1"] <= 1
        assert any(line.startswith(title) for line in table.splitlines())


@exhaustive
def test_new_baseline_is_in_the_report(run):
    workdir, _, results = run
    write_results({"": [results]}, workdir)
    page = (workdir / "report.html").read_text()
    for title in (TITLE, STAGE.title):
        assert page.count(title) >= 2  # the table of results, and its phase of training


@exhaustive
def test_new_baseline_is_planned_with_the_steps_it_took(run):
    workdir, config, _ = run
    plan = make_plan(config, "h100", 1, 64)
    for row in (ROW, STAGE):
        [stage] = [stage for stage in plan.stages if stage.name == row.name]
        steps = json.loads((workdir / row.folder / "done.json").read_text())["measured"]["num_steps"]
        assert stage.num_pairs == steps * config.mcl.batch_size
        assert row.name in format_plan(plan)


def test_new_stage_goes_by_its_name(monkeypatch):
    monkeypatch.setattr(recipes, "STAGES", (*recipes.STAGES, STAGE))
    names = runner.stage_names(config_of("direct_ft"))
    assert names[names.index("router") + 1 :] == ["polish", "baselines", "evaluate"]


@exhaustive
def test_new_baseline_is_not_made_twice_and_resumes(run):
    workdir, config, results = run
    before = (workdir / "metrics.jsonl").read_text()
    assert runner.run_variants(config, workdir)[""] == [results]
    assert (workdir / "metrics.jsonl").read_text() == before
    params = load_model(workdir / FOLDER)[1]
    (workdir / FOLDER).rmtree()
    runner.run_variants(config, workdir)
    again = load_model(workdir / FOLDER)[1]
    for name, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(again)[name])


@exhaustive
def test_new_baseline_is_exported_with_its_scores(run, tmp_path):
    workdir, *_ = run
    out = tmp_path / "exported"
    convert.convert(str(workdir / FOLDER), "huggingface", str(out))
    assert TITLE in (out / "README.md").read_text()  # its evaluation beside the others'


def test_recipe_made_from_a_baseline_needs_it_in_the_config():
    rows = {row.name: row for row in recipes.BASELINES}
    made_from = dataclasses.replace(ROW, name="twice", experts=lambda config: ("base", "direct_ft"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "BASELINES", (*rows.values(), made_from))
        with pytest.raises(ValueError, match="'twice' is made from 'direct_ft': add it"):
            recipes.check_baselines(config_of("twice"))
        recipes.check_baselines(config_of("twice", "direct_ft"))


def config_of(*baselines: str):
    config = tiny_config()
    config.baselines = baselines
    return config
