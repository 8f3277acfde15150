"""`python -m benchmarks.run`: both sides compute the same, and its numbers follow from measured seconds."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import ours, peers, run, sides, table, timing
from benchmarks.workload import ATTENTION, RULES, SETTINGS, Workload, setting_choices
from clipmoe_jax.core import accelerators, trees
from clipmoe_jax.interop import huggingface
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import VARIANTS, abstract_params

ROOT = pathlib.Path(__file__).parents[2]
# Captions of 3 to 32 tokens: padding is there and must count for nothing.
TINY = Workload("tiny", 4, 32, "float32", "cpu", caption_tokens=12, expert_dropout_rate=0.0)


@pytest.mark.parametrize("kind", RULES)
def test_a_step_is_the_same_step_in_pytorch(kind):
    ours_, theirs = ours.Training(TINY, kind), peers.Training(TINY, kind)
    loss = theirs()
    metrics = ours_()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)

    # After one step the first moment is (1 - b1) times the gradient, on both sides.
    b1 = TINY.phase(kind)[0].b1
    moments = next(part.mu for part in ours_.state.opt_state if hasattr(part, "mu"))
    gradients = _in_pytorch({name: leaf / (1 - b1) for name, leaf in trees.flatten(moments).items()}, kind)
    expected = {n: p.grad.numpy() for n, p in theirs.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == expected.keys()
    # Some gradients are nothing but rounding: a bias of all keys changes no softmax.
    least = 1e-6 * max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        atol = 1e-4 * np.abs(gradient).max() + least
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=atol, err_msg=name)


def _in_pytorch(leaves, kind):
    """Trained leaves under PyTorch's names; of the others there is nothing."""
    abstract = trees.flatten(abstract_params(TINY.model(kind).config))
    whole = {
        name: np.asarray(leaves.get(name, np.full(leaf.shape, np.nan))) for name, leaf in abstract.items()
    }
    exported = huggingface.export_state_dict(trees.unflatten(whole))
    return {name: array for name, array in exported.items() if not np.isnan(array).any()}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_are_the_same(tower):
    found = ours.towers(TINY, tower)["clipmoe_jax"]().call()
    expected = peers.towers(TINY, tower)["PyTorch"]().call()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
@pytest.mark.parametrize("name", [name for name in ATTENTION if "50" in name or "248" in name])
def test_attention_is_the_same(name, implementation):
    workload = dataclasses.replace(TINY, batch=1)
    function, arguments = ours.attend(workload, name, implementation)
    same_function, same_arguments = peers.attend(workload, name)
    found, expected = function(*arguments), same_function(*same_arguments)
    if "gradient" in name:
        (found, of_qkv), (expected, *theirs) = found, expected
        for i, gradient in enumerate(theirs):
            np.testing.assert_allclose(of_qkv[:, :, i], gradient, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_flops_leave_padding_out():
    dense = TINY.model("mcl").config
    full = dataclasses.replace(TINY, caption_tokens=0)
    assert full.forward_flops("text", 4) == 4 * (flops.forward(dense) - full.forward_flops("visual", 1))
    lengths = TINY.lengths(4)
    assert lengths.max() < 32
    tokens = TINY.padded_tokens(4)
    np.testing.assert_array_equal((tokens != 0).sum(axis=1), lengths)
    of_each = [sum(layer.flops for layer in flops.layers(dense, "text", int(n))) for n in lengths]
    assert TINY.forward_flops("text", 4) == sum(of_each)


def test_flops_of_steps_and_blocks():
    # ViT-L/14's vision block: N = 2 * 257 tokens, D = 1024, F = 4096, two of four experts.
    large = Workload("ViT-L/14", 2, 248, "float32", "cpu")
    tokens = 2 * 257
    assert large.moe_flops(dense=True, gradient=False) == 2 * tokens * 1024 * 4096 * 2
    assert (
        large.moe_flops(dense=False, gradient=False)
        == 2 * 2 * tokens * 1024 * 4096 * 2 + 2 * tokens * 1024 * 4
    )
    # Scores and values, 16 heads 64 wide; the gradient takes two products for each.
    assert large.attention_flops("L=257, forward") == 2 * 2 * 2 * 16 * 257**2 * 64
    assert large.attention_flops("L=257, forward+gradient") == 3 * 2 * 2 * 2 * 16 * 257**2 * 64
    # Where everything trains the backward pass is about twice the forward pass.
    config = large.model("everything").config
    ratio = large.step_flops("everything") / (2 * flops.forward(config))
    assert 2.95 < ratio <= 3
    assert large.step_flops("mcl") < large.step_flops("everything")
    assert VARIANTS["ViT-L/14"].vision == config.vision


def test_rows_follow_from_seconds():
    told = {
        "a": {"first_call_s": 9.0, "flops": 8e12, "pairs": 10, "against": ("b", "c")},
        "b": {"first_call_s": 9.0, "flops": 8e12, "pairs": 10, "against": ()},
        "c": {"error": "out of memory"},
    }
    # Ratios round by round: 2, 3, 10; that of the medians would be 4 / 2.
    rows = {row["program"]: row for row in sides.rows_of("g", told, {"a": [1, 2, 2], "b": [2, 6, 20]})}
    assert (
        rows["a"]["milliseconds"] == 2000 and rows["a"]["pairs_per_second"] == 5 and rows["a"]["tflops"] == 4
    )
    assert rows["a"]["times_as_fast_as"] == {"b": 3}
    assert rows["c"] == {"group": "g", "program": "c", "error": "out of memory"}
    rows["a"]["mfu"] = 0.25
    shown = table.format_rows([{"section": "s", **row} for row in rows.values()], markdown=True)
    assert shown.splitlines()[2:] == [
        "| s: g | a | 2,000.00 | 5.0 | 4.000 | 25.0% | 3.00 x b |",
        "| s: g | b | 6,000.00 | 1.7 | 1.333 |  |  |",
        "| s: g | c |  |  |  |  | not measured: out of memory |",
    ]


def test_fastest_settings_are_told_as_flags():
    """Of what ran; of PyTorch's batch nothing."""

    def row(section, group, program, milliseconds=1.0, **fields):
        return {"section": section, "group": group, "program": program, "milliseconds": milliseconds} | fields

    rows = [
        row("settings", "experts", "moe.dispatch=ragged", 5.0),
        row("settings", "experts", "moe.dispatch=dense", 4.95),  # noise
        {"section": "settings", "group": "remat", "program": "compute.remat=none", "error": "out of memory"},
        row("settings", "remat", "compute.remat=dots", 9.0),
        row("embed", "batch 64", "clipmoe_jax"),
        row("embed", "fastest, batch 128", "clipmoe_jax"),
        row("embed", "fastest, batch 256", "PyTorch"),
        row("steps", "mcl", "clipmoe_jax"),
    ]
    flags = run.fastest_settings(rows)
    assert flags == [
        "--config.moe.dispatch=ragged",
        "--config.compute.remat=dots",
        "--config.embed.batch_size=128",
    ]
    assert run.fastest_settings(rows[-1:]) == []


def test_a_setting_reaches_the_step():
    for group, kind in SETTINGS.items():
        for choice in setting_choices(group):
            found = dataclasses.replace(TINY, settings=choice).model(kind).compute
            for field, value in (setting.split("=") for setting in choice.split()):
                assert getattr(found, field.split(".")[1]) == value
    assert list(ours.settings(TINY, "experts")) == ["moe.dispatch=ragged", "moe.dispatch=dense"]
    assert peers.SECTIONS["settings"](TINY, "experts") == {}


def test_the_best_batch_of_each_side_counts():
    def row(program, batch, rate):
        return {
            "program": program,
            "group": f"batch {batch}",
            "pairs_per_second": rate,
            "times_as_fast_as": {"b": 0.0},
        }

    rows = [row("a", 4, 10), row("b", 4, 8), row("a", 8, 30), row("b", 8, 6), {"program": "a", "error": "…"}]
    best = {found["program"]: found for found in run.best_batches(rows)}
    assert best["a"]["group"] == "fastest, batch 8" and best["b"]["group"] == "fastest, batch 4"
    assert best["a"]["times_as_fast_as"] == {"b": 30 / 8}


def test_what_mfu_is_a_share_of():
    rows = [
        {"program": "x", "flops": 1e12, "seconds": [2.0, 4.0]},
        {"program": "y", "flops": 3e12, "seconds": [9.0, 4.0]},  # its fastest round counts
        {"program": "z", "error": "…"},
    ]
    assert run.peak_of(rows, "NVIDIA H200", "bfloat16")["tflops"] == 989
    assert run.peak_of(rows, "NVIDIA H200", "float32")["tflops"] == 0.75  # the vendor's number is bfloat16's
    assert run.peak_of(rows, "cpu", "bfloat16") == {
        "tflops": 0.75,
        "of": "the fastest square product measured here, that of y",
    }
    assert run.peak_of(rows[2:], "cpu", "float32") == {}
    assert accelerators.of_kind("TPU v5 lite").name == "TPU v5e" and accelerators.of_kind("cpu") is None


def test_a_program_that_does_not_fit_is_told(capsys):
    def refuse():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.")

    assert timing.prepare(refuse) == (None, {"error": "out of memory"})
    assert not capsys.readouterr().err
    broken = timing.Program(lambda: 1 / 0, lambda result: result, 1.0)
    assert timing.measure((broken, 1)) == {"error": "ZeroDivisionError: division by zero"}
    assert "Traceback" in capsys.readouterr().err


def test_a_device_that_pytorch_has_not():
    with pytest.raises(ValueError, match="no device of the kind 'tpu'"):
        peers.describe("tpu")


def test_a_group_that_no_section_has(monkeypatch):
    class Stub:
        workload, missing = {"dtype": "float32"}, {}
        device = {"device_kind": "cpu"}

        def __init__(self, section, sizes):
            self.groups = {"peak": ["square product"], "steps": ["mcl", "router"]}[section]

        def measure(self, group, rounds):
            return [{"group": group, "program": "clipmoe_jax"}]

        def close(self):
            pass

    monkeypatch.setattr(run, "Sides", Stub)
    kept = []
    found = run.run(["steps"], {}, 1, ["router"], kept.append)
    assert [row["group"] for row in found["rows"]] == ["square product", "router"]
    with pytest.raises(SystemExit, match="'routers' is in none of --only: choose among .*mcl, router"):
        run.run(["steps"], {}, 1, ["mcl", "routers"], kept.append)
    assert [row["group"] for row in kept[-1]["rows"]] == ["square product", "mcl"]  # nothing is lost


def test_the_command(tmp_path):
    flags = ("--only=towers", "--variant=tiny", "--batch=4", "--text=16", "--rounds=1")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *flags, f"--out={tmp_path}/found.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {(row["group"], row["program"]): row for row in found["rows"]}
    groups = ("square product", "image", "text")
    assert rows.keys() == {(group, side) for group in groups for side in ("clipmoe_jax", "PyTorch")}
    assert not found["not_measured"] and "towers: text" in done.stdout
    for group in groups:
        own, other = rows[group, "clipmoe_jax"], rows[group, "PyTorch"]
        ratio = np.median(np.divide(other["seconds"], own["seconds"]))
        assert own["times_as_fast_as"]["PyTorch"] == pytest.approx(ratio)
        assert own["mfu"] == pytest.approx(own["tflops"] / found["peak"]["tflops"])
        if group != "square product":
            assert own["pairs_per_second"] == pytest.approx(4e3 / own["milliseconds"])
