"""The command embed: killed and started again, what it says, what it finds, and its errors."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from etils import epath
from killing import KILLING
from PIL import Image

import clipmoe_jax
from clipmoe_jax import embed
from clipmoe_jax.core import trees
from clipmoe_jax.evaluation.search import Hit
from clipmoe_jax.interop.export import write_openclip
from clipmoe_jax.models.clip import abstract_params
from clipmoe_jax.models.model_folder import save_model

# Each line a command in a process of its own, all with the imports of one: at which part to be killed (0 is
# at none), and the arguments.
SCRIPT = (
    KILLING
    + """
from clipmoe_jax import embed
from clipmoe_jax.core import cli
from clipmoe_jax.evaluation import embedding

for line in sys.stdin.read().splitlines():
    part, *arguments = line.split("\\t")
    if not (child := os.fork()):
        kill_at(embedding, "_write_rows", int(part))
        sys.argv = ["embed", *arguments]
        embed._define_flags()
        cli.run(embed.main)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)
SENTENCES = ("a dog", "two cats", "a red car", "the sea")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The folder that the commands ran in, and what each wrote with its exit code."""
    folder, rng = tmp_path_factory.mktemp("embed"), np.random.default_rng(0)
    save_model(epath.Path(folder / "model"), trained.model.config, trained.params)
    save_model(epath.Path(folder / "other"), trained.dense, trained.dense_params[1])
    vision = dataclasses.replace(trained.dense, text=None)
    leaves, names = trees.flatten(trained.dense_params[0]), trees.flatten(abstract_params(vision))
    save_model(epath.Path(folder / "vision"), vision, trees.unflatten({name: leaves[name] for name in names}))
    (folder / "bare").mkdir()
    write_openclip(epath.Path(folder / "bare"), trained.dense, trained.dense_params[0])
    (folder / "bare" / "open_clip_config.json").unlink()
    (folder / "pairs").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), np.uint8)).save(folder / "pairs" / f"{i:02}.png")
        (folder / "pairs" / f"{i:02}.txt").write_text(SENTENCES[i % 4])
    (folder / "pairs" / "05.png").write_bytes(b"broken")
    source = [f"--source=folder:{folder}/pairs", "--num_parts=3", "--batch_size=8"]
    embed = [*source, "--max_bad_fraction=0.1"]
    commands = {
        "killed": (3, "model", "out", *embed),
        "resumed": (0, "model", "out", *embed),
        "whole": (0, "model", "whole", *embed),
        "again": (0, "model", "whole", *embed),
        "image": (0, "model", "out", f"--search_image={folder}/pairs/07.png", "--num_results=6"),
        "text": (0, "model", "out", "--search=a red car", "--num_results=2"),
        "other": (0, "other", "out", "--search=a red car"),
        "nothing": (0, "model", "none", "--search=a red car"),
        "both": (0, "model", "out", "--search=a red car", "--search_image=x.png"),
        "empty": (0, "model", "out", "--search= "),
        "no file": (0, "model", "early", *embed, "--search_image=nope.jpg"),
        "no text": (0, "vision", "early", *embed, "--search=a red car"),
        "bare": (0, "bare/open_clip_model.safetensors", "bare_out", *embed),
        "stopped": (0, "model", "left", *source, "--max_bad_fraction=0"),
        "finished": (0, "model", "left", *embed),
        "shown": (0, "model", "whole", "--search=a red car", "--num_results=2"),
        "moved": (0, "model", "whole", "--search=a red car", "--num_results=2", "--source=folder:/nowhere"),
    }
    lines = [
        "\t".join([str(part), f"--model={folder}/{model}", f"--out={folder}/{out}", *arguments])
        for part, model, out, *arguments in commands.values()
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="\n".join(lines),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    told = done.stdout.split("exit ")
    codes = [int(text.split("\n")[0]) for text in told[1:]]
    texts = [told[0], *(text.partition("\n")[2] for text in told[1:])]
    return folder, dict(zip(commands, zip(codes, texts, strict=False), strict=True))


def test_killed_and_resumed_it_leaves_the_same_files(run):
    folder, told = run
    assert told["killed"][0] == -9 and told["resumed"][0] == told["whole"][0] == 0
    out, whole = (
        {file.relative_to(folder / name): file.read_bytes() for file in (folder / name).rglob("*.*")}
        for name in ("out", "whole")
    )
    out = {name: content for name, content in out.items() if name.name != "search.png"}
    assert out == whole and len(whole) == 3 * 3 + 3
    model, features = told["whole"][1].splitlines()
    assert model == f"{folder}/model: CLIP-MoE (4 experts, 2 selected) of a run"
    assert features.startswith(f"{folder}/whole: features of 11 images and their captions; 1 bad record")
    assert "images/s on 8 device(s)" in features
    [bad] = (folder / "whole" / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(bad)["id"] == "05.png"


def test_what_a_bare_state_dict_does_not_say_is_told(run):
    _, told = run
    assert "(assumed, as the file does not say it: activation=quick_gelu, vision." in told["bare"][1]


def test_rate_is_left_out_where_nothing_was_encoded(run):
    _, told = run
    assert told["stopped"][0] == 1 and "1 of 12 records are bad" in told["stopped"][1]
    assert told["finished"][0] == 0 and told["finished"][1].endswith("; 1 bad records left out.\n")


def test_features_are_those_that_load_gives(run):
    folder, _ = run
    rows = pyarrow.parquet.read_table(folder / "out" / "metadata").to_pylist()
    assert [row["image_path"] for row in rows] == [f"{i:02}.png" for i in range(12) if i != 5]
    clip = clipmoe_jax.load(str(folder / "model"))
    images = [Image.open(folder / "pairs" / row["image_path"]) for row in rows]
    expected = {
        "img_emb": clip.encode_image(images, normalize=True),
        "text_emb": clip.encode_text([row["caption"] for row in rows], normalize=True),
    }
    for kind, features in expected.items():
        parts = [np.load(folder / "out" / kind / f"{kind}_{k}.npy") for k in range(3)]
        np.testing.assert_allclose(np.concatenate(parts), features, atol=2e-3)


def test_search_finds_the_nearest_and_shows_them(run):
    folder, told = run
    lines = told["image"][1].splitlines()
    assert lines[0] == "1.000  07.png  the sea" and len(lines) == 7
    similarities = [float(line[:5]) for line in lines[:-1]]
    assert similarities == sorted(similarities, reverse=True)
    assert lines[-1] == f"{folder}/out/search.png shows them."
    clip = clipmoe_jax.load(str(folder / "model"))
    query = np.asarray(clip.encode_text("a red car", normalize=True))[0]
    features = np.concatenate([np.load(folder / "out" / "img_emb" / f"img_emb_{k}.npy") for k in range(3)])
    rows = pyarrow.parquet.read_table(folder / "out" / "metadata").to_pylist()
    best = [rows[i]["image_path"] for i in np.argsort(-(features.astype("f4") @ query))[:2]]
    assert [line.split("  ")[1] for line in told["text"][1].splitlines()[:2]] == best
    sheet = Image.open(folder / "out" / "search.png").convert("RGB")
    assert sheet.size == (2 * 208 + 8, 228 + 8)
    first = Image.open(folder / "pairs" / best[0]).resize((160, 200), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(sheet)[8:208, 28:188], np.asarray(first))


def test_images_that_have_moved_are_listed_without_a_sheet(run):
    folder, told = run
    *lines, last = told["moved"][1].splitlines()
    assert told["moved"][0] == 0 and lines == told["shown"][1].splitlines()[:2]
    assert last == (
        f"{folder}/whole/search.png is left out: source folder:/nowhere does not exist; "
        "--source= names where the images are now."
    )
    assert not (folder / "whole" / "search.png").exists()  # which "shown" wrote


def test_query_is_checked_before_images_are_encoded(run):
    folder, _ = run
    assert not list(folder.glob("early*"))


def test_caption_that_is_the_name_of_the_file_is_left_out():
    assert embed._line(Hit(0.5, "a/014.jpg", "014", 0)) == "0.500  a/014.jpg"
    assert embed._line(Hit(0.5, "a/014.jpg", "a dog", 0)) == "0.500  a/014.jpg  a dog"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("again", "{folder}/whole exists already: delete it or choose another folder"),
        ("other", "{folder}/out has the features of another model than {folder}/other: give that one"),
        ("nothing", "{folder}/none holds no features: name what to encode, --source=KIND:PATH"),
        ("both", "--search and --search_image are two queries: give one"),
        ("empty", "--search is empty: say what to search for, or leave it out"),
        ("no file", "--search_image=nope.jpg does not exist: give an image file"),
        (
            "no text",
            "the model is a dense CLIP vision tower of a run, which takes no text: give --search_image=FILE",
        ),
    ],
)
def test_errors_are_one_line(run, name, message):
    folder, told = run
    code, text = told[name]
    if name == "again":  # which knows its model before it fails
        text = text.partition("\n")[2]
    assert (code, text) == (1, f"error: {message.format(folder=folder)}\n")
