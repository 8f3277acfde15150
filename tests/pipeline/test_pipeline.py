"""A whole run by the command: its table, what the table's numbers are of, and what each baseline trains."""

import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from grids import grid
from ml_collections import ConfigDict
from PIL import Image
from test_configs import get_config
from tiny_config import get_config as tiny_config

import clipmoe_jax
from clipmoe_jax.core import trees
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu import recipes, results, runner
from clipmoe_jax.evaluate import evaluate
from clipmoe_jax.evaluation.evaluations import parse_evaluation
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.model_folder import load_model
from clipmoe_jax.reporting.text_tables import format_differences, format_table

ROOT = pathlib.Path(__file__).parents[2]
ONE_DEVICE = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
AS_A_USER_HAS_IT = ONE_DEVICE | {"XLA_FLAGS": ""}
TINY, EVERY = "tests/pipeline/tiny_config.py:whole", "tests/pipeline/tiny_config.py:baselines"
DEMO = "configs/demo.py:small"
ROWS = {
    TINY: [
        "base",
        "Long-CLIP's recipe",
        "CLIP-UP's recipe",
        "dense, distilled from CLIP-MoE",
        "stage 1 alone",
        "stage 2 alone",
        "dense curriculum",
        "feature ensemble",
        "CLIP-MoE",
    ],
    EVERY: [
        "base",
        "direct fine-tuning, one stage's steps",
        "direct fine-tuning, same total pairs",
        "direct fine-tuning, rehearsed, same total pairs",
        "full fine-tuning, same total pairs",
        "full fine-tuning, rehearsed, same total pairs",
        "LoRA, same total pairs",
        "LoRA, rehearsed, same total pairs",
        "dense curriculum, same total pairs",
        "dense curriculum, rehearsed, same total pairs",
        "dense curriculum, distilled, same total pairs",
        "dense curriculum, rehearsed throughout, same total pairs",
        "sparse upcycling, same total pairs",
        "Drop-Upcycling, same total pairs",
        "full fine-tuning, one stage's steps",
        "Long-CLIP's recipe",
        "sparse upcycling",
        "Drop-Upcycling",
        "CLIP-UP's recipe",
        "base + FT MoE",
        "CLIP-MoE as published",
        "dense, distilled from CLIP-MoE",
        "stage 1 alone",
        "stage 2 alone",
        "dense curriculum",
        "feature ensemble",
        "feature ensemble of base and dense curriculum",
        "feature ensemble of base and rehearsed curriculum",
        "CLIP-MoE",
    ],
    DEMO: [
        "base",
        "direct fine-tuning, same total pairs",
        "dense curriculum, distilled, same total pairs",
        "stage 1 alone",
        "stage 2 alone",
        "stage 3 alone",
        "dense curriculum",
        "feature ensemble of base and dense curriculum",
        "CLIP-MoE",
    ],
}


class Finished(NamedTuple):
    config_file: str
    config: ConfigDict
    workdir: pathlib.Path
    printed: str


RUNS = grid(
    pytest.param(TINY, id="tiny"),
    rest=[pytest.param(EVERY, id="every baseline"), pytest.param(DEMO, id="demo")],
)


@pytest.fixture(scope="module", params=RUNS)
def finished(request, tmp_path_factory):
    """A run by the command."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "clipmoe_jax.main", f"--config={request.param}", f"--workdir={workdir}"],
        cwd=ROOT,
        env=AS_A_USER_HAS_IT if request.param == DEMO else ONE_DEVICE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    argument = request.param.partition(":")[2]
    config = get_config("demo", argument) if request.param == DEMO else tiny_config(argument)
    return Finished(request.param, config, workdir, done.stdout)


def test_command_prints_a_row_for_each_model(finished):
    rows, lines = ROWS[finished.config_file], finished.printed.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "i2t R@1" in line) + 1 :]
    assert [line.split("  ")[0] for line in table[: len(rows)]] == rows
    results = json.loads((finished.workdir / "eval" / "results.json").read_text())
    assert list(results) == rows
    assert "R@k: per cent of queries" in finished.printed


def test_old_is_what_the_line_of_retention_measures(finished):
    results = json.loads((finished.workdir / "eval" / "results.json").read_text())
    with_old = {title for title, numbers in results.items() if "retention" in numbers}
    assert with_old == ({*results} if finished.config.retention else set())
    for title in with_old:
        line = results[title]["evaluations"][finished.config.retention]
        assert results[title]["retention"] == line["top1"]
    assert bool(with_old) == ("Old: what the base knew" in finished.printed)


def test_numbers_are_those_of_the_saved_models(finished):
    """The printed row of CLIP-MoE, computed again from its params folder through the public API."""
    workdir = finished.workdir
    results = json.loads((workdir / "eval" / "results.json").read_text())
    clip = clipmoe_jax.load(str(workdir / "moe" / "params"))
    test = Records(workdir / "data" / "test", "test")
    pairs = [test[i] for i in range(len(test))]
    images = [Image.open(io.BytesIO(pair["image"])) for pair in pairs]
    captions = [pair["captions"][0] for pair in pairs]
    scores = np.asarray(
        clip.encode_image(images, normalize=True) @ clip.encode_text(captions, normalize=True).T
    )
    right = np.diagonal(scores)
    image_to_text = np.mean((scores >= right[:, None]).sum(axis=1) == 1)
    text_to_image = np.mean((scores >= right[None, :]).sum(axis=0) == 1)
    # One query more or less: two programs round differently.
    assert results["CLIP-MoE"]["image_to_text_r1"] == pytest.approx(image_to_text, abs=1.5 / len(test))
    assert results["CLIP-MoE"]["text_to_image_r1"] == pytest.approx(text_to_image, abs=1.5 / len(test))
    assert results["CLIP-MoE"]["parameters"] > results["CLIP-MoE"]["active_parameters"]


def test_blend_is_the_mean_of_two_models_weight_by_weight(finished):
    if not finished.config.blends:
        return
    workdir, line = finished.workdir, f"retrieval:{finished.workdir / 'data' / 'test'}"
    results = json.loads((workdir / "eval" / "results.json").read_text())
    blends = results["dense curriculum"]["blends"]
    assert len(blends) == 19 and all({"image_to_text_r1", "retention"} <= n.keys() for n in blends.values())
    assert {title for title, numbers in results.items() if "blends" in numbers} == {"dense curriculum"}
    base, model = (read_model(str(workdir / folder)) for folder in ("base", "dense/params"))
    mean = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, base.params, model.params)
    numbers = evaluate(model._replace(params=mean), [parse_evaluation(line)])["model"][line]
    for metric in ("image_to_text_r1", "text_to_image_r1"):
        assert blends["0.50"][metric] == pytest.approx(numbers[metric], abs=1.5 / 8)


def test_blends_go_on_share_by_share(finished, monkeypatch):
    if not finished.config.blends:
        return
    [folder] = (finished.workdir / "evaluated" / "dense_curriculum").glob("blends-*")
    expected = json.loads((folder / "results.json").read_text())
    (unfinished := folder.with_name(f"{folder.name}.unfinished")).mkdir()
    shutil.copy(folder / "0.95.json", unfinished)
    made_from = json.loads((folder / "done.json").read_text())["inputs"]
    (unfinished / "inputs.json").write_text(json.dumps(made_from))
    shutil.rmtree(folder)
    calls, measure = [], results._both_axes
    monkeypatch.setattr(results, "_both_axes", lambda *args: calls.append(args) or measure(*args))
    runner.run_variants(finished.config, epath.Path(finished.workdir), "evaluate")
    assert len(calls) == 18
    for share, numbers in json.loads((folder / "results.json").read_text()).items():
        assert numbers == pytest.approx(expected[share], abs=1.5 / 8)


def test_cost_is_that_of_the_model_and_all_it_is_made_from(finished):
    """By hand for the tiny run: 7 steps of 16 pairs a phase."""
    results = json.loads((finished.workdir / "eval" / "results.json").read_text())
    pairs = {title: numbers["pairs"] for title, numbers in results.items()}
    flops = [results[title]["flops"] for title in ("base", "stage 1 alone", "dense curriculum", "CLIP-MoE")]
    assert flops[0] == 0 and np.all(np.diff(flops) > 0)
    if finished.config_file == DEMO:
        return
    # Stage 2 starts from the base, and has its clusters from stage 1.
    titles = ("base", "stage 1 alone", "stage 2 alone", "dense curriculum", "CLIP-MoE")
    assert [pairs[title] for title in titles] == [0, 112, 224, 336, 448]


def test_experts_are_the_models_that_the_config_names(finished):
    """By default the base and the stages."""
    folders = ["base", *(f"stage_{i + 1}/params" for i in range(finished.config.mcl.num_stages))]
    if finished.config.moe.experts:
        first_three = (
            ("base", "last_stage", "base") if finished.config_file == DEMO else ("base", "base", "last_stage")
        )
        assert finished.config.moe.experts == (*first_three, "consolidation")
        named = {"base": "base", "last_stage": folders[-1], "consolidation": "dense/params"}
        folders = [named[name] for name in finished.config.moe.experts]
    models = [clipmoe_jax.load(str(finished.workdir / folder)) for folder in folders]
    base, moe = models[0], clipmoe_jax.load(str(finished.workdir / "moe" / "params"))
    for e, dense in enumerate(models):
        for block in range(finished.config.base.architecture.text.num_layers):
            np.testing.assert_array_equal(
                moe.params["text"][f"resblocks_{block}"]["moe"]["c_fc"]["kernel"][e],
                dense.params["text"][f"resblocks_{block}"]["mlp"]["c_fc"]["kernel"],
            )
    np.testing.assert_array_equal(moe.params["visual"]["proj"], base.params["visual"]["proj"])


def test_expert_alone_scores_as_its_stage_did(finished):
    """By the command on the CLIP-MoE: the same numbers as those of the dense models of the stages."""
    workdir, config = finished.workdir, finished.config
    line = f"retrieval:{workdir / 'data' / 'test'}"
    out = workdir.parent / "experts.json"
    subprocess.run(
        [sys.executable, "-m", "clipmoe_jax.evaluate", f"--model={workdir / 'moe' / 'params'}", "--experts"]
        + [f"--data={line}", f"--out={out}", f"--batch_size={config.embed.batch_size}"],
        check=True,
        env=ONE_DEVICE,
        stdout=subprocess.PIPE,
    )
    found, results = (json.loads(path.read_text()) for path in (out, workdir / "eval" / "results.json"))
    for numbers in results.values():
        if numbers["expert"] is not None:
            alone = found[f"expert {numbers['expert']}"][line]
            assert {name: numbers[name] for name in alone} == alone
    assert found["model"][line] == {name: results["CLIP-MoE"][name] for name in found["model"][line]}


def test_eval_folder_has_what_a_report_shows(finished):
    folder, num_layers = finished.workdir / "eval", finished.config.base.architecture.vision.num_layers
    routing, cost, experts = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("routing", "cost", "experts")
    )
    for tower in ("visual", "text"):
        np.testing.assert_allclose(np.sum(routing[tower]["load"], axis=1), 1, rtol=1e-6)
    changed = json.loads((folder / "routing_change.json").read_text())
    for tower in ("visual", "text"):  # training the routers did something, in every block
        assert len(changed[tower]) == num_layers and all(0 < share <= 1 for share in changed[tower])
    assert 0 < experts["diversity"] < 1.2
    assert cost["base"]["active_parameters"] < cost["CLIP-MoE"]["active_parameters"]
    assert np.load(folder / "heat_maps.npz")["visual_experts"].shape == (8, num_layers, 2, 2)
    assert set(json.loads((folder / "neighbours.json").read_text())) == {"clip_moe_right", "base_right"}


def test_each_model_is_evaluated_when_its_stage_is_done(finished):
    """And told in one line each: what was done, how long it took, and what came out."""
    before_table, _, _ = finished.printed.partition("i2t R@1")
    lines = [line for line in before_table.splitlines() if "pairs encoded" not in line and "R@1" in line]
    score, time = r"\d+\.\d", r"\d+ (?:s|min)"
    told = [
        re.fullmatch(
            rf"(\w+): \d+ steps in {time}( \({time} compiling\))?, loss {score}\d\d, "
            rf"R@1 {score} i2t {score} t2i, attributes mean {score}, old {score}",
            line,
        )
        for line in lines
    ]
    names = [match[1] for match in told if match]
    trained = [recipe.name for recipe in recipes.table_rows(finished.config) if recipe.group != "ensemble"]
    assert sorted(names) == sorted(trained) and len(names) == len(lines)
    assert [name for name in names if name in ("base", "mcl_1", "mcl_2")] == ["base", "mcl_1", "mcl_2"]
    assert re.search(rf"^evaluate: \d+ models, routing, .* in {time}$", before_table, re.M)


def test_changed_config_is_refused_by_field(finished):
    config = finished.config.copy_and_resolve_references()
    was = config.router.num_steps
    config.router.num_steps += 1
    with pytest.raises(
        ValueError, match=rf"moe/params was made with router\.num_steps={was}, the config says {was + 1}"
    ):
        runner.run_variants(config, epath.Path(finished.workdir))


def test_all_that_a_change_touches_is_named_before_anything_runs(finished, tmp_path):
    """And with that deleted the run goes on: no other artifact refuses later."""
    workdir = shutil.copytree(
        finished.workdir, tmp_path / "run", ignore=shutil.ignore_patterns("tensorboard")
    )
    config = finished.config.copy_and_resolve_references()
    config.router.learning_rate *= 2
    shutil.rmtree(workdir / "moe" / "params")
    with pytest.raises(ValueError, match="was made with router.learning_rate=.*: set it back, ") as refused:
        runner.run_variants(config, epath.Path(workdir))
    assert not (workdir / "moe" / "params").exists()
    _, _, named = str(refused.value).partition("or delete what was made otherwise: ")
    changed = {str(pathlib.Path(path).relative_to(workdir)) for path in named.split()}
    assert {"evaluated/CLIP-MoE", "eval"} <= changed
    kept = ("base/", "stage", "moe", "evaluated/stage")
    assert not [name for name in changed if f"{name}/".startswith(kept)]
    if finished.config_file != DEMO:  # which takes minutes
        for path in named.split():
            shutil.rmtree(path)
        runner.run_variants(config, epath.Path(workdir))


def test_a_stage_more_is_refused_before_it_is_trained(finished):
    config = finished.config.copy_and_resolve_references()
    config.mcl.num_stages += 1
    last = finished.workdir / f"stage_{config.mcl.num_stages}"
    with pytest.raises(ValueError, match=r"mcl\.num_stages=\d, the config says \d: set it back"):
        runner.run_variants(config, epath.Path(finished.workdir))
    assert not last.exists()


def test_stage_without_its_inputs_names_the_stage_that_makes_them(tmp_path):
    config = tiny_config()
    with pytest.raises(FileNotFoundError, match="data/train does not exist yet: stage data makes it"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_1")
    runner.run_variants(config, epath.Path(tmp_path), "data")
    with pytest.raises(FileNotFoundError, match="base does not exist yet: stage base makes it"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_1")
    with pytest.raises(ValueError, match="'embed_4' is not a stage of this config: choose one of data, base"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_4")


def test_table_of_several_seeds_has_means_and_paired_differences(finished):
    results = json.loads((finished.workdir / "eval" / "results.json").read_text())
    better = json.loads(json.dumps(results))
    better["CLIP-MoE"]["image_to_text_r1"] = results["CLIP-MoE"]["image_to_text_r1"] + 0.02
    mean = 100 * results["CLIP-MoE"]["image_to_text_r1"] + 1
    row = next(line for line in format_table([results, better]).splitlines() if line.startswith("CLIP-MoE  "))
    assert f"{mean:.1f} ± 1.4" in row  # two values 2 apart: standard deviation sqrt(2)
    first, second = (
        100 * (r["CLIP-MoE"]["image_to_text_r1"] - r["base"]["image_to_text_r1"]) for r in (results, better)
    )
    lines = format_differences([results, better]).splitlines()
    row = next(line for line in lines if line.startswith("base  "))
    assert [*map(float, re.findall(r"(\S+) / ", row)[:3])] == pytest.approx(
        [(first + second) / 2, first, second], abs=0.051
    )


# Baselines: what they train, from the base, by which losses.

FFN, ATTENTION = "visual/resblocks_0/mlp/c_fc/kernel", "visual/resblocks_0/attn/out_proj/kernel"
EXPERTS, OF_ATTENTION = "visual/resblocks_0/moe/c_fc/kernel", "visual/resblocks_0/moe/out_proj/kernel"
has_baselines = pytest.mark.parametrize("finished", RUNS[:2], indirect=True)


@pytest.fixture
def leaves(finished):
    """name of a model's folder -> its leaves"""
    return lambda name: trees.flatten(load_model(finished.workdir / name)[1])


TRAINED = {  # name: leaves that change, leaves that stay
    "full_ft": ([FFN, ATTENTION, "text/token_embedding/embedding"], []),
    "long_clip": ([FFN, ATTENTION, "text/token_embedding/embedding"], []),
    "drop_upcycling": ([], [ATTENTION, "logit_scale"]),
    "clip_up": ([ATTENTION, "text/token_embedding/embedding"], []),
    "distilled": ([FFN, ATTENTION, "text/token_embedding/embedding"], ["logit_scale"]),
}
PARTS = {  # name: the parts of its loss
    "full_ft": {"contrastive_loss"},
    "long_clip": {"contrastive_loss", "short_caption_loss"},
    "drop_upcycling": {"contrastive_loss", "balance_loss"},
    "clip_up": {"contrastive_loss", "balance_loss", "router_z_loss"},
}
DRAWN_ANEW = {"drop_upcycling": 0.5, "clip_up": 0}  # name: share of each expert's hidden activations


@has_baselines
def test_baseline_trains_what_its_recipe_says(finished, leaves):
    before = leaves("base")
    for name in TRAINED.keys() & finished.config.baselines:
        after = leaves(f"baselines/{name}")
        changed, same = ([leaf for leaf in part if leaf in after] for part in TRAINED[name])
        assert changed or same
        assert [leaf for leaf in changed if np.array_equal(before[leaf], after[leaf])] == []
        assert [leaf for leaf in same if not np.array_equal(before[leaf], after[leaf])] == []
        assert (ATTENTION in after) != (OF_ATTENTION in after)  # experts have it, or blocks
        for leaf in {EXPERTS, OF_ATTENTION} & after.keys():
            for e, expert in enumerate(after[leaf]):
                assert not np.array_equal(expert, leaves(f"baselines/{name}_upcycled")[leaf][e])


@has_baselines
def test_epochs_are_counted_from_phase_to_phase(finished):
    """So that captions of a record go on taking turns: 64 pairs are 4 batches, 7 steps two epochs."""

    def epochs(name):
        return json.loads((finished.workdir / name / "done.json").read_text())["measured"]["epochs_of_train"]

    assert [epochs(f"{name}/params") for name in ("stage_1", "stage_2", "dense", "moe")] == [2, 4, 6, 8]
    assert [epochs(f"baselines/{name}") for name in ("long_clip", "clip_up")] == [2, 2]


@has_baselines
def test_half_of_the_hidden_units_of_drop_upcycling_were_drawn_anew(finished, leaves):
    dense = leaves("base")[FFN]
    for name in DRAWN_ANEW.keys() & finished.config.baselines:
        for expert in leaves(f"baselines/{name}_upcycled")[EXPERTS]:
            assert np.mean((expert != dense).any(axis=0)) == DRAWN_ANEW[name]


@has_baselines
def test_loss_of_a_baseline_is_the_sum_of_its_recipes_parts(finished):
    """And no other parts are there."""
    metrics = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").read_text().splitlines()]

    def lines(name):
        return [line for line in metrics if line["phase"] == name]

    for name in PARTS.keys() & finished.config.baselines:
        assert len(lines(name)) == 7  # log_every = 1
        for line in lines(name):
            assert {key for key in line if key.endswith("_loss")} == PARTS[name]
            assert line["loss"] == pytest.approx(sum(line[key] for key in PARTS[name]), rel=1e-5)
    # Routers of four experts start near 0, where logsumexp is ln 4 for each token: 1e-3 of its square.
    assert lines("clip_up")[0]["router_z_loss"] == pytest.approx(1e-3 * np.log(4) ** 2, rel=0.2)


CLI_ERRORS = {
    "no such field": ("--config.mcl.learningrate=1", "learningrate"),
    "K > E": ("--config.moe.num_selected_experts=5", "moe.num_selected_experts=5 must lie between 1 and"),
}


@pytest.mark.parametrize(("flag", "message"), CLI_ERRORS.values(), ids=CLI_ERRORS)
def test_command_line_errors_are_one_line(tmp_path, flag, message):
    command = [
        sys.executable,
        "-m",
        "clipmoe_jax.main",
        "--config=configs/demo.py",
        f"--workdir={tmp_path}",
        flag,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
