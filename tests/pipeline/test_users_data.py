"""A user's own checkpoint and images through the pipeline, and what is refused before any training."""

import contextlib
import dataclasses
import json
import pathlib

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from grids import exhaustive
from hub_cache import COMMIT, fill_cache
from PIL import Image
from test_configs import get_config

import clipmoe_jax
from clipmoe_jax.core import artifacts, sharding
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import ImageFolder
from clipmoe_jax.dmu import recipes, runner
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.training import make_model
from clipmoe_jax.interop import export, released
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import read_config, save_model
from clipmoe_jax.reporting.text_tables import format_evaluations

ROOT = pathlib.Path(__file__).parents[2]
TINY = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2),
    text=TextConfig(context_length=77, width=64, num_layers=1),
)
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "gray": (120, 120, 120)}


def tiny_params():
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 77), jnp.int32)
    return Clip(TINY).init(jax.random.key(0), images, tokens)["params"]


@pytest.fixture(scope="module")
def users_files(tmp_path_factory):
    """A released-code state dict and a folder of captioned images, several captions each."""
    folder = tmp_path_factory.mktemp("user")
    state = {name: torch.tensor(a) for name, a in released.export_state_dict(tiny_params()).items()}
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


@exhaustive
def test_run_from_a_users_checkpoint_and_images(users_files, tmp_path):
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
    assert made_from["contents of path"] == records.fingerprint  # other data there is noticed
    assert "contents of base.checkpoint" in made_from
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


def test_base_of_the_hub_has_the_activation_of_its_checkpoint(users_files, tmp_path, monkeypatch):
    """LAION's models have GELU, and the config of a variant says nothing. Other files may come into the
    cache."""
    config = users_config(users_files)
    export.write_openclip(epath.Path(tmp_path), dataclasses.replace(TINY, activation="gelu"), tiny_params())
    files = [tmp_path / name for name in ("open_clip_config.json", "open_clip_model.safetensors")]
    snapshot = fill_cache(tmp_path / "hub", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", *files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config.base.checkpoint = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    config.base.architecture.activation = get_config("vit_b32").base.architecture.activation
    for stage in ("base", "embed_1"):
        runner.run_variants(config, epath.Path(tmp_path / "run"), stage)
        (snapshot / "merges.txt").write_text("of another program")
    assert read_config(epath.Path(tmp_path / "run" / "base")).activation == "gelu"
    made_from = artifacts.done_field(epath.Path(tmp_path / "run" / "base"), "inputs")
    assert made_from["base.architecture.activation"] == "gelu"
    assert made_from["contents of base.checkpoint"] == COMMIT


def truncated_checkpoint(config, folder, tmp_path):
    (tmp_path / "cut.pt").write_bytes((folder / "clip.pt").read_bytes()[:1000])
    config.base.checkpoint = str(tmp_path / "cut.pt")


def other_architecture(config, folder, tmp_path):
    config.base.architecture.vision.num_layers, config.base.architecture.embed_dim = 3, 24


def vision_tower(config, folder, tmp_path):
    tower = ClipConfig(embed_dim=16, vision=TINY.vision, text=None)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(tower))
    save_model(epath.Path(tmp_path) / "tower", tower, params)
    config.base.checkpoint = str(tmp_path / "tower")


def wrong_checkpoint(config, folder, tmp_path):
    config.base.checkpoint = "nowhere.pt"


def wrong_data(config, folder, tmp_path):
    config.data.train = "nowhere"


def rewritten(config, folder, tmp_path, **tensors):
    """Sets some tensors of the checkpoint."""
    torch.save(torch.load(folder / "clip.pt") | tensors, tmp_path / "rewritten.pt")
    config.base.checkpoint = str(tmp_path / "rewritten.pt")


def other_head_width(config, folder, tmp_path):
    rewritten(
        config, folder, tmp_path, vocab_size=torch.tensor(49408)
    )  # as in OpenAI's files, with heads of 64
    config.base.architecture.text.head_width = 32


def damaged_checkpoint(config, folder, tmp_path):
    rewritten(config, folder, tmp_path, logit_scale=torch.tensor(torch.nan))


def wrong_evaluation(config, folder, tmp_path):
    config.evaluations = ("mmvp:nowhere",)


def few_pairs(config, folder, tmp_path):
    config.mcl.batch_size = 64


def many_clusters(config, folder, tmp_path):
    config.cluster.num_clusters = 49


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


def link_in_the_workdir(config, files, folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "file").write_text("keep")
    (folder / "run" / "moe").mkdir(parents=True)
    (folder / "run" / "moe" / "params.unfinished").symlink_to(folder / "mine")


BAD_RUNS = {
    "wrong checkpoint": (wrong_checkpoint, "nowhere.pt does not exist: .* or open_clip:MODEL/TAG"),
    "wrong data": (wrong_data, "nowhere is not a prepared data set: make one with"),
    "wrong evaluation": (wrong_evaluation, "evaluation mmvp:nowhere: nowhere/Questions.csv does not exist"),
    "fewer pairs than a batch": (few_pairs, "mcl.batch_size=64 is more than the 48 training pairs"),
    "more clusters than pairs": (many_clusters, "cluster.num_clusters=49 is more than the 48 training pairs"),
    "truncated checkpoint": (
        truncated_checkpoint,
        "cut.pt cannot be read as safetensors or as a PyTorch state dict",
    ),
    "another architecture": (
        other_architecture,
        "does not fit base.architecture: it has embed_dim=16, not 24; vision.num_layers=2, not 3: set these "
        "fields to what it has",
    ),
    "a tower alone": (vision_tower, "tower is a dense CLIP vision tower: a base must have both towers"),
    "another head width": (
        other_head_width,
        r"it has text.head_width=64, not 32: set these fields",
    ),
    "damaged checkpoint": (damaged_checkpoint, "rewritten.pt: logit_scale has NaN or infinite values"),
    "warm-up too long": (no_room_for_warm_up, "warmup_steps=4 does not fit into 4 steps"),
    "mesh of another size": (mesh_of_another_size, "does not use the 8 devices"),
    "batch not divisible": (batch_not_divisible, "batch size 12 cannot be split over 8 devices"),
    "experts not divisible": (experts_not_divisible, r"^router: .* which mesh.expert=8 does not divide"),
    "a link in the workdir": (
        link_in_the_workdir,
        "moe/params.unfinished is a link: delete it",
    ),
    "an MoE as base": (moe_as_base, "moe.num_moe_layers=1: the base is a CLIP-MoE of another kind"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_input_is_named_with_the_fix(users_files, tmp_path, spoil, message):
    config = users_config(users_files)
    spoil(config, users_files, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runner.run_variants(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run" / "base").exists()  # before any training


def test_a_bare_checkpoint_has_the_head_widths_of_the_config(users_files, tmp_path):
    config = users_config(users_files)
    config.base.architecture.text.head_width, config.base.architecture.vision.head_width = 32, 16
    with contextlib.closing(Metrics(epath.Path(tmp_path))) as metrics:
        run = Run(config, 0, epath.Path(tmp_path), sharding.make_mesh(), metrics, {})
        make_model(run, recipes.recipes(config)["base"])
    base = read_config(epath.Path(tmp_path / "base"))
    assert (base.text.head_width, base.vision.head_width) == (32, 16)


@pytest.mark.parametrize(
    ("line", "evaluations", "is_told"),
    [
        ("", (), True),
        ("", ("zero_shot:data.retention",), False),
        ("retrieval:data.retention?split=train", (), False),
        ("retrieval:data.test", (), True),
    ],
)
def test_data_that_no_evaluation_measures_on_is_told(
    users_files, tmp_path, capsys, line, evaluations, is_told
):
    """And before it is prepared."""
    config = users_config(users_files)
    config.data.retention, config.retention, config.evaluations = "glyphs:test?pairs=16", line, evaluations
    runner.run_variants(config, epath.Path(tmp_path), runner.DATA_STAGE)
    first = capsys.readouterr().out.splitlines()[0]
    warning = "warning: data.retention=glyphs:test?pairs=16 measures nothing: set retention, such as "
    assert first.startswith(warning) == is_told
