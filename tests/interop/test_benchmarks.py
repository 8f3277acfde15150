"""`python -m benchmarks.steps`: both sides compute the same, and its numbers follow from measured seconds."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from grids import exhaustive

from benchmarks import features, ours, peers, profiles, steps, timing
from benchmarks.workload import RULES, Workload
from clipmoe_jax.core import accelerators, trees
from clipmoe_jax.interop import huggingface
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import abstract_params

ROOT = pathlib.Path(__file__).parents[2]
# Captions of 3 to 32 tokens: padding is there and must count for nothing.
TINY = Workload("tiny", 4, 32, "float32", "cpu", caption_tokens=12, expert_dropout_rate=0.0)


@exhaustive
@pytest.mark.parametrize("kind", sorted(RULES))
def test_step_is_the_same_step_in_pytorch(kind):
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
    """Trained leaves under PyTorch's names, without the others."""
    abstract = trees.flatten(abstract_params(TINY.model(kind).config))
    whole = {
        name: np.asarray(leaves.get(name, np.full(leaf.shape, np.nan))) for name, leaf in abstract.items()
    }
    exported = huggingface.export_state_dict(trees.unflatten(whole))
    return {name: array for name, array in exported.items() if not np.isnan(array).any()}


def test_flops_leave_padding_out():
    lengths = TINY.lengths()
    assert lengths.max() < 32
    np.testing.assert_array_equal((TINY.padded_tokens() != 0).sum(axis=1), lengths)
    shorter = dataclasses.replace(TINY, text=int(lengths.max()))
    assert TINY.step_flops("mcl") == shorter.step_flops("mcl")
    full = dataclasses.replace(TINY, caption_tokens=0)
    assert TINY.step_flops("mcl") < full.step_flops("mcl")


def test_flops_of_steps():
    """Where everything trains the backward pass is about twice the forward pass."""
    large = Workload("ViT-L/14", 2, 248, "float32", "cpu")
    ratio = large.step_flops("everything") / (2 * flops.forward(large.model("everything").config))
    assert 2.95 < ratio <= 3
    assert large.step_flops("mcl") < large.step_flops("everything")


def test_rows_follow_from_seconds():
    told = {"first_call_s": 9.0, "flops": 8e12, "pairs": 10}
    # Ratios round by round: 2, 3, 10; that of the medians would be 6 / 2.5.
    seconds = {steps.OURS: [1, 2.5, 3], steps.THEIRS: [2, 7.5, 30]}
    mine, theirs = steps.make_rows(seconds, dict.fromkeys(seconds, told), peak_flops=32e12)
    assert (mine["milliseconds"], mine["pairs_per_second"], mine["tflops"]) == (2500, 4, 3.2)
    assert (mine["times_as_fast"], mine["mfu"]) == (3, 0.1)
    assert "times_as_fast" not in theirs
    rows = [{"kind": "mcl", **mine}, {"kind": "router", "program": "PyTorch", "error": "out of memory"}]
    _, line, of_error = steps.format_rows(rows).splitlines()
    assert line.split() == ["mcl:", "clipmoe_jax", "2,500.00", "4.0", "3.200", "10.0%", "3.00"]
    assert of_error.endswith("  not measured: out of memory")


def test_peak_is_known_by_the_kind_of_device():
    assert accelerators.of_kind("TPU v5 lite").name == "TPU v5e" and accelerators.of_kind("cpu") is None


def test_device_that_pytorch_has_not_is_named():
    with pytest.raises(ValueError, match="no device of the kind 'tpu'"):
        peers.make_program("mcl", dataclasses.asdict(TINY) | {"platform": "tpu"})


@exhaustive
def test_process_that_fails_tells_why():
    sizes = dataclasses.asdict(TINY) | {"platform": "tpu"}
    with pytest.raises(RuntimeError, match="ValueError: PyTorch has no device of the kind 'tpu'"):
        timing.Worker(steps.SIDES[steps.THEIRS], "product", sizes)


def run_benchmark(name, out, *flags):
    """The JSON that a command writes, and what it prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags, f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    return json.loads(out.read_text()), done.stdout


@exhaustive
def test_command(tmp_path):
    flags = ("--kinds=mcl", "--variant=tiny", "--batch=4", "--text=16", "--rounds=2")
    content, printed = run_benchmark("steps", tmp_path / "out.json", *flags)
    mine, theirs = content["rows"]
    assert [mine["program"], theirs["program"]] == [steps.OURS, steps.THEIRS]
    ratio = np.median(np.divide(theirs["seconds"], mine["seconds"]))
    assert mine["times_as_fast"] == pytest.approx(ratio)
    assert mine["pairs_per_second"] == pytest.approx(4e3 / mine["milliseconds"])
    assert "mcl: PyTorch" in printed and {"jax", "torch"} <= content["device"].keys()


@exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_are_those_of_transformers_open_clip_and_onnx(tmp_path, dtype):
    """The command refuses features that differ, and times each program in each round."""
    flags = (
        "--variant=tiny",
        "--parts=encode,files",
        "--batches=2",
        "--files=6",
        "--rounds=2",
        f"--dtype={dtype}",
    )
    content, _ = run_benchmark("features", tmp_path / "out.json", *flags)
    rows = content["rows"]
    assert [row["name"] for row in rows] == ["image, batch 2", "text, batch 2", "6 files"]
    encoders = {features.OURS, features.TRANSFORMERS, features.OPEN_CLIP}
    if dtype == "float32":
        encoders.add(features.ONNX)
    for row, programs in zip(rows, (encoders, encoders, {features.OURS, features.OPEN_CLIP}), strict=True):
        assert row["seconds"].keys() == programs and all(len(s) == 2 for s in row["seconds"].values())


def test_other_features_are_refused(monkeypatch):
    class Worker:
        def __init__(self, side, kind, sizes):
            self.told = {"features": [[1.0, 0.0 if sizes["program"] == features.OURS else 0.1]]}

    monkeypatch.setattr(features, "Worker", Worker)
    with pytest.raises(ValueError, match="image: open_clip has other features than clipmoe_jax"):
        features.measure("image", [features.OURS, features.OPEN_CLIP], {"dtype": "float32"}, 1)


def test_parts_of_a_compilation_are_named_and_timed(tmp_path):
    with profiles.trace(str(tmp_path), device=False):
        began = time.perf_counter()
        jax.jit(lambda x: jax.nn.softmax(x @ x)).lower(np.ones((16, 16), np.float32)).compile()
        seconds = time.perf_counter() - began
    parts = {part["part"]: part for part in profiles.parts(str(tmp_path))}
    assert "CpuCompiler::RunBackend" in parts, sorted(parts)
    assert all(part["seconds"] >= 0 and part["times"] >= 1 for part in parts.values())
    assert parts["CpuCompiler::RunBackend"]["seconds"] < seconds
