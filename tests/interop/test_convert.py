"""The command `convert`: whole folders or none, what is in them, and what it says."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import torch
from cards import code_of
from etils import epath
from grids import exhaustive, grid, quick
from PIL import Image
from transformers import AutoProcessor, CLIPModel, pipeline

import clipmoe_jax
from clipmoe_jax.convert import WRITERS, convert
from clipmoe_jax.core import artifacts, trees
from clipmoe_jax.data import preprocess
from clipmoe_jax.data.tokenizer import Tokenizer, backend
from clipmoe_jax.interop import export
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.interop.tensor_files import open_tensors
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.inputs import END_ID
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import MoeConfig

REPOSITORY = pathlib.Path(__file__).parents[2]


def save_random_model(folder, **fields):
    """A run's model folder with CLIP's own vocabulary and 77 or 248 positions."""
    config = ClipConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=32, patch_size=8, width=64, num_layers=2),
        text=TextConfig(context_length=fields.pop("context_length", 77), width=64, num_layers=2),
        **fields,
    )
    rng = np.random.default_rng(0)
    abstract = abstract_params(config)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), abstract)
    save_model(folder, config, params)
    return config, params


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "params"
    save_random_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def exported(dense_folder, tmp_path_factory):
    """The dense model as transformers reads it."""
    out = tmp_path_factory.mktemp("exported") / "clip"
    convert(dense_folder, "huggingface", str(out))
    return out


@pytest.mark.parametrize("name", ["dense", "moe_all", "moe_last1"])
@pytest.mark.parametrize("to", ["huggingface", "clipmoe"])
def test_import_of_export_is_the_identity(golden_dir, tmp_path, name, to):
    """The same architecture, the same arrays, and each in the dtype it had: here float16."""
    source = str(golden_dir / f"{name}.pt")
    selected = None if name == "dense" else 3  # which a .pt does not say and our exports do
    convert(source, to, str(tmp_path / "out"), num_selected_experts=selected)
    expected = read_model(source, num_selected_experts=selected, dtype=None)
    found = read_model(str(tmp_path / "out"), dtype=None)
    assert found.config == expected.config
    chex.assert_trees_all_equal(found.params, expected.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, expected.params)
    assert {leaf.dtype for leaf in trees.flatten(found.params).values()} == {np.dtype(np.float16)}


def test_openais_mixed_precision_stays_as_it_is(golden_dir, tmp_path):
    """OpenAI's own files hold matrices in float16 and LayerNorms and embeddings in float32."""
    state = torch.load(golden_dir / "dense.pt", weights_only=True)
    mixed = {n: t.float() if "ln_" in n or "embedding" in n else t for n, t in state.items()}
    torch.save(mixed, tmp_path / "mixed.pt")
    convert(str(tmp_path / "mixed.pt"), "clipmoe", str(tmp_path / "out"))
    written = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert {n: t.dtype for n, t in written.items()} == {n: t.dtype for n, t in mixed.items()}
    convert(str(tmp_path / "mixed.pt"), "huggingface", str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("dtype", grid("bfloat16", rest=["float16"]))
def test_export_in_half_precision_on_request(dense_folder, tmp_path, dtype):
    convert(dense_folder, "huggingface", str(tmp_path / "out"), dtype=dtype)
    model = CLIPModel.from_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {getattr(torch, dtype)}
    exact = trees.flatten(read_model(dense_folder).params)
    for name, leaf in trees.flatten(read_model(str(tmp_path / "out")).params).items():
        np.testing.assert_allclose(leaf, exact[name], rtol=2**-8, atol=1e-7, err_msg=name)


def test_numbers_too_large_for_half_precision_leave_no_folder(golden_dir, tmp_path):
    state = torch.load(golden_dir / "dense.pt", weights_only=True)
    state = {name: tensor.float() for name, tensor in state.items()}
    state["visual.conv1.weight"][0] = 1e5
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(
        ValueError, match="visual.conv1.weight has values up to 1e\\+05, more than float16 can"
    ):
        convert(str(tmp_path / "large.pt"), "huggingface", str(tmp_path / "out"), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["large.pt"]
    convert(str(tmp_path / "large.pt"), "huggingface", str(tmp_path / "out"), dtype="bfloat16")


def test_head_widths_of_a_bare_state_dict_are_what_is_asked_for(golden_dir, tmp_path):
    state = torch.load(golden_dir / "dense.pt", weights_only=True)
    del state["positional_embedding_res"]
    torch.save(state, tmp_path / "bare.pt")
    out = str(tmp_path / "out")
    convert(str(tmp_path / "bare.pt"), "huggingface", out, vision_head_width=32, text_head_width=16)
    config = read_model(out).config
    assert (config.vision.head_width, config.text.head_width) == (32, 16)
    assert clipmoe_jax.load(str(tmp_path / "bare.pt"), text_head_width=16).config.text.head_width == 16


def test_weights_past_a_size_are_sharded(dense_folder, tmp_path):
    """Their numbered names, their index, and transformers and we read them."""
    model = read_model(dense_folder)
    folder = tmp_path / "out"
    folder.mkdir()
    modules = pathlib.Path(preprocess.__file__).parent
    export.write_huggingface(folder, model.config, model.params, backend(), modules, shard_bytes=1_000_000)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors" and len(files) >= 2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * trees.count_parameters(model.params)
    # The token embedding alone is larger than a shard may be, and so alone in its own.
    sizes = {
        name: sum(np.prod(t.shape) for t in open_tensors(epath.Path(folder / name)).values())
        for name in files
    }
    assert sorted(sizes.values())[-1] == 49408 * 64
    assert all(4 * size <= 1_000_000 for size in sorted(sizes.values())[:-1])
    chex.assert_trees_all_equal(read_model(str(folder)).params, model.params)
    _, found = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())


def test_files_can_be_read_by_others(exported):
    """As the process's umask has it; safetensors itself writes for its owner alone."""
    os.umask(umask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("size", [(48, 40), (640, 427)], ids=str)
def test_transformers_encodes_as_we_do(dense_folder, exported, size):
    """The exported processor's pixels and tokens through its CLIPModel, against ours from image and text."""
    model = CLIPModel.from_pretrained(exported)
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))
    texts = ["A photo of a cat.", "Two dogs   are running; it's 2024!"]
    inputs = processor(text=texts, images=image, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    ours = clipmoe_jax.load(dense_folder)
    np.testing.assert_allclose(ours.encode_text(texts, normalize=True), outputs.text_embeds, atol=1e-4)
    np.testing.assert_allclose(ours.encode_image(image, normalize=True), outputs.image_embeds, atol=1e-4)


def test_the_exported_tokenizer_gives_our_ids(golden_dir, exported):
    """On the golden captions; those that ftfy or HTML entities change it leaves as they are, and it takes
    special tokens for what they are."""
    captions = [row["text"] for row in json.loads((golden_dir / "tokens.json").read_text())]
    theirs = AutoProcessor.from_pretrained(exported).tokenizer
    differing = []
    for caption, row in zip(captions, Tokenizer(77)(captions), strict=True):
        ours = row[: row.argmax() + 1].tolist()
        if theirs(caption, truncation=True)["input_ids"] != ours:
            differing.append(caption)
    assert len(captions) == 103 and len(differing) == 6
    for caption in differing:
        assert any(sign in caption for sign in ("&", "â€", "<|", "ﬁ", "\x00", "“")), caption


def test_zero_shot_pipeline_of_transformers_runs(exported):
    classify = pipeline("zero-shot-image-classification", model=str(exported))
    image = Image.fromarray(np.full((40, 60, 3), 200, np.uint8))
    answers = classify(image, candidate_labels=["a cat", "a dog", "a very large house"])
    assert {answer["label"] for answer in answers} == {"a cat", "a dog", "a very large house"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1, abs=1e-5)


def test_248_positions_reach_the_tokenizer(dense_folder, tmp_path):
    convert(dense_folder, "huggingface", str(tmp_path / "out"), context_length=248)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = processor.tokenizer("a cat " * 200, truncation=True)["input_ids"]
    assert len(ids) == 248 and ids[-1] == END_ID


def test_a_vocabulary_of_its_own_gets_no_tokenizer(golden_dir, tmp_path):
    convert(str(golden_dir / "dense.pt"), "huggingface", str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("tokenizer*"))
    with pytest.raises(ValueError, match="300 tokens of its own, not CLIP's 49,408: give token ids"):
        clipmoe_jax.load(str(tmp_path / "out")).encode_text("a cat")


def test_clip_moe_folder_has_config_weights_module_and_card(golden_dir, tmp_path):
    convert(str(golden_dir / "moe_last1.pt"), "huggingface", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "modeling_clip_moe.py", "README.md"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_clip_moe.CLIPMoEModel"
    towers = config["vision_config"], config["text_config"]
    assert [t["num_experts"] for t in towers] == [4, 4] and [t["num_moe_layers"] for t in towers] == [1, 1]


def test_the_card_tells_sizes_training_and_scores(tmp_path):
    """Of a model in a run's folder: what it was made from and the run's table."""
    run = tmp_path / "run"
    moe = MoeConfig(4, 2)
    artifacts.make(
        run / "moe" / "params",
        {"mcl.learning_rate": 1e-5},
        lambda folder: save_random_model(folder, moe=moe, context_length=248) and {},
    )
    (run / "eval").mkdir()
    row = {f"{way}_r{k}": 0.125 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    (run / "eval" / "results.json").write_text(json.dumps({"base": row, "CLIP-MoE": row}))
    convert(str(run / "moe" / "params"), "clipmoe", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    # A block: two norms, in_proj and out_proj, router, four experts of two linear layers each.
    expert = 64 * 256 + 256 + 256 * 64 + 64
    block = 2 * 128 + 64 * 192 + 192 + 64 * 64 + 64 + 64 * 4 + 4 * expert
    vision = 8 * 8 * 3 * 64 + 64 + 17 * 64 + 2 * 128 + 64 * 24 + 2 * block
    text = 49408 * 64 + 248 * 64 + 128 + 64 * 24 + 2 * block
    assert f"| parameters | {vision + text + 1:,} |" in card
    assert f"| active parameters | {vision + text + 1 - 4 * 2 * expert:,} for each token |" in card
    assert '"mcl.learning_rate": 1e-05' in card
    assert "| base | 12.5 | 12.5 | 12.5 | 12.5 |\n| **CLIP-MoE** | 12.5 | 12.5 | 12.5 | 12.5 |" in card
    assert 'clipmoe.loadMoE(\n    "out/model.pt", num_experts=4, top_k=2, moe_layers=2\n)' in card
    blend = {"expert": 2, "interpolate": 0.5}
    convert(str(run / "moe" / "params"), "huggingface", str(tmp_path / "blend"), **blend)
    card = (tmp_path / "blend" / "README.md").read_text()
    assert "12.5" not in card and "The run that it comes from measured other models" in card
    # A run without a test set has other evaluations alone.
    (run / "eval" / "results.json").write_text(json.dumps({"base": {"parameters": 1, "evaluations": {}}}))
    convert(str(run / "moe" / "params"), "clipmoe", str(tmp_path / "another"))
    assert "## Evaluation" not in (tmp_path / "another" / "README.md").read_text()


REFUSED = {
    "a format that is none": ("tflite", {}, "'tflite' is not a format: choose one of huggingface, sentence"),
    "77 positions for the released code": (
        "clipmoe",
        {},
        "only text.context_length=248, this model has text.context_length=77: ask for context_length=248",
    ),
}


@pytest.mark.parametrize(("to", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_format_cannot_hold_is_refused(dense_folder, tmp_path, to, options, message):
    with pytest.raises(ValueError, match=message):
        convert(dense_folder, to, str(tmp_path / "out"), **options)
    assert not list(tmp_path.iterdir())


def test_clip_moe_for_open_clip_is_refused(golden_dir, tmp_path):
    with pytest.raises(ValueError, match="open_clip builds no CLIP-MoE: .* huggingface, or .*--expert="):
        convert(str(golden_dir / "moe_all.pt"), "openclip", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_all_that_the_released_code_does_not_support_is_named_at_once(tmp_path):
    save_random_model(tmp_path / "other", activation="gelu", layer_norm_eps=1e-6)
    with pytest.raises(
        ValueError,
        match="only text.context_length=248, activation=quick_gelu, layer_norm_eps=1e-05, this model has "
        "text.context_length=77, activation=gelu, layer_norm_eps=1e-06: convert it to huggingface$",
    ):
        convert(str(tmp_path / "other"), "clipmoe", str(tmp_path / "out"))


def test_existing_folder_is_refused_and_not_touched(dense_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=".*out exists already: delete it or choose another"):
        convert(dense_folder, "huggingface", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_model_between_two_is_their_average(dense_folder, tmp_path):
    """A quarter of one and three of the other; at 0 and 1 they themselves, in any type."""
    base = read_model(dense_folder)
    other = jax.tree.map(lambda leaf: leaf + np.float32(0.1) * np.cos(leaf), base.params)
    save_model(epath.Path(tmp_path / "other"), base.config, other)
    for share, dtype in ((0.25, None), (0.0, "float16"), (1.0, None)):
        out = str(tmp_path / f"between {share}")
        convert(str(tmp_path / "other"), "openclip", out, interpolate=share, base=dense_folder, dtype=dtype)
        expected = jax.tree.map(lambda old, new, n=share: (1 - n) * old + n * new, base.params, other)
        found = read_model(out, dtype=None)
        assert found.config == base.config and found.params["logit_scale"].dtype == (dtype or "float32")
        atol = 1e-3 if dtype else 1e-7
        chex.assert_trees_all_close(found.params, jax.tree.map(np.asarray, expected), atol=atol)


def test_an_expert_is_averaged_with_the_base_of_its_mixture(golden_dir, tmp_path):
    source = str(golden_dir / "moe_last1.pt")
    for out, options in (
        ("2", {"expert": 2}),
        ("between", {"expert": 2, "interpolate": 0.5}),
        ("0", {"expert": 0}),
    ):
        convert(source, "huggingface", str(tmp_path / out), dtype="float32", **options)
    first, last, between = (read_model(str(tmp_path / out)) for out in ("0", "2", "between"))
    assert between.config == first.config and between.config.moe is None
    of_expert = [m.params["visual"]["resblocks_1"]["mlp"]["c_fc"]["kernel"] for m in (first, last)]
    assert not np.array_equal(*of_expert)
    expected = jax.tree.map(lambda old, new: (old + new) / 2, first.params, last.params)
    chex.assert_trees_all_close(between.params, expected, atol=1e-6)
    card = (tmp_path / "between" / "README.md").read_text()
    assert "from a blend of 0.5 dense CLIP, expert 2 of a CLIP-MoE" in card


NO_AVERAGES = {
    "no base": (
        {"interpolate": 0.5},
        "is to be averaged with nothing: give base, the dense model it came from",
    ),
    "no share": ({"base": "x"}, "base=x has no share: give interpolate, such as 0.5"),
    "a share above 1": (
        {"interpolate": 1.5, "base": "x"},
        "interpolate=1.5 must lie between 0, the base, and 1",
    ),
    "a mixture": (
        {"interpolate": 0.5, "base": "moe_all.pt"},
        "has no single weights to average: choose an exp",
    ),
    "an expert of none": ({"expert": 1}, "expert 1 of a dense model was asked for: it has no experts"),
    "another architecture": (
        {"interpolate": 0.5, "base": "dense.pt"},
        "the model has .*=.* and the base .*: only models of one architecture have averages",
    ),
}


@pytest.mark.parametrize(("options", "message"), NO_AVERAGES.values(), ids=NO_AVERAGES)
def test_models_that_have_no_average_are_refused(dense_folder, golden_dir, tmp_path, options, message):
    if options.get("base", "").endswith(".pt"):
        options = options | {"base": str(golden_dir / options["base"])}
    with pytest.raises(ValueError, match=message):
        convert(dense_folder, "huggingface", str(tmp_path / "out"), **options)
    assert list(tmp_path.iterdir()) == []


def run_command(*arguments, **options):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "clipmoe_jax.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_command_writes_the_folder_and_names_both_ends(golden_dir, tmp_path):
    source, out = golden_dir / "moe_all.pt", tmp_path / "out"
    done = run_command(f"--from={source}", "--to=clipmoe", f"--out={out}", "--num_selected_experts=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{source}: CLIP-MoE (4 experts, 3 selected) in the released code's format\n"
        f"{out}: clipmoe; its README.md says how to use it.\n"
    )
    assert json.loads((out / "clipmoe.json").read_text())["num_selected_experts"] == 3


def test_command_reports_an_error_as_one_line(tmp_path):
    done = run_command(f"--from={tmp_path}/none.pt", "--to=clipmoe", f"--out={tmp_path}/out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/none.pt does not exist: give a file or a folder")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from clipmoe_jax import convert
from clipmoe_jax.interop import tensor_files

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

tensor_files.safetensors.numpy.save_file = die
convert.convert(sys.argv[1], "huggingface", sys.argv[2])
"""


def test_a_killed_conversion_leaves_no_half_folder(golden_dir, tmp_path):
    """Killed while it writes the weights; the next attempt clears what it left."""
    source, out = str(golden_dir / "dense.pt"), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, source, str(out)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    convert(source, "huggingface", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


MEMORY = """
import resource, sys
import jax.numpy as jnp
import torch
import clipmoe_jax

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jnp.zeros(1).block_until_ready()
before = peak()
model = clipmoe_jax.load(sys.argv[1])
print(peak() - before)
"""


@exhaustive
@pytest.mark.parametrize("to", grid("clipmoe", rest=["huggingface"]))
def test_import_takes_less_memory_than_two_and_a_half_files(tmp_path, to):
    """Half precision is the hard case: what is loaded is itself twice as large as the file."""
    config = ClipConfig(vision=VisionConfig(num_layers=4), text=TextConfig(context_length=248, num_layers=4))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float16), abstract_params(config))
    folder = tmp_path / "out"
    folder.mkdir()
    WRITERS[to](folder, config, params)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 130e6
    command = [sys.executable, "-c", MEMORY, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 2.5 * size


def test_a_folder_with_one_file_is_that_file(golden_dir, tmp_path):
    (tmp_path / "anything.pth").write_bytes((golden_dir / "dense.pt").read_bytes())
    assert read_model(str(tmp_path)).source == "dense CLIP in the released code's format"
    (tmp_path / "another.pth").write_bytes((golden_dir / "dense.pt").read_bytes())
    with pytest.raises(ValueError, match=r"give one of its files \['another.pth', 'anything.pth'\]"):
        read_model(str(tmp_path))


def test_positions_are_resized_on_request(dense_folder):
    found = read_model(dense_folder, image_size=48)
    assert found.params["visual"]["positional_embedding"].shape == (37, 64)
    images = np.zeros((1, 48, 48, 3), np.float32)
    features, _ = Clip(found.config).apply({"params": found.params}, images, method="encode_image")
    assert np.isfinite(features).all()
    with pytest.raises(ValueError, match="vision.image_size=50 is not a multiple of vision.patch_size=8"):
        read_model(dense_folder, image_size=50)


PREAMBLE = "import sys\nfor name in ('jax', 'clipmoe_jax', 'torchvision'):\n    sys.modules[name] = None\n"


@pytest.mark.parametrize("moe", quick({"dense": None, "moe": MoeConfig(4, 2)}, "moe"))
def test_code_of_the_card_runs_in_transformers(tmp_path, moe):
    """As they stand, beside the folder, in a process that has no JAX."""
    save_random_model(tmp_path / "ours", moe=moe)
    convert(str(tmp_path / "ours"), "huggingface", str(tmp_path / "exported"))
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "photo.jpg")
    code = code_of((tmp_path / "exported" / "README.md").read_text())
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PREAMBLE + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensor([[0.")
    assert ("CLIPMoEVisionModel" in code) == (moe is not None)


def test_code_of_the_card_runs_in_open_clip(dense_folder, tmp_path, monkeypatch, capsys):
    convert(dense_folder, "openclip", str(tmp_path / "exported"))
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code_of((tmp_path / "exported" / "README.md").read_text()), {})
    assert capsys.readouterr().out.startswith("tensor([[0.")
