"""The whole pipeline at reduced size: the demo, and a user's own checkpoint and images through the same
main."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image
from test_configs import get_config

import clipmoe_jax
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import ImageFolder
from clipmoe_jax.dmu import runner
from clipmoe_jax.interop import released
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.reporting.text_tables import format_differences, format_evaluations, format_table

ROOT = pathlib.Path(__file__).parents[2]
TINY = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2),
    text=TextConfig(context_length=77, width=64, num_layers=1),
)
ONE_DEVICE = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}  # as a laptop has it
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "gray": (120, 120, 120)}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(workdir, what the command printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "demo"
    command = [
        sys.executable,
        "-m",
        "clipmoe_jax.main",
        "--config=configs/demo.py:small",
        f"--workdir={workdir}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_demo_prints_a_row_for_each_model(demo):
    rows = [
        "base",
        "direct fine-tuning, one stage's steps",
        "direct fine-tuning, same total pairs",
        "sparse upcycling",
        "base + FT MoE",
        "stage 1 alone",
        "stage 2 alone",
        "stage 3 alone",
        "feature ensemble",
        "CLIP-MoE",
    ]
    lines = demo[1].splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "i2t R@1" in line) + 1 :]
    assert [line.split("  ")[0] for line in table[: len(rows)]] == rows
    results = json.loads((demo[0] / "eval" / "results.json").read_text())
    assert list(results) == rows
    assert "R@k: per cent of queries" in demo[1]


def test_demo_numbers_are_those_of_the_saved_models(demo):
    """The printed row of CLIP-MoE, computed again from its params folder through the public API."""
    workdir, _ = demo
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


def test_experts_are_the_base_and_the_stages(demo):
    base, *stages = (
        clipmoe_jax.load(str(demo[0] / name))
        for name in ("base", "stage_1/params", "stage_2/params", "stage_3/params")
    )
    moe = clipmoe_jax.load(str(demo[0] / "moe" / "params"))
    for e, dense in enumerate([base, *stages]):
        for block in ("resblocks_0", "resblocks_1"):
            np.testing.assert_array_equal(
                moe.params["text"][block]["moe"]["c_fc"]["kernel"][e],
                dense.params["text"][block]["mlp"]["c_fc"]["kernel"],
            )
    np.testing.assert_array_equal(moe.params["visual"]["proj"], base.params["visual"]["proj"])


def test_an_expert_alone_is_evaluated_as_its_stage_was(demo):
    """By the command on the CLIP-MoE: the same numbers as those of the dense models of the stages."""
    workdir, _ = demo
    line = f"retrieval:{workdir / 'data' / 'test'}"
    out = workdir.parent / "experts.json"
    subprocess.run(
        [sys.executable, "-m", "clipmoe_jax.evaluate", f"--model={workdir / 'moe' / 'params'}", "--experts"]
        + [f"--data={line}", f"--out={out}", "--batch_size=500"],
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


def test_the_eval_folder_has_what_a_report_shows(demo):
    folder = demo[0] / "eval"
    routing, cost, experts = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("routing", "cost", "experts")
    )
    for tower in ("visual", "text"):
        np.testing.assert_allclose(np.sum(routing[tower]["load"], axis=1), 1, rtol=1e-6)
    changed = json.loads((folder / "routing_change.json").read_text())
    for tower in ("visual", "text"):  # training the routers did something, in every block
        assert len(changed[tower]) == 2 and all(0 < share < 1 for share in changed[tower])
    assert 0 < experts["diversity"] < 1.2
    assert cost["base"]["active_parameters"] < cost["CLIP-MoE"]["active_parameters"]
    assert np.load(folder / "heat_maps.npz")["visual_experts"].shape == (8, 2, 2, 2)
    assert set(json.loads((folder / "neighbours.json").read_text())) == {"clip_moe_right", "base_right"}


def test_a_model_is_evaluated_when_its_stage_is_done(demo):
    lines = demo[1].splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in (
        "base: trains", "base: R@1", "mcl_1: trains", "stage 1 alone: R@1", "mcl_2: trains", "CLIP-MoE: R@1"
    )]  # fmt: skip
    assert places == sorted(places)


def test_changed_config_is_refused_by_field(demo):
    config = get_config("demo", "small")
    config.router.num_steps = 25
    with pytest.raises(
        ValueError, match=r"moe/params was made with router\.num_steps=24, the config says 25"
    ):
        runner.run_variants(config, epath.Path(demo[0]))


def test_stage_without_its_inputs_says_which_makes_them(tmp_path):
    config = get_config("demo", "small")
    with pytest.raises(FileNotFoundError, match="data/train does not exist yet: stage data makes it"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_1")
    runner.run_variants(config, epath.Path(tmp_path), "data")
    with pytest.raises(FileNotFoundError, match="base does not exist yet: stage base makes it"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_1")
    with pytest.raises(ValueError, match="'embed_4' is not a stage of this config: choose one of data, base"):
        runner.run_variants(config, epath.Path(tmp_path), "embed_4")


def test_several_seeds_in_one_table(demo):
    results = json.loads((demo[0] / "eval" / "results.json").read_text())
    better = json.loads(json.dumps(results))
    better["CLIP-MoE"]["image_to_text_r1"] = results["CLIP-MoE"]["image_to_text_r1"] + 0.02
    mean = 100 * results["CLIP-MoE"]["image_to_text_r1"] + 1
    row = next(line for line in format_table([results, better]).splitlines() if line.startswith("CLIP-MoE"))
    assert f"{mean:.1f} ± 1.4" in row  # two values 2 apart: standard deviation sqrt(2)
    first, second = (
        100 * (r["CLIP-MoE"]["image_to_text_r1"] - r["base"]["image_to_text_r1"]) for r in (results, better)
    )
    lines = format_differences([results, better]).splitlines()
    row = next(line for line in lines if line.startswith("base  "))
    assert [*map(float, re.findall(r"(\S+) / ", row)[:3])] == pytest.approx(
        [(first + second) / 2, first, second], abs=0.051
    )


@pytest.fixture(scope="module")
def users_files(tmp_path_factory):
    """A released-code state dict and a folder of captioned images, several captions each."""
    folder = tmp_path_factory.mktemp("user")
    params = Clip(TINY).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 77), jnp.int32))[
        "params"
    ]
    state = {name: torch.tensor(a) for name, a in released.export_state_dict(params).items()}
    torch.save(state, folder / "clip.pt")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(48):
        name, colour = list(COLOURS.items())[i % 4]
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.jpg")
        (folder / "images" / f"{i:03d}.txt").write_text(f"a {name} square, number {i}\nsomething {name}\n")
    prepare(ImageFolder(folder / "images"), str(folder / "prepared"))
    return folder


def users_config(folder):
    config = get_config("vit_b32", "runlocal")
    config.base.checkpoint = str(folder / "clip.pt")
    config.base.architecture = dataclasses.replace(
        TINY, text=dataclasses.replace(TINY.text, context_length=248)
    ).to_dict()
    config.data.train = config.data.test = str(folder / "prepared")
    config.data.train_split = config.data.test_split = "train"
    config.mcl.num_stages = 2
    config.moe.num_moe_layers = 1
    config.moe.dispatch, config.moe.capacity_factor = "capacity", 1.5
    config.router.balance = "released"
    config.loss.short_caption_weight, config.data.max_caption_tokens = 0.5, 12
    config.baselines = ("feature_ensemble",)
    config.evaluations = (f"retrieval:{folder / 'prepared'}?split=train[:20]",)
    return config


def test_a_users_checkpoint_and_images(users_files, tmp_path):
    """77 positions are stretched, only the last blocks become MoE, released balance, capacity dispatch, short
    captions; on eight devices that split the parameters."""
    config = users_config(users_files)
    config.mesh.fsdp = 4
    [results] = runner.run_variants(config, epath.Path(tmp_path))[""]
    assert list(results) == ["base", "stage 1 alone", "stage 2 alone", "feature ensemble", "CLIP-MoE"]
    clip = clipmoe_jax.load(str(tmp_path / "moe" / "params"))
    assert clip.config.text.context_length == 248 and clip.config.moe.num_experts == 3
    assert "mlp" in clip.params["visual"]["resblocks_0"] and "moe" in clip.params["visual"]["resblocks_1"]
    assert float(clip.params["logit_scale"]) == pytest.approx(np.log(100), rel=1e-6)
    (line,) = config.evaluations
    (folder,) = (tmp_path / "evaluated" / "base").glob("retrieval-*")
    made_from = json.loads((folder / "done.json").read_text())["inputs"]
    records = Records(config.data.train, "train[:20]")
    assert made_from["contents"] == {"path": records.fingerprint}  # other data there is noticed
    for title in ("base", "stage 1 alone", "CLIP-MoE"):
        # 20 images are easier to tell apart than 48.
        found = results[title]["evaluations"][line]
        assert found["image_to_text_r10"] >= results[title]["image_to_text_r10"]
    assert line in format_evaluations([results])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any(line["phase"] == "router" and line["balance_image"] > 1.5 for line in lines)  # about K = 2
    for line in lines:  # label smoothing and all
        parts = line["contrastive_loss"] + line["short_caption_loss"] + line.get("balance_loss", 0)
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def truncated_checkpoint(config, folder, tmp_path):
    (tmp_path / "cut.pt").write_bytes((folder / "clip.pt").read_bytes()[:1000])
    config.base.checkpoint = str(tmp_path / "cut.pt")


def other_architecture(config, folder, tmp_path):
    config.base.architecture.vision.num_layers = 3


def wrong_checkpoint(config, folder, tmp_path):
    config.base.checkpoint = "nowhere.pt"


def wrong_data(config, folder, tmp_path):
    config.data.train = "nowhere"


def other_head_width(config, folder, tmp_path):
    config.base.architecture.text.head_width = 32


def wrong_evaluation(config, folder, tmp_path):
    config.evaluations = ("mmvp:nowhere",)


def few_pairs(config, folder, tmp_path):
    config.mcl.batch_size = 64


def no_room_for_warm_up(config, folder, tmp_path):
    config.router.warmup_steps = 4


def mesh_of_another_size(config, folder, tmp_path):
    config.mesh.data = 3


def batch_not_divisible(config, folder, tmp_path):
    config.mcl.batch_size = 12


def experts_not_divisible(config, folder, tmp_path):
    config.mesh.expert = 8


def moe_as_base(config, folder, tmp_path):
    config.base.checkpoint = str(ROOT / "tests" / "golden" / "moe_all.pt")


BAD_RUNS = {
    "wrong checkpoint": (wrong_checkpoint, "base.checkpoint=nowhere.pt does not exist"),
    "wrong data": (wrong_data, "nowhere is not a prepared data set: make one with"),
    "wrong evaluation": (wrong_evaluation, "evaluation mmvp:nowhere: nowhere/Questions.csv does not exist"),
    "fewer pairs than a batch": (few_pairs, "mcl.batch_size=64 is more than the 48 training pairs"),
    "truncated checkpoint": (
        truncated_checkpoint,
        "cut.pt cannot be read as safetensors or as a PyTorch state dict",
    ),
    "another architecture": (other_architecture, "12 missing: visual/resblocks_2/attn/in_proj/bias"),
    "another head width": (other_head_width, "has text/head_width=64 and base.architecture says 32"),
    "warm-up too long": (no_room_for_warm_up, "warmup_steps=4 does not fit into 4 steps"),
    "mesh of another size": (mesh_of_another_size, "does not use the 8 devices"),
    "batch not divisible": (batch_not_divisible, "batch size 12 cannot be split over 8 devices"),
    "experts not divisible": (experts_not_divisible, r"^router: .* which mesh.expert=8 does not divide"),
    "an MoE as base": (moe_as_base, "the base must be a dense CLIP"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_input_is_named_with_the_fix(users_files, tmp_path, spoil, message):
    config = users_config(users_files)
    spoil(config, users_files, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runner.run_variants(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run" / "base").exists()  # before any training


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
