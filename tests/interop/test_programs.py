"""Exports that compute without this package, beside our features: ONNX, StableHLO, sentence-transformers."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import onnxruntime
import pytest
import torch
from cards import code_of
from etils import epath
from grids import exhaustive, quick
from PIL import Image
from sentence_transformers import SentenceTransformer

import clipmoe_jax
from clipmoe_jax.convert import convert
from clipmoe_jax.interop import modeling_clip_moe, programs
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import MoeConfig

BATCHES = (1, 3, 7)
TEXTS = ["a dog", "two cats on a large red sofa, one of which sleeps", "the sea"]
MODELS = {
    "dense": {},
    "feed-forward experts": {"moe": MoeConfig(3, 2, sequence_share=1.0)},
    "whole blocks": {"moe": MoeConfig(3, 2, 1, expert_layers="attention_and_feed_forward")},
}


def save_random_model(folder, **fields):
    config = ClipConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=32, patch_size=16, width=32, num_layers=2, head_width=16),
        text=fields.pop("text", TextConfig(context_length=24, width=32, num_layers=2, head_width=16)),
        **fields,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.15, leaf.shape).astype("f4"), abstract_params(config))
    save_model(epath.Path(folder), config, params)
    return str(folder)


@pytest.fixture(params=quick(MODELS, "whole blocks"))
def model(request, tmp_path):
    return save_random_model(tmp_path / "model", **request.param)


def make_pixels(count, size=32):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def make_ids(count, length=24):
    """Captions of every length, each with one end token."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1, 49405, (count, length))
    ids[np.arange(count), rng.integers(2, length, count)] = 49407
    return ids


def run_onnx(folder, name, inputs):
    [of] = (session := onnxruntime.InferenceSession(f"{folder}/{name}.onnx")).get_inputs()
    return session.run([f"{name}_features"], {of.name: inputs})[0]


def preprocessed(pixels):
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)


def card_code(folder):
    """The code of the card in `folder`/out, and the photograph that it opens."""
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(folder / "photo.jpg")
    return code_of((folder / "out" / "README.md").read_text())


def test_onnx_gives_our_features_for_any_batch(model, tmp_path, monkeypatch):
    convert(model, "onnx", str(tmp_path / "out"))
    clip = clipmoe_jax.load(model)
    for count in BATCHES:
        pixels, ids = make_pixels(count), make_ids(count)
        image = run_onnx(tmp_path / "out", "image", preprocessed(pixels))
        np.testing.assert_allclose(image, clip.encode_image(pixels), rtol=1e-4, atol=1e-5)
        text = run_onnx(tmp_path / "out", "text", ids)
        np.testing.assert_allclose(text, clip.encode_text(ids), rtol=1e-4, atol=1e-5)
    monkeypatch.chdir(tmp_path)
    exec(card_code(tmp_path), names := {})
    assert names["image"].shape == (1, 24) and names["text"].shape == (2, 24)


# Before the card's code, which reads the programs and the weights too.
CALL = """
import sys
sys.modules["clipmoe_jax"] = None  # as where it is not installed
import numpy as np
from jax import export
from safetensors.numpy import load_file

weights = load_file("out/model.safetensors")
for name in ("image", "text"):
    program = export.deserialize(bytearray(open(f"out/{name}.stablehlo", "rb").read()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    features = [program.call(weights, np.load(f"{name}_{count}.npy")) for count in (1, 3, 7)]
    np.save(f"{name}.npy", np.concatenate(features))
"""


def test_stablehlo_runs_without_this_package_for_any_batch(model, tmp_path):
    convert(model, "stablehlo", str(tmp_path / "out"))
    clip, expected = clipmoe_jax.load(model), {"image": [], "text": []}
    for count in BATCHES:
        pixels, ids = make_pixels(count), make_ids(count).astype(np.int32)
        np.save(tmp_path / f"image_{count}.npy", pixels)
        np.save(tmp_path / f"text_{count}.npy", ids)
        expected["image"].append(clip.encode_image(pixels))
        expected["text"].append(clip.encode_text(ids))
    command = [sys.executable, "-c", CALL + card_code(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.startswith("[[")
    for name, features in expected.items():
        found = np.load(tmp_path / f"{name}.npy")
        np.testing.assert_allclose(found, np.concatenate(features), rtol=1e-4, atol=1e-5)


def test_sentence_transformers_encodes_as_we_do(model, tmp_path, monkeypatch):
    """Images of odd shapes too."""
    convert(model, "sentence-transformers", str(tmp_path / "out"))
    theirs = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    rng, clip = np.random.default_rng(3), clipmoe_jax.load(model)
    shapes = (40, 27, 3), (33, 70, 3), (32, 32, 3)
    images = [Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)) for shape in shapes]
    np.testing.assert_allclose(theirs.encode(images), clip.encode_image(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(TEXTS), clip.encode_text(TEXTS), rtol=1e-4, atol=1e-5)
    units = theirs.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(units, clip.encode_text(TEXTS, normalize=True), atol=1e-5)
    monkeypatch.chdir(tmp_path)
    exec(card_code(tmp_path), names := {})
    assert names["image"].shape == (1, 24) and names["texts"].shape == (2, 24)


@exhaustive
def test_int8_weights_give_nearly_our_features(model, tmp_path):
    """In ONNX and in PyTorch; every linear layer but the routers has them, experts too."""
    clip, pixels, ids, read = clipmoe_jax.load(model), make_pixels(4), make_ids(4), read_model(model)
    towers = programs.torch_towers(read.config, read.params)
    convert(model, "onnx-int8", str(tmp_path / "int8"))
    for name, inputs, features in (
        ("image", preprocessed(pixels), clip.encode_image(pixels, normalize=True)),
        ("text", ids, clip.encode_text(ids, normalize=True)),
    ):
        onnx = run_onnx(tmp_path / "int8", name, inputs)
        quantized = torch.ao.quantization.quantize_dynamic(towers[name], {torch.nn.Linear}, torch.qint8)
        with torch.no_grad():
            pytorch = quantized(torch.from_numpy(inputs)).numpy()
        for found in (onnx, pytorch):
            cosines = (found / np.linalg.norm(found, axis=1, keepdims=True) * features).sum(axis=1)
            assert 0.9 < cosines.min() and cosines.max() < 0.999999
        layers = [layer for layer in quantized.modules() if isinstance(layer, torch.nn.Linear)]
        assert all(isinstance(layer, modeling_clip_moe.Router) for layer in layers)


@pytest.mark.parametrize(
    ("to", "fields", "options", "message"),
    [
        ("onnx", {}, {"dtype": "float16"}, "dtype=float16: onnx computes in float32: leave it out"),
        ("onnx", {}, {}, "ONNX files are written with onnxscript: pip install onnxscript"),
        ("sentence-transformers", {"text": None}, {}, "takes models of both towers with CLIP's tokens"),
    ],
)
def test_what_cannot_be_written_is_told_and_leaves_nothing(
    to, fields, options, message, tmp_path, monkeypatch
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name)
    )
    model = save_random_model(tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=message):
        convert(model, to, str(tmp_path / "out"), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
