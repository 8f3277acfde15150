"""The files of the diagnostics: what each holds, and heat maps against the model."""

import json

import numpy as np
import pytest
from etils import epath

from clipmoe_jax.analysis.words import WORD_CLASSES
from clipmoe_jax.config import default_config
from clipmoe_jax.dmu import diagnostics, results
from clipmoe_jax.dmu.run import Run


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
    architectures = {"base": trained.dense, "CLIP-MoE": trained.model.config}
    diagnostics.write_cost(folder, architectures, length=64)
    return folder


def read(folder, name):
    """Strict: NaN is no JSON."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads((folder / name).read_text(), parse_constant=refuse)


def test_routing_file_holds_shares_of_tokens_that_add_up(folder):
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


def test_experts_file_holds_a_table_for_each_block(folder):
    found = read(folder, "experts.json")
    assert found.keys() == {"visual", "text", "diversity"} and 0 < found["diversity"] < 1
    for tower in ("visual", "text"):
        table = found[tower]
        assert table.keys() == {"layers", "cka", "js_divergence", "weight_cosine"}
        for name, size in (("cka", 4), ("js_divergence", 4), ("weight_cosine", 3)):
            matrices = np.array(table[name])
            assert matrices.shape == (2, size, size)
            np.testing.assert_allclose(matrices, np.swapaxes(matrices, 1, 2), atol=1e-6)


def test_heat_map_files_hold_top1_experts_and_captions(folder, trained):
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


def test_cost_file_compares_the_models(folder):
    found = read(folder, "cost.json")
    assert list(found) == ["base", "CLIP-MoE"]
    for numbers in found.values():
        keys = "parameters active_parameters flops_per_image flops_per_caption"
        assert numbers.keys() == {*keys.split()} and min(numbers.values()) > 0


def test_neighbours_file_holds_as_many_examples_as_asked(tmp_path):
    """Of images 0 and 1, which the CLIP-MoE alone gets right, the one whose margins differ more."""
    base = np.array([[0.1, 0.9, 0], [0.8, 0.2, 0], [0, 0, 1]], np.float32)
    moe = np.array([[0.9, 0, 0], [0, 0.5, 0], [1, 0, 0.5]], np.float32)
    images, captions = np.eye(3, dtype=np.float32), ("a cat", "a dog", "a bird")
    pairs = (images, base.T), (images, moe.T), captions, np.arange(3)
    diagnostics.write_neighbours(tmp_path, *pairs, count=1)
    found = read(tmp_path, "neighbours.json")
    assert {name: [example["image"] for example in examples] for name, examples in found.items()} == {
        "clip_moe_right": [0],
        "base_right": [2],
    }


NOTHING_CHANGED = {
    "experts": (
        0.0004,
        0.5,
        ["the experts compute the same (diversity 0.000): raise mcl.learning_rate (now "],
    ),
    "routers": (
        0.2,
        0.004,
        ["training the routers changed the experts of 0.4 % of the tokens: raise router."],
    ),
    "neither": (0.2, 0.006, []),
}


@pytest.mark.parametrize(("diversity", "changed", "told"), NOTHING_CHANGED.values(), ids=NOTHING_CHANGED)
def test_training_that_changed_nothing_is_told_with_what_to_raise(tmp_path, diversity, changed, told):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "experts.json").write_text(json.dumps({"diversity": diversity}))
    of_towers = {"visual": [changed, changed], "text": [changed, changed]}
    (tmp_path / "eval" / "routing_change.json").write_text(json.dumps(of_towers))
    config = default_config()
    config.router.num_steps = 24
    run = Run(config, 0, epath.Path(tmp_path), mesh=None, metrics=None, datasets={"test": None})
    warnings = list(results._nothing_changed(run))
    assert [warning[: len(start)] for warning, start in zip(warnings, told, strict=True)] == told
    fields = {"experts": "mcl.num_epochs (now 1)", "routers": "router.num_steps (now 24)"}
    assert all(any(field in warning for field in fields.values()) for warning in warnings)
