"""The files of the diagnostics: neighbours by hand, heat maps against the model, and what each file holds."""

import json

import numpy as np
import pytest

from clipmoe_jax.analysis.neighbours import neighbours
from clipmoe_jax.analysis.words import WORD_CLASSES
from clipmoe_jax.dmu import diagnostics
from clipmoe_jax.models.clip import Clip
from clipmoe_jax.models.transformer import ComputeConfig

CAPTIONS = ("a cat", "a kitten", "a dog", "a bird", "a dog")
OF = np.array([0, 0, 1, 2, 3])
EYE = np.eye(4, dtype=np.float32)
# Scores of images (rows) and captions. Caption 4 is caption 2's words again.
BASE = np.array(
    [
        [0.3, 0.1, 0.5, 0.2, 0.5],  # image 0: a dog (0.5) before its own a cat (0.3): margin -0.2
        [0.2, 0.2, 0.9, 0.1, 0.9],  # image 1: its own words are also another caption: a tie, margin 0
        [0.1, 0.1, 0.2, 0.8, 0.1],  # image 2: right, margin 0.6
        [0.6, 0.1, 0.1, 0.1, 0.4],  # image 3: a cat before its own: margin -0.2
    ],
    np.float32,
)
MOE = np.array(
    [
        [0.4, 0.7, 0.6, 0.1, 0.1],  # image 0: right by a kitten, margin 0.1
        [0.2, 0.2, 0.8, 0.1, 0.7],  # image 1: right, but the base's first caption was right in words
        [0.9, 0.1, 0.3, 0.7, 0.1],  # image 2: a cat before its own: margin -0.2
        [0.1, 0.1, 0.3, 0.1, 0.9],  # image 3: right, margin 0.6
    ],
    np.float32,
)


def test_neighbours_by_hand():
    found = neighbours((EYE, BASE.T), (EYE, MOE.T), CAPTIONS, OF)
    approx = pytest.approx
    # Margins are 0.8 apart for image 3 (0.6 + 0.2) and 0.3 for image 0.
    assert found["clip_moe_right"] == [
        {"image": 3, "caption": "a dog", "base": ["a cat", approx(0.6)], "clip_moe": ["a dog", approx(0.9)]},
        {
            **{"image": 0, "caption": "a kitten"},
            **{"base": ["a dog", approx(0.5)], "clip_moe": ["a kitten", approx(0.7)]},
        },
    ]
    right = {"base": ["a bird", approx(0.8)], "clip_moe": ["a cat", approx(0.9)]}
    assert found["base_right"] == [{"image": 2, "caption": "a bird", **right}]


def test_the_count_of_neighbours(tmp_path):
    diagnostics.write_neighbours(tmp_path, (EYE, BASE.T), (EYE, MOE.T), CAPTIONS, OF, count=1)
    found = json.loads((tmp_path / "neighbours.json").read_text())
    assert {name: [e["image"] for e in examples] for name, examples in found.items()} == {
        "clip_moe_right": [3],
        "base_right": [2],
    }


def test_neighbours_of_many_images_equal_sorting(tmp_path):
    """More images than a chunk holds: who is right by whole score matrices."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(1500, 8)).astype("f4")
    texts = [images + rng.normal(0, 0.5, images.shape).astype("f4") for _ in range(2)]
    captions = [f"caption {i}" for i in range(1500)]
    found = neighbours((images, texts[0]), (images, texts[1]), captions, np.arange(1500), 10_000)
    first = [np.argmax(images @ of_model.T, axis=1) for of_model in texts]
    right = [best == np.arange(1500) for best in first]
    for name, expected in (("clip_moe_right", right[1] & ~right[0]), ("base_right", right[0] & ~right[1])):
        assert sorted(example["image"] for example in found[name]) == np.flatnonzero(expected).tolist()
        assert max(example["image"] for example in found[name]) > 1024
        for example in found[name]:
            assert example["base"][0] == captions[first[0][example["image"]]]


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """Everything of a CLIP-MoE written."""
    folder = tmp_path_factory.mktemp("eval")
    arguments = folder, trained.model, trained.params
    diagnostics.write_routing(*arguments, trained.batches, trained.mesh)
    diagnostics.write_experts(*arguments, trained.batches, trained.mesh)
    batch = trained.batches[0]
    images, tokens = batch["image"][:2], batch["text"][:2]
    captions, records = ["a small red two", "dogs."], np.array([7, 4])
    diagnostics.write_heat_maps(*arguments, images, tokens, captions, records, trained.mesh)
    models = {
        "base": (Clip(trained.dense, ComputeConfig()), trained.dense_params[0]),
        "CLIP-MoE": (trained.model, trained.params),
    }
    diagnostics.write_cost(folder, models, images, tokens, batch_sizes=(2,), rounds=2)
    return folder


def read(folder, name):
    """Strict: NaN is no JSON."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads((folder / name).read_text(), parse_constant=refuse)


def test_routing_file(folder):
    found = read(folder, "routing.json")
    assert found.keys() == {"visual", "text"}
    for tower, table in found.items():
        tables = {"layers", "load", "entropy", "top1_gate", "coactivation", "load_by_position", "bins"}
        assert table.keys() == tables | ({"load_by_word_class"} if tower == "text" else set())
        np.testing.assert_allclose(np.sum(table["load"], axis=-1), 1)
        np.testing.assert_allclose(np.sum(table["load_by_position"], axis=-1), 1)
        assert np.shape(table["load_by_position"]) == (2, len(table["bins"]), 4)
        # A token chooses two experts: the diagonal adds up to 2, and each row to twice its diagonal.
        together = np.array(table["coactivation"])
        own = np.einsum("mee->me", together)
        np.testing.assert_allclose(own.sum(axis=-1), 2)
        np.testing.assert_allclose(together.sum(axis=-1), 2 * own)
        np.testing.assert_allclose(own / 2, table["load"])
        assert np.all(np.array(table["entropy"]) < np.log(4)) and np.all(np.array(table["top1_gate"]) >= 0.5)
    assert found["visual"]["bins"] == ["class token", "row 1", "row 2"]
    assert list(found["text"]["load_by_word_class"]) == list(WORD_CLASSES)


def test_experts_file(folder):
    found = read(folder, "experts.json")
    assert found.keys() == {"visual", "text", "diversity"} and 0 < found["diversity"] < 1
    for tower in ("visual", "text"):
        table = found[tower]
        assert table.keys() == {"layers", "cka", "js_divergence", "weight_cosine"}
        for name, size in (("cka", 4), ("js_divergence", 4), ("weight_cosine", 3)):
            matrices = np.array(table[name])
            assert matrices.shape == (2, size, size)
            np.testing.assert_allclose(matrices, np.swapaxes(matrices, 1, 2), atol=1e-6)


def test_heat_map_files(folder, trained):
    arrays = np.load(folder / "heat_maps.npz")
    batch = trained.batches[0]
    np.testing.assert_array_equal(arrays["images"], batch["image"][:2])
    np.testing.assert_array_equal(arrays["tokens"], batch["text"][:2])
    logits = trained.router_logits(trained.params, batch["image"], "encode_image")[:2, :, 1:]
    np.testing.assert_array_equal(arrays["visual_experts"].reshape(2, 2, 4), np.argmax(logits, axis=-1))
    assert arrays["visual_experts"].shape == (2, 2, 2, 2)
    logits = trained.router_logits(trained.params, batch["text"], "encode_text")[:2]
    best, (first, second) = np.argmax(logits, axis=-1), read(folder, "heat_maps.json")
    assert (first["record"], first["caption"]) == (7, "a small red two")
    assert second["words"] == ["<|startoftext|>", "dogs", ".", "<|endoftext|>"]
    for i, example in enumerate((first, second)):
        length = len(example["words"])
        np.testing.assert_array_equal(arrays["text_experts"][i, :, :length], best[i, :, :length])
        assert np.all(arrays["text_experts"][i, :, length:] == -1)
    assert {arrays[name].dtype.name for name in ("visual_experts", "text_experts")} == {"int8"}
    assert (arrays["images"].dtype, arrays["tokens"].dtype) == (np.uint8, np.int32)


def test_cost_file(folder):
    found = read(folder, "cost.json")
    assert list(found) == ["base", "CLIP-MoE"]
    for numbers in found.values():
        keys = "parameters active_parameters flops_per_image flops_per_caption xla_flops_per_image latency_ms"
        assert numbers.keys() == {*keys.split(), "pairs_per_second", "best_batch", "peak_bytes"}
        assert min(numbers.values()) > 0 and numbers["best_batch"] == 2
