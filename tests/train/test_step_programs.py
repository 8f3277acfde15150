"""What a phase will run is known from shapes, and compiles in another thread."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest
from compilations import recorded

from clipmoe_jax.core import sharding
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import ShuffledSampler
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.dmu.phases import placed_params
from clipmoe_jax.dmu.recipe import TRAIN_ADAPTERS, TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.train import loop, step_programs
from clipmoe_jax.train.adapters import NO_ADAPTERS, Adapters, add_adapters
from clipmoe_jax.train.loop import LoopConfig, fit
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.rehearsal import Drawn, Rehearsal, Targets
from clipmoe_jax.train.step import LossConfig, make_train_step
from clipmoe_jax.train.step_programs import CompiledAhead, Program, programs_of_phase

DENSE = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=1, head_width=8),
    text=TextConfig(context_length=32, width=16, num_layers=1, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))
PHASE = PhaseConfig(batch_size=16, learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, num_steps=5)
TARGETS = Targets(*np.ones((2, 200, 16), np.float32))
# What a phase has beside its own pairs, and on how many devices.
CASES = {
    "captions share rows": {},
    "a row a caption": {"packs": False},
    "short captions": {"short": True, "loss": LossConfig(short_caption_weight=0.5)},
    "microbatches": {"phase": dataclasses.replace(PHASE, accumulation_steps=2)},
    "routers": {"config": MOE, "rules": TRAIN_ROUTERS},
    "half precision is held": {"frozen_dtype": "bfloat16"},
    "a teacher": {"loss": LossConfig(imitates="features", teacher=MOE), "teacher": MOE},
    "rehearsed pairs": {"rehearsal": {}},
    "distilled": {"rehearsal": {"targets": TARGETS, "loss": LossConfig(imitates="similarities")}},
    "others' captions": {
        "rehearsal": {"targets": TARGETS, "loss": LossConfig(imitates="similarities"), "others": True}
    },
    "eight devices": {"mesh": {"data": 2, "fsdp": 4}, "frozen_dtype": "bfloat16"},
    "low-rank adapters": {"adapters": Adapters(rank=4), "rules": TRAIN_ADAPTERS},
}


def init_params(config, mesh):
    return sharding.init_params(
        mesh,
        lambda key: Clip(config).init(key, np.zeros((1, 32, 32, 3)), np.zeros((1, 32), np.int32))["params"],
        jax.random.key(0),
    )


def with_adapters(params, mesh, adapters):
    if adapters == NO_ADAPTERS:
        return params
    added = add_adapters(params, jax.random.key(0), adapters)
    return jax.tree.map(jax.device_put, added, sharding.param_shardings(mesh, added))


def read(scenes, case):
    return loader.DecodedPairs(
        Records(scenes), Tokenizer(32), 32, case.get("packs", True), case.get("short", False)
    )


def make_rehearsal(pairs, loss, targets=None, others=False, **settings):
    def drawn(seed):
        return Drawn(pairs, ShuffledSampler(len(pairs), 16, seed))

    return Rehearsal(drawn(1), 0.4, settings.get("loss", loss), targets, drawn(2) if others else None)


def settings_of(pairs, mesh, **changes):
    """What `fit` and `programs_of_phase` are both given."""
    return (
        dict(
            model=Clip(DENSE, ComputeConfig()),
            trainable_rules=TRAIN_FFN,
            pairs=pairs,
            sampler=ShuffledSampler(len(pairs), 16, 0),
            phase=PHASE,
            loss=LossConfig(),
            mesh=mesh,
            rehearsal=None,
        )
        | changes
    )


@pytest.mark.parametrize("name", CASES)
def test_programs_are_those_that_a_phase_calls(name, scenes, tmp_path, monkeypatch):
    case = CASES[name]
    mesh = sharding.make_mesh(**case.get("mesh", {}), devices=jax.devices()[: 8 if "mesh" in case else 1])
    config, pairs, loss = case.get("config", DENSE), read(scenes, case), case.get("loss", LossConfig())
    rehearsal = case.get("rehearsal")
    settings = settings_of(
        pairs,
        mesh,
        model=Clip(config, ComputeConfig()),
        trainable_rules=case.get("rules", TRAIN_FFN),
        phase=case.get("phase", PHASE),
        loss=loss,
        rehearsal=None if rehearsal is None else make_rehearsal(pairs, **{"loss": loss} | rehearsal),
    )
    adapters = case.get("adapters", NO_ADAPTERS)
    frozen_dtype, called = case.get("frozen_dtype", "float32"), []

    def make_recorder(*arguments):
        def step(state, *others):
            called.append(Program(make_train_step(*arguments), (state, *others)))
            return state, {"loss": np.float32(0)}

        return step

    monkeypatch.setattr(loop, "make_train_step", make_recorder)
    metrics = Metrics(tmp_path)
    fit(
        "phase",
        params=with_adapters(init_params(config, mesh), mesh, adapters),
        teacher=init_params(case["teacher"], mesh) if "teacher" in case else None,
        caption_turns=loader.CaptionTurns(0),
        seed=0,
        metrics=metrics,
        loop=LoopConfig(tmp_path / "checkpoints", frozen_dtype=frozen_dtype),
        **settings,
    )
    metrics.close()
    programs = programs_of_phase(
        params=placed_params(mesh, config, adapters),
        teacher=placed_params(mesh, case["teacher"]) if "teacher" in case else None,
        frozen_dtype=frozen_dtype,
        **settings,
    )
    assert len(called) == PHASE.num_steps
    assert {*map(described, called)} == {*map(described, programs)}


def described(program):
    """What decides whether a call finds a program: the step, and its arguments' shapes, types and places."""
    leaves, structure = jax.tree.flatten(program.arguments)
    parts = ((leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    return id(program.step), structure, tuple(parts)


def test_a_phase_compiles_nothing_that_is_compiled_ahead(scenes, tmp_path):
    """Two kinds of step, as JAX logs it; the phase may come at any time."""
    mesh, ahead = sharding.make_mesh(devices=jax.devices()[:1]), CompiledAhead()
    pairs = read(scenes, {})
    settings = settings_of(
        pairs,
        mesh,
        model=Clip(DENSE, ComputeConfig(compiler_options=(("xla_backend_optimization_level", 0),))),
        rehearsal=make_rehearsal(pairs, LossConfig(imitates="similarities"), TARGETS),
    )
    params, begun, metrics = init_params(DENSE, mesh), threading.Event(), Metrics(tmp_path)

    def make_programs():
        placed = placed_params(mesh, DENSE)
        programs = programs_of_phase(params=placed, frozen_dtype="float32", **settings)
        begun.set()
        return programs

    with contextlib.closing(metrics), recorded("train_step") as threads:
        ahead.begin("phase", mesh, make_programs)
        assert begun.wait(60)
        fit(
            "phase",
            params=params,
            caption_turns=loader.CaptionTurns(0),
            seed=0,
            metrics=metrics,
            loop=LoopConfig(tmp_path / "checkpoints"),
            **settings,
        )
        ahead._thread.shutdown(wait=True)
    assert len(threads) == 2 and any(name.startswith("compile") for name in threads)


def test_the_thread_ends_with_the_program_that_it_is_at():
    """Neither the phase's other programs nor those of the next are traced."""
    mesh, ahead, traced = sharding.make_mesh(devices=jax.devices()[:1]), CompiledAhead(), []
    is_at_first, may_go_on = threading.Event(), threading.Event()

    def program(name):
        def traceable(x):
            traced.append(name)
            is_at_first.set()
            assert may_go_on.wait(60)
            return 2 * x

        return Program(jax.jit(traceable), (jax.ShapeDtypeStruct((), np.float32),))

    ahead.begin("first", mesh, lambda: [program("a"), program("b")])
    ahead.begin("second", mesh, lambda: [program("c")])
    assert is_at_first.wait(60)
    ahead.close()
    may_go_on.set()
    ahead._thread.shutdown(wait=True)
    assert traced == ["a"]


def test_what_does_not_compile_ahead_is_told_and_left_to_the_phase(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(step_programs.logging, "warning", lambda text, *parts: told.append(text % parts))
    mesh, ahead, traced = sharding.make_mesh(devices=jax.devices()[:1]), CompiledAhead(), []
    ahead.begin("router", mesh, lambda: 1 / 0)
    good = Program(jax.jit(traced.append), (jax.ShapeDtypeStruct((), np.float32),))
    ahead.begin("next", mesh, lambda: [good])
    ahead._thread.shutdown(wait=True)
    assert told == ["router was not compiled ahead: division by zero"] and len(traced) == 1


def test_no_program_for_a_kind_of_step_that_a_phase_does_not_take(scenes):
    """A twentieth of five steps are none."""
    mesh, pairs = sharding.make_mesh(devices=jax.devices()[:1]), read(scenes, {})
    rehearsal = dataclasses.replace(make_rehearsal(pairs, LossConfig(), TARGETS), fraction=0.05)
    settings = settings_of(pairs, mesh, rehearsal=rehearsal)
    programs = programs_of_phase(params=placed_params(mesh, DENSE), frozen_dtype="float32", **settings)
    assert len(programs) == 1
