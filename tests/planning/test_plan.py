"""Plans against what is there when the planned step runs."""

import collections
import dataclasses
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from grids import exhaustive, grid

from benchmarks.collectives import sent
from clipmoe_jax.config import default_config
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.core.accelerators import ACCELERATORS
from clipmoe_jax.dmu.phases import (
    PlannedPhase,
    architectures_of,
    phases_of,
)
from clipmoe_jax.dmu.recipe import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import VARIANTS, Clip, ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.planning import plan
from clipmoe_jax.planning.memory import Tower, kept_bytes, plan_memory
from clipmoe_jax.planning.mfu import mfu_of
from clipmoe_jax.planning.transfers import Transfer, plan_transfers, transfer_seconds
from clipmoe_jax.reporting.plan_tables import format_plan
from clipmoe_jax.train.adapters import NO_ADAPTERS
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import LossConfig, init_state, make_train_step

DENSE = ClipConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=8, width=64, num_layers=2, head_width=32),
    text=TextConfig(vocab_size=512, context_length=24, width=48, num_layers=2, head_width=24),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))
BLOCKS = dataclasses.replace(DENSE, moe=MoeConfig(4, 2, expert_layers="attention_and_feed_forward"))
# ViT-B/32's widths, two blocks a tower.
WIDE = ClipConfig(vision=VisionConfig(num_layers=2), text=TextConfig(context_length=248, num_layers=2))
PHASE = PhaseConfig(batch_size=64, learning_rate=1e-3, weight_decay=0.1)
KINDS = {
    "everything": (DENSE, TRAIN_EVERYTHING),
    "feed-forward layers": (DENSE, TRAIN_FFN),
    "routers": (MOE, TRAIN_ROUTERS),
    "routers and experts": (MOE, TRAIN_MOE),
    "all of an MoE": (MOE, TRAIN_EVERYTHING),
    "routers of blocks": (BLOCKS, TRAIN_ROUTERS),
    "routers and experts of blocks": (BLOCKS, TRAIN_MOE),
}


def phase_of(kind, settings=PHASE, **compute):
    config, rules = KINDS[kind]
    return PlannedPhase("it", config, ComputeConfig(**compute), rules, settings, 10)


def abstract(mesh):
    return sharding.make_abstract_mesh(*mesh.shape.values(), num_devices=mesh.size)


def started(kind, mesh):
    """Params and state of a kind of phase, on devices."""
    config, rules = KINDS[kind]
    images, tokens = np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 24), np.int32)
    params = sharding.init_params(
        mesh, lambda key: Clip(config).init(key, images, tokens)["params"], jax.random.key(0)
    )
    trainable, frozen = trees.partition(params, rules)
    return init_state(mesh, PHASE, trainable), frozen


def bytes_on_first_device(tree) -> int:
    device = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    grid(
        ("routers and experts", (2, 2, 2)),
        rest=[
            ("everything", (1, 8, 1)),
            *((kind, (2, 2, 2)) for kind in KINDS if kind != "routers and experts"),
        ],
    ),
    ids=str,
)
def test_planned_bytes_are_those_on_a_device(kind, sizes):
    mesh = sharding.make_mesh(*sizes)
    state, frozen = started(kind, mesh)
    memory = plan_memory(abstract(mesh), phase_of(kind))
    assert memory.params == bytes_on_first_device(state.trainable) + bytes_on_first_device(frozen)
    assert memory.optimizer == bytes_on_first_device(state.opt_state)
    assert memory.gradients == bytes_on_first_device(state.trainable)


@pytest.mark.parametrize(
    ("kind", "sizes", "name"),
    grid(
        rest=[
            ("routers and experts", (2, 1, 4), "ragged"),
            ("feed-forward layers", (8, 1, 1), "ragged"),
            ("routers", (2, 1, 4), "ragged"),
            ("routers", (2, 1, 4), "capacity"),
            ("all of an MoE", (2, 1, 4), "ragged"),
            ("all of an MoE", (2, 1, 4), "capacity"),
            ("routers of blocks", (2, 1, 4), "ragged"),
            ("routers of blocks", (2, 1, 4), "capacity"),
            ("routers and experts of blocks", (2, 1, 4), "ragged"),
            ("routers and experts of blocks", (2, 1, 4), "capacity"),
        ],
    ),
    ids=str,
)
def test_compiled_step_sends_what_is_planned(kind, sizes, name):
    """The compiled step has the collectives of the plan, and otherwise only what is a few numbers for each
    pair: log-sums, shares of experts, metrics."""
    mesh = sharding.make_mesh(*sizes)
    planned = collections.Counter()
    for transfer in plan_transfers(abstract(mesh), phase_of(kind, dispatch=name)):
        planned[transfer.operation] += transfer.num_bytes
    compiled = sent(compiled_step(kind, mesh, dispatch=name))
    assert compiled.keys() == planned.keys()
    for operation, num_bytes in planned.items():
        assert compiled[operation] == pytest.approx(num_bytes, abs=2000, rel=0.01), operation


@pytest.mark.parametrize(
    ("kind", "sizes", "in_half", "in_float32"),
    [
        # Kernels, and biases, of two feed-forward layers of each tower.
        ("feed-forward layers", (8, 1, 1), 4 * 64 * 256 + 4 * 48 * 192, 2 * (256 + 64) + 2 * (192 + 48)),
        ("feed-forward layers", (1, 8, 1), 4 * 64 * 256 + 4 * 48 * 192, 2 * (256 + 64) + 2 * (192 + 48)),
        ("routers", (8, 1, 1), 0, 2 * 64 * 4 + 2 * 48 * 4),
    ],
    ids=str,
)
def test_gradients_travel_as_products_make_them(kind, sizes, in_half, in_float32):
    """In half precision but for vectors and routers. What is split over fsdp is scattered once, the rest is
    reduced to all: twice 7/8 of it."""
    transfers = plan_transfers(abstract(sharding.make_mesh(*sizes)), phase_of(kind, dtype="bfloat16"))
    gradients = {t.operation: t.num_bytes for t in transfers if t.what == "gradients"}
    if sizes[1] == 1:
        assert gradients == {"all-reduce": 7 / 8 * 2 * (2 * in_half + 4 * in_float32)}
    else:
        assert gradients == {"reduce-scatter": 7 / 8 * 2 * in_half, "all-reduce": 7 / 8 * 2 * 4 * in_float32}


def test_accumulated_gradients_travel_once_and_in_float32():
    phase = dataclasses.replace(PHASE, accumulation_steps=2)
    half, full = (
        [
            t.num_bytes
            for t in plan_transfers(
                abstract(sharding.make_mesh(8, 1, 1)), phase_of("feed-forward layers", phase, dtype=dtype)
            )
            if t.what == "gradients"
        ]
        for dtype in ("bfloat16", "float32")
    )
    assert half == full


def test_every_microbatch_gathers_and_scatters():
    """Parameters forward, and forward and backward again; matrices' gradients as products make them."""
    mesh = abstract(sharding.make_mesh(2, 4, 1))
    whole, parts = (
        {
            (transfer.operation, transfer.axes): transfer.num_bytes
            for transfer in plan_transfers(
                mesh,
                phase_of(
                    "feed-forward layers",
                    dataclasses.replace(PHASE, accumulation_steps=steps),
                    dtype="bfloat16",
                ),
            )
            if transfer.what in ("parameters", "gradients")
        }
        for steps in (1, 4)
    )
    assert parts["all-gather", ("fsdp",)] == 4 * 2 * whole["all-gather", ("fsdp",)]
    assert parts["reduce-scatter", ("fsdp",)] == 4 * whole["reduce-scatter", ("fsdp",)]
    assert parts["all-reduce", ("data",)] == 2 * whole["all-reduce", ("data",)]  # once, in float32


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    mesh = sharding.make_mesh(8, 1, 1)

    @jax.jit
    def powers(x):
        def body(x, _):
            return sharding.split_batch(x @ x), None

        return jax.lax.scan(body, x, None, length=5)[0]

    x = jax.device_put(np.eye(64, dtype=np.float32), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        num_bytes = sent(powers.lower(x).compile().as_text())
    assert num_bytes == {"all-gather": 5 * 7 / 8 * 64 * 64 * 4}


@exhaustive
@pytest.mark.parametrize("remat", grid("full", rest=["none", "dots"]))
def test_fsdp_gathers_parameters_and_no_activations(remat):
    """Once; with remat once more for the backward pass. The last feed-forward layer sees one token of a pair:
    of fewer pairs than here XLA gathers those instead of adding up its kernels' gradients."""
    mesh, phase = sharding.make_mesh(1, 8, 1), dataclasses.replace(PHASE, batch_size=256)
    expected = sum(
        transfer.num_bytes
        for transfer in plan_transfers(abstract(mesh), phase_of("feed-forward layers", phase, remat=remat))
        if transfer.operation == "all-gather"
    )
    num_bytes = sent(compiled_step("feed-forward layers", mesh, phase, remat=remat))
    assert num_bytes["all-gather"] == pytest.approx(expected, rel=0.01)
    assert "all-to-all" not in num_bytes


def compiled_step(kind, mesh, phase=PHASE, **compute) -> str:
    state, frozen = started(kind, mesh)
    step = make_train_step(Clip(KINDS[kind][0], ComputeConfig(**compute)), LossConfig(0.1, 0.01), phase)
    num_pairs = phase.batch_size
    batch = {
        "image": np.zeros((num_pairs, 32, 32, 3), np.uint8),
        "text": np.ones((num_pairs, 24), np.int32),
    }
    rate = sharding.put_replicated(mesh, np.float32(0))
    key = jax.jit(lambda: jax.random.key(0), out_shardings=sharding.replicated(mesh))()
    with jax.set_mesh(mesh):
        lowered = step.lower(state, frozen, sharding.put_batch(mesh, batch), rate, key)
        return lowered.compile().as_text()


def test_stages_and_steps():
    config = default_config()
    config.baselines = (
        *("direct_ft", "full_ft", "direct_ft_same_pairs", "long_clip", "sparse_upcycling"),
        *("drop_upcycling", "clip_up", "base_ft_moe", "feature_ensemble"),
    )
    by_name = {phase.name: phase for phase in phases_of(config, "cuda", 1_246_000)}
    names = ["mcl_1", "mcl_2", "mcl_3", "router", *config.baselines]
    assert set(by_name) == {*names} - {"feature_ensemble"}
    steps = 1_246_000 // 800
    assert by_name["mcl_2"].num_steps == by_name["router"].num_steps == steps
    assert by_name["direct_ft_same_pairs"].num_steps == 4 * steps
    assert by_name["base_ft_moe"].architecture.moe.num_experts == 2
    assert by_name["long_clip"].short_length == 64 and by_name["full_ft"].short_length == 0
    # mcl and direct_ft; router; full_ft; long_clip; base_ft_moe; sparse_upcycling, drop_upcycling; clip_up.
    assert len({phase.step_key for phase in by_name.values()}) == 7


def test_papers_time_is_a_plausible_mfu():
    """86 pairs a second on each of 8 A100, half an hour a stage (arXiv 2409.19291, section 4.1), is 14.5 %
    of their peak by our count."""
    dense, _ = architectures_of(default_config())
    trains = trees.match_rules(TRAIN_FFN, list(trees.flatten(abstract_params(dense))))
    peak = ACCELERATORS["a100"].peak_flops
    assert 86 * flops.forward_backward(dense, trains) / peak == pytest.approx(0.145, abs=0.002)


def test_time_is_at_the_mfu_that_was_measured():
    """One H100 takes 140.9 and 189.9 ms for 100 pairs of ViT-L/14 (benchmarks/results/h100.jsonl)."""
    config = default_config()
    config.mcl.batch_size = config.router.batch_size = 100
    config.compute.remat = "dots"
    lines = format_plan(plan.make_plan(config, "h100", 1, 1_246_000)).splitlines()
    for name, milliseconds, mfu in (("mcl_1", 140.9, "0.38 measured"), ("router", 189.9, "0.34 measured")):
        [step] = [line for line in lines if line.startswith(f"a step of {name}:")]
        assert float(step.split(" a device, ")[1].split()[0]) == pytest.approx(milliseconds, rel=5e-3)
        assert any(line.startswith(name) and mfu in line for line in lines)


def test_mfu_is_given_or_measured_or_assumed():
    large, small = VARIANTS["ViT-L/14"], VARIANTS["ViT-B/32"]
    dots, full = ComputeConfig(remat="dots"), ComputeConfig(remat="full")
    assert mfu_of("h100", large, dots, 1.0, 0.5) == (0.5, "given")
    share, source = mfu_of("h100", large, dots, 1.4, None)
    assert share == pytest.approx(0.377 / 1.4) and source == "measured"
    for accelerator, architecture, compute in (
        ("v5p", large, dots),
        ("h100", small, dots),
        ("h100", large, full),
    ):
        assert mfu_of(accelerator, architecture, compute, 1.0, None) == (0.4, "assumed")


@exhaustive
def test_steps_fit_where_they_fitted():
    """One H100 needs 18.8 GiB for an MCL step of 100 pairs of ViT-L/14 and 24.1 for a router step; without
    computing anything again 26.8 and 27.3 (benchmarks/results/h100.jsonl). The plan is an upper bound."""
    config = default_config()
    config.mcl.batch_size = config.router.batch_size = 100
    needed = {"dots": {"mcl_1": 18.8, "router": 24.1}, "none": {"mcl_1": 26.8, "router": 27.3}}
    for remat, of_step in needed.items():
        config.compute.remat = remat
        whole = plan.make_plan(config, "h100", 1, 1_246_000)
        for name, measured in of_step.items():
            planned = sum(whole.steps[name][1].memory) / 2**30
            assert measured < planned < 1.2 * measured


@pytest.mark.parametrize(
    ("sizes", "compute", "slots"),
    [
        ((1, 1, 1), {}, 2),
        ((1, 1, 2), {}, 4),  # tokens of both devices
        ((1, 1, 4), {}, 4),
        ((1, 1, 1), {"dispatch": "dense"}, 4),
        ((1, 1, 1), {"dispatch": "capacity", "capacity_factor": 1.5}, 3),
    ],
    ids=str,
)
def test_inputs_of_experts_that_train_count_in_every_row_they_have(sizes, compute, slots):
    """Where cuDNN attends, remat="none" keeps what "dots" does, and what trained kernels multiply: of the
    images' first block, 17 tokens, c_fc 64 and c_proj 256 values a row, and the router 64 in float32; of the
    last one token's experts."""
    mesh = sharding.make_abstract_mesh(*sizes, num_devices=math.prod(sizes))
    rules, compute = tuple(TRAIN_MOE), {"attention": "cudnn", **compute}
    dots, none = (
        kept_bytes(Tower("image", mesh, MOE, ComputeConfig("bfloat16", remat, **compute), NO_ADAPTERS, rules))
        for remat in ("dots", "none")
    )
    assert none - dots == 2 * slots * (17 + 1) * (64 + 256) + 4 * 2 * 17 * 64


def test_plan_computes_again_what_does_not_fit():
    """Of wide towers 1,200 pairs fit into 80 GB with all that a step keeps, and into 16 GB without
    norms and activations. The largest batch is the one that still fits with dots."""
    config, largest = default_config(), {}
    config.base.architecture = WIDE.to_dict()
    config.mcl.batch_size = config.router.batch_size = 1200
    for accelerator, remat in (("h100", "none"), ("v5e", "dots")):
        whole = plan.make_plan(config, accelerator, 1, mfu=0.4, num_pairs=100_000_000)
        assert {phase.compute.remat for phase, *_ in whole.steps.values()} == {remat}
        assert f"(remat {remat}, computed " in format_plan(whole)
        for given in ("auto", "dots", "none"):
            config.compute.remat = given
            whole = plan.make_plan(config, accelerator, 1, mfu=0.4, num_pairs=100_000_000)
            largest[given] = [one.largest for one in whole.limits if "memory" in one.effect]
        config.compute.remat = "auto"
        assert largest["none"] < largest["auto"] == largest["dots"]


def test_printed_plan_marks_steps_that_do_not_fit():
    config = default_config()
    config.base.architecture = WIDE.to_dict()
    config.mcl.batch_size = config.router.batch_size = 32768
    config.data.weights = (3, 1)
    whole = plan.make_plan(config, "v5e", 8, mfu=0.4, num_pairs=100_000_000)
    lines = format_plan(whole).splitlines()
    assert lines[0].startswith(
        "8 × TPU v5e: 197 TFLOP/s in bfloat16, 16 GB each; mesh data 8 × fsdp 1 × expert 1"
    )
    assert lines[1] == "Sources are drawn from in the shares 75.0 %, 25.0 %."
    stages = [stage.name for stage in whole.stages]
    assert stages == ["embed_1", "mcl_1", "embed_2", "mcl_2", "embed_3", "mcl_3", "router"]
    total = sum(stage.seconds for stage in whole.stages) * 8 / 3600
    assert next(line for line in lines if line.startswith("all ")).endswith(f"{total:.2f}")
    # 4,096 pairs a device are too many for 16 GB when nothing is computed again.
    tight = [line.split()[0] for line in lines if line.endswith("does not fit into 16 GB")]
    assert tight == ["mcl_1", "router"]
    # The longest names leave the columns where they are.
    long = [dataclasses.replace(stage, name=f"{stage.name}_{30 * 'x'}") for stage in whole.stages]
    table = format_plan(dataclasses.replace(whole, stages=long)).split("\n\n")[2].splitlines()
    assert len({len(line) for line in table}) == 1 and len(table) == len(long) + 2


def test_remat_and_accumulation_are_not_mfu():
    mesh = sharding.make_abstract_mesh(8, 1, 1, num_devices=8)
    plain = plan.plan_step(mesh, phase_of("feed-forward layers"))
    again = plan.plan_step(mesh, phase_of("feed-forward layers", remat="full"))
    assert again.flops == plain.flops and plain.computed == 1 and 1.2 < again.computed < 1.6
    assert again.memory.activations < plain.memory.activations / 2


def test_a_step_whose_gradient_reaches_all_experts_runs_them_all():
    mesh = sharding.make_abstract_mesh(4, 1, 2, num_devices=8)
    steps = [plan.plan_step(mesh, phase_of("routers", router_gradient=which)) for which in ("chosen", "all")]
    dense = plan.plan_step(mesh, phase_of("routers", dispatch="dense"))
    chosen, of_all = steps
    assert of_all.flops == pytest.approx(dense.flops * dense.computed) and of_all.computed == 1
    assert of_all.flops > 1.2 * chosen.flops and of_all.memory.activations > chosen.memory.activations
    gates = [sum(t.num_bytes for t in step.transfers if t.what == "words, gates, ids") for step in steps]
    assert gates[1] > gates[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mcl.batch_size": 800}, "mcl_1: batch size 800 cannot be split over 256 devices"),
        ({"mesh.expert": 3}, "mesh data=85 x fsdp=1 x expert=3 does not use the 256 devices"),
        ({"mesh.expert": 8}, "axis of size 4, which mesh.expert=8 does not divide: choose mesh.expert among"),
    ],
    ids=["batch", "mesh", "experts"],
)
def test_run_that_would_be_refused_has_no_plan(change, message):
    config = default_config()
    config.mcl.batch_size = config.router.batch_size = 1024
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan.make_plan(config, "v5p", 256, mfu=0.4, num_pairs=1_246_000)


def run_command(module, *flags):
    command = [sys.executable, "-m", f"clipmoe_jax.{module}", *flags]
    # As on a login node: there are no such devices, and none are needed.
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "config", grid("tests/pipeline/tiny_config.py", rest=["configs/demo.py:small"]), ids=["tiny", "demo"]
)
def test_command_prints_the_plan(config):
    done = run_command("plan", f"--config={config}", "--devices=2")
    assert done.returncode == 0, done.stderr
    assert "mcl_1" in done.stdout and "device-hours" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "how many pairs? Set --pairs"),
        (
            ("--pairs=500", "--config.router.batch_size=400"),
            "mcl.batch_size=800 is more than the 500 training",
        ),
    ],
    ids=["no data", "less than a batch"],
)
def test_command_ends_with_one_line(flags, message):
    done = run_command("plan", "--config=configs/vit_b32.py", "--config.router.warmup_steps=0", *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"error: {message}")


def test_main_names_the_command_for_the_flags_it_had():
    done = run_command("main", "--config=configs/vit_b32.py", "--plan_accelerator=v5p", "--plan")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "python -m clipmoe_jax.plan --config=" in done.stderr


@exhaustive
def test_short_captions_cost_a_second_pass_of_the_text_tower():
    """64 of 248 positions; the step lowers."""
    config = default_config()
    config.base.architecture = WIDE.to_dict()
    before = plan.make_plan(config, "v5e", 8, mfu=0.4, num_pairs=1_000_000)
    config.loss.short_caption_weight = 1.0
    after = plan.make_plan(config, "v5e", 8, mfu=0.4, num_pairs=1_000_000)
    for name in ("mcl_1", "router"):
        phase, step, _ = after.steps[name]
        names = list(trees.flatten(abstract_params(phase.architecture)))
        trains = trees.match_rules(phase.rules, names)
        more = flops.forward_backward(phase.architecture, trains, 64, towers=["text"])
        assert step.flops - before.steps[name][1].flops == pytest.approx(more) and more > 0
        assert step.memory.activations > 1.05 * before.steps[name][1].memory.activations


H100, V5E = ACCELERATORS["h100"], ACCELERATORS["v5e"]


@pytest.mark.parametrize(
    ("sizes", "axes", "milliseconds"),
    [
        # 1.8 GB at 450 GB/s of NVLink.
        ((8, 1, 1), ["data"], 4.0),
        # Two nodes: 50 GB/s for each of 8 cards are 400 GB/s a node, less than NVLink.
        ((16, 1, 1), ["data"], 4.5),
        # Of 8 neighbours 4 differ in the expert axis, so 2 are of one group along data: 100 GB/s.
        ((8, 1, 4), ["data"], 18.0),
        ((8, 1, 4), ["expert"], 4.0),
        ((8, 1, 4), ["data", "expert"], 4.5),
        # A node is within one row of fsdp: all that goes over data leaves it, 50 GB/s.
        ((2, 16, 1), ["data"], 36.0),
        ((2, 16, 1), ["fsdp"], 4.5),
    ],
    ids=str,
)
def test_time_of_a_transfer(sizes, axes, milliseconds):
    mesh = sharding.make_abstract_mesh(*sizes, num_devices=int(np.prod(sizes)))
    transfer = Transfer(tuple(axes), "gradients", "all-reduce", 1.8e9)
    assert transfer_seconds(H100, mesh, transfer) == pytest.approx(milliseconds / 1e3)
