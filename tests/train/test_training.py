"""The training step and loop: what is frozen stays, what is accumulated, sharded or resumed is the same."""

import dataclasses
import functools
import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive, grid

from clipmoe_jax.core import distributed, sharding, trees
from clipmoe_jax.core.checkpoints import Checkpointer
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.data.packing import pack, place_captions
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import ShuffledSampler
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.dmu.recipe import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_MOE, TRAIN_ROUTERS, TRAIN_TOWERS
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, normalize_features
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.models.inputs import END_ID
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
from clipmoe_jax.train import step as step_module
from clipmoe_jax.train.loop import LoopConfig, Validation, _Best, fit
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import TEACHER, LossConfig, TrainState, init_state, make_train_step

DENSE = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=1, head_width=8),
    text=TextConfig(context_length=32, width=16, num_layers=1, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))
# A large eps: some gradients (of attention's key biases) are zero but for rounding, which Adam would blow up.
PHASE = PhaseConfig(
    batch_size=16, learning_rate=1e-2, weight_decay=0.1, warmup_steps=2, num_steps=7, eps=1e-3
)
LOSS = LossConfig(label_smoothing=0.1, balance_coefficient=0.01)
KINDS = {
    "everything": (DENSE, TRAIN_EVERYTHING),
    "feed-forward layers": (DENSE, TRAIN_FFN),
    "routers": (MOE, TRAIN_ROUTERS),
    "routers and experts": (MOE, TRAIN_MOE),
}


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def init_params(config, mesh):
    images, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 32), jnp.int32)
    return sharding.init_params(
        mesh, lambda key: Clip(config).init(key, images, tokens)["params"], jax.random.key(0)
    )


@pytest.fixture(scope="module")
def pairs(scenes):
    return loader.DecodedPairs(Records(scenes), Tokenizer(32), 32)


@pytest.fixture(scope="module")
def batches(pairs):
    sampler = ShuffledSampler(len(pairs), 16, seed=0)
    return [pairs.gather(sampler.indices(step)) for step in range(3)]


def run_steps(
    config,
    rules,
    mesh,
    batches,
    phase=PHASE,
    run=ComputeConfig(),  # noqa: B008 (frozen)
    loss=LOSS,
    teacher=None,
):
    """(params, list of losses) after a step on each batch."""
    params = init_params(config, mesh)
    trainable, frozen = trees.partition(params, rules)
    given = frozen | {TEACHER: teacher} if teacher else frozen
    state = init_state(mesh, phase, trainable)
    step, losses = make_train_step(Clip(config, run), loss, phase), []
    with jax.set_mesh(mesh):
        for batch in batches:
            arrays = sharding.put_batch(mesh, batch)
            state, metrics = step(state, given, arrays, np.float32(1e-2), jax.random.key(1))
            losses.append(float(metrics["loss"]))
    return jax.device_get(trees.merge(state.trainable, frozen)), losses


@pytest.fixture(scope="module")
def on_one_device(batches):
    """kind -> what three steps on one device give, computed once."""
    return functools.cache(lambda kind: run_steps(*KINDS[kind], one_device(), batches))


@pytest.mark.parametrize(
    "kind", grid("feed-forward layers", "routers and experts", rest=["everything", "routers"])
)
def test_only_what_trains_changes(kind, on_one_device):
    config, rules = KINDS[kind]
    before = trees.flatten(jax.device_get(init_params(config, one_device())))
    after = trees.flatten(on_one_device(kind)[0])
    trains = trees.match_rules(rules, list(before))
    for name, leaf in before.items():
        same = np.array_equal(leaf, after[name])
        assert same != trains[name], f"{name}: trains={trains[name]}, unchanged={same}"


def test_no_optimizer_state_for_frozen_leaves():
    params = init_params(DENSE, one_device())
    trainable, frozen = trees.partition(params, TRAIN_FFN)
    state = init_state(one_device(), PHASE, trainable)
    # Two moments a trainable parameter and Adam's step count, nothing else.
    assert trees.count_parameters(state.opt_state) == 2 * trees.count_parameters(trainable) + 1
    assert trees.count_parameters(frozen) > trees.count_parameters(trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))  # no second copy on the device


# Every mesh, and every kind of training on one at least.
MESHES = grid(
    ("routers and experts", (2, 2, 2)),
    rest=[
        ("everything", (2, 2, 2)),
        ("everything", (4, 2, 1)),
        ("feed-forward layers", (8, 1, 1)),
        ("routers", (2, 1, 4)),
        ("routers and experts", (2, 1, 4)),
    ],
)


@pytest.mark.parametrize(("kind", "sizes"), MESHES, ids=str)
def test_sharded_steps_equal_one_device(kind, sizes, batches, on_one_device):
    expected_params, expected_losses = on_one_device(kind)
    params, losses = run_steps(*KINDS[kind], sharding.make_mesh(*sizes), batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-4, atol=1e-5)


@exhaustive
def test_two_blocks_on_eight_devices(batches):
    """The last block computes its feed-forward layer for the class token alone, the one before for all."""
    config = dataclasses.replace(MOE, vision=dataclasses.replace(MOE.vision, num_layers=2))
    expected_params, expected_losses = run_steps(config, TRAIN_MOE, one_device(), batches)
    params, losses = run_steps(config, TRAIN_MOE, sharding.make_mesh(2, 2, 2), batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-4, atol=1e-5)


@exhaustive
def test_eight_experts_on_eight_devices(batches):
    config = dataclasses.replace(DENSE, moe=MoeConfig(8, 2))
    expected_params, expected_losses = run_steps(config, TRAIN_MOE, one_device(), batches)
    params, losses = run_steps(config, TRAIN_MOE, sharding.make_mesh(1, 1, 8), batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-4, atol=1e-5)


@exhaustive
def test_expert_weights_are_never_gathered(batches):
    """Tokens go to the experts and come back: each device computes with the one expert that it holds."""
    mesh = sharding.make_mesh(2, 1, 4)
    trainable, frozen = trees.partition(init_params(MOE, mesh), TRAIN_MOE)
    state, arrays = init_state(mesh, PHASE, trainable), sharding.put_batch(mesh, batches[0])
    step = make_train_step(Clip(MOE), LOSS, PHASE)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, arrays, np.float32(0), jax.random.key(0)).compile().as_text()
    gathered = re.findall(r"= \S*?\[([\d,]*)\]\S* all-gather", compiled)
    scattered = re.findall(r"= \S*?\[([\d,]*)\]\S* reduce-scatter", compiled)
    # The last block's experts see the class tokens of 16 images on 2 x 4 devices: a group of 4 gathers its 8.
    assert "8,16" in gathered and "2,16" in scattered
    expert_shapes = {"4,16,64", "4,64,16", "4,64", "4,16"}
    assert not expert_shapes & set(gathered), "expert weights are gathered"


@pytest.mark.parametrize("kind", grid("routers and experts", rest=["everything"]))
def test_accumulation_gives_the_gradient_of_the_whole_batch(kind, batches, on_one_device):
    """Contrastive loss and load balance couple all pairs of a batch; four microbatches change neither."""
    phase = dataclasses.replace(PHASE, accumulation_steps=4)
    params, losses = run_steps(*KINDS[kind], one_device(), batches, phase=phase)
    np.testing.assert_allclose(losses, on_one_device(kind)[1], rtol=1e-5)
    chex.assert_trees_all_close(params, on_one_device(kind)[0], rtol=1e-4, atol=1e-5)


@exhaustive
def test_short_captions_accumulated_and_sharded(batches, pairs):
    """The second loss counts with its weight, and is that of the whole batch too."""
    weighted = dataclasses.replace(LOSS, short_caption_weight=0.5)
    short = [batch | {"short_text": np.ascontiguousarray(batch["text"][:, :12])} for batch in batches]
    expected = run_steps(MOE, TRAIN_MOE, one_device(), short, loss=weighted)
    params, plain = run_steps(MOE, TRAIN_MOE, one_device(), batches)
    assert expected[1][0] > plain[0] + 1
    accumulating = dataclasses.replace(PHASE, accumulation_steps=2)
    for mesh, phase in ((one_device(), accumulating), (sharding.make_mesh(2, 2, 2), PHASE)):
        params, losses = run_steps(MOE, TRAIN_MOE, mesh, short, phase=phase, loss=weighted)
        np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
        chex.assert_trees_all_close(params, expected[0], rtol=1e-4, atol=1e-5)


@exhaustive
def test_accumulation_on_several_devices_splits_every_microbatch(batches, on_one_device):
    """Eight devices, 16 pairs in two microbatches: each device computes one row of each."""
    phase, mesh = dataclasses.replace(PHASE, accumulation_steps=2), sharding.make_mesh()
    params, losses = run_steps(*KINDS["everything"], mesh, batches, phase=phase)
    np.testing.assert_allclose(losses, on_one_device("everything")[1], rtol=1e-5)
    chex.assert_trees_all_close(params, on_one_device("everything")[0], rtol=1e-4, atol=1e-5)
    trainable, frozen = trees.partition(init_params(DENSE, mesh), TRAIN_EVERYTHING)
    state, arrays = init_state(mesh, phase, trainable), sharding.put_batch(mesh, batches[0])
    step = make_train_step(Clip(DENSE, ComputeConfig(attention="chunked")), LOSS, phase)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, arrays, np.float32(0), jax.random.key(0)).compile().as_text()
    # The image tower's fused queries, keys and values: (rows, 5 tokens, 3 * 16).
    assert {int(rows) for rows in re.findall(r"f32\[(\d+),5,48\]", compiled)} == {1}


@pytest.fixture(scope="module")
def short_captions(pairs):
    """32 pairs whose captions end after 3 to 12 tokens: the batch, and the lengths."""
    batch = pairs.gather(np.arange(32))
    lengths = np.random.default_rng(0).integers(3, 13, 32)
    for row, length in zip(batch["text"], lengths, strict=True):
        row[length - 1], row[length:] = END_ID, 0
    return batch, lengths


@pytest.fixture(scope="module")
def a_caption_a_row(short_captions):
    """kind -> what two steps on one device give, computed once."""
    return functools.cache(
        lambda kind: run_steps(*KINDS[kind], one_device(), [short_captions[0]] * 2, loss=ROUTER_LOSS)
    )


ROUTER_LOSS = dataclasses.replace(LOSS, z_loss_coefficient=0.01)
# What trains, the mesh, microbatches.
PACKED = grid(
    ("feed-forward layers", (1, 1, 1), 1),
    rest=[("feed-forward layers", (8, 1, 1), 2), ("routers", (2, 2, 2), 2)],
)


@pytest.mark.parametrize(("kind", "sizes", "num_microbatches"), PACKED, ids=str)
def test_captions_that_share_rows_give_the_same_steps(
    kind, sizes, num_microbatches, short_captions, a_caption_a_row
):
    """Both losses of routers, of tokens that are not padding alone, are the same too."""
    batch, lengths = short_captions
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    num_units = mesh.size * num_microbatches
    places = place_captions(lengths, num_units, 32)
    packed = batch | {"text": pack(batch["text"], lengths, places, num_units)}
    assert len(packed["text"].tokens) <= 16  # of 32
    phase = dataclasses.replace(PHASE, accumulation_steps=num_microbatches)
    expected_params, expected_losses = a_caption_a_row(kind)
    params, losses = run_steps(*KINDS[kind], mesh, [packed] * 2, phase=phase, loss=ROUTER_LOSS)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(params, expected_params, rtol=1e-4, atol=1e-5)


def test_microbatches_stay_on_their_devices(short_captions):
    """Pairs and rows of text are dealt where they lie: of activations only the captions' features travel."""
    (batch, lengths), mesh = short_captions, sharding.make_mesh()
    text = pack(batch["text"], lengths, place_captions(lengths, 16, 32), 16)
    phase = dataclasses.replace(PHASE, accumulation_steps=2)
    trainable, frozen = trees.partition(init_params(DENSE, mesh), TRAIN_FFN)
    state, step = init_state(mesh, phase, trainable), make_train_step(Clip(DENSE), LOSS, phase)
    arrays = sharding.put_batch(mesh, batch | {"text": text})
    with jax.set_mesh(mesh):
        compiled = step.lower(state, frozen, arrays, np.float32(0), jax.random.key(0)).compile().as_text()
    assert set(re.findall(r"= \S*?\[([\d,]*)\]\S* all-gather", compiled)) == {"32,16"}
    assert not re.search("all-to-all|collective-permute|reduce-scatter", compiled)


@exhaustive
def test_expert_dropout_is_random_by_step_and_repeatable(batches):
    run = ComputeConfig(expert_dropout_rate=0.5)
    first = run_steps(MOE, TRAIN_ROUTERS, one_device(), [batches[0]] * 2, run=run)
    again = run_steps(MOE, TRAIN_ROUTERS, one_device(), [batches[0]] * 2, run=run)
    still = run_steps(MOE, TRAIN_ROUTERS, one_device(), [batches[0]] * 2)
    assert first[1] == again[1]
    assert first[1][0] != still[1][0]


def test_logit_scale_never_passes_ln_100(batches):
    params = init_params(DENSE, one_device())
    trainable, frozen = trees.partition(params, TRAIN_EVERYTHING)
    trainable["logit_scale"] = jnp.asarray(math.log(100.0), jnp.float32)
    state = init_state(one_device(), PHASE, trainable)
    step = make_train_step(Clip(DENSE), LOSS, PHASE)
    for batch in batches:
        arrays = sharding.put_batch(one_device(), batch)
        state, _ = step(state, frozen, arrays, np.float32(-1.0), jax.random.key(1))
        assert float(state.trainable["logit_scale"]) <= math.log(100.0) + 1e-6


def test_learning_rates_by_hand():
    # Half and all of the peak, so that no batch is wasted on a rate of 0; then from the peak over the other
    # 4 steps (1 + cos(pi k / 4)) / 2.
    phase = PhaseConfig(batch_size=1, learning_rate=2.0, weight_decay=0.0, warmup_steps=2)
    cosine = [1 + math.cos(math.pi * k / 4) for k in range(4)]
    np.testing.assert_allclose(phase.learning_rates(6), [1.0, 2.0, *cosine], rtol=1e-5)


def test_learning_rates_equal_big_visions_cosine():
    """From google-research/big_vision's utils_test.py (0127fb6): half of the peak at step 13 of 21 with
    5 of warm-up. (There the first step has rate 0.)"""
    phase = PhaseConfig(batch_size=1, learning_rate=1.0, weight_decay=0.0, warmup_steps=5)
    np.testing.assert_allclose(phase.learning_rates(21)[13], 0.5, rtol=1e-6)


def test_gradients_are_clipped_by_the_norm_of_all_that_trains():
    """The case of google-research/big_vision's optax_test.py (0127fb6): three leaves of ones, clip norm 1."""
    phase = PhaseConfig(batch_size=1, learning_rate=1.0, weight_decay=0.0, clip_norm=1.0, eps=1e6)
    params = {"Dense_0": {"kernel": jnp.float32(1), "bias": jnp.float32(2), "other": jnp.float32(3)}}
    direction = phase.direction()
    updates, _ = direction.update(jax.tree.map(jnp.ones_like, params), direction.init(params), params)
    for update in jax.tree.leaves(updates):  # of so large an eps Adam leaves the gradient, divided by it
        np.testing.assert_allclose(update * phase.eps, 1 / math.sqrt(3), rtol=1e-5)


def test_warm_up_longer_than_the_phase_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=2 does not fit into 2 steps"):
        dataclasses.replace(PHASE, num_steps=0).length(2)


def fit_routers(
    pairs, tmp_path, *, stop_after=None, phase=PHASE, scale=1.0, frozen_dtype="float32", validation=None
):
    """Router training through the loop; stop_after raises in the middle, as a kill would."""
    mesh = one_device()
    params = init_params(MOE, mesh)
    params["visual"]["proj"] = params["visual"]["proj"] * scale

    class Stopped(Exception):
        pass

    class Sampler(ShuffledSampler):
        def indices(self, step):
            if stop_after is not None and step >= stop_after:
                raise Stopped
            return super().indices(step)

    metrics = Metrics(tmp_path)
    try:
        return fit(
            "router",
            Clip(MOE, ComputeConfig(expert_dropout_rate=0.1)),
            params,
            trainable_rules=TRAIN_ROUTERS,
            pairs=pairs,
            sampler=Sampler(len(pairs), phase.batch_size, seed=3),
            caption_turns=loader.CaptionTurns(3),
            phase=phase,
            loss=LOSS,
            seed=3,
            mesh=mesh,
            metrics=metrics,
            loop=LoopConfig(
                tmp_path / "checkpoints", checkpoint_every=2, log_every=1, frozen_dtype=frozen_dtype
            ),
            validation=validation,
        )
    except Stopped:
        return None
    finally:
        metrics.close()


@pytest.mark.parametrize("stop_after", grid(5, rest=[1]))
def test_resumed_equals_uninterrupted(pairs, tmp_path, stop_after):
    """Bit for bit, stopped before the first checkpoint and after the second."""
    expected, measured = fit_routers(pairs, tmp_path / "whole")
    assert fit_routers(pairs, tmp_path / "stopped", stop_after=stop_after) is None
    found, _ = fit_routers(pairs, tmp_path / "stopped")
    chex.assert_trees_all_equal(found, expected)
    assert measured["num_steps"] == 7


def test_a_phase_ends_with_its_best_params_also_resumed(pairs, tmp_path):
    """Measured after steps 2, 4, 6 and 7, where 4 and 7 are equally good: the first is kept."""
    seen = []

    def measure(params):
        kernel = np.array(trees.flatten(params)["text/resblocks_0/moe/router/kernel"])
        places = [i for i, earlier in enumerate(seen) if np.array_equal(earlier, kernel)]
        seen.extend([] if places else [kernel])
        return {"r1": (0.2, 0.6, 0.4, 0.6)[places[0] if places else len(seen) - 1]}

    for name, stop_after in (("whole", None), ("stopped", 5)):
        validation = Validation(2, measure, tmp_path / name / "checkpoints" / "best")
        options = {"stop_after": stop_after, "validation": validation}
        if stop_after:
            assert fit_routers(pairs, tmp_path / name, **options) is None
        found, summary = fit_routers(pairs, tmp_path / name, validation=validation)
        np.testing.assert_array_equal(trees.flatten(found)["text/resblocks_0/moe/router/kernel"], seen[1])
        assert summary["best_step"] == 4 and len(seen) == 4
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        measured = {line["step"]: line.get("validation_r1") for line in lines}
        assert measured == {1: None, 2: 0.2, 3: 0.2, 4: 0.6, 5: 0.6, 6: 0.4, 7: 0.6}


@pytest.mark.parametrize("at", [4, 7])
def test_signal_during_validation_loses_no_step(pairs, tmp_path, at):
    """After step 7, the last, too: the phase resumes behind it, and measures it again."""
    expected, _ = fit_routers(pairs, tmp_path / "whole")
    measured = []

    def measure(params):
        measured.append(len(measured))
        if len(measured) == (2 if at == 4 else 4):
            raise distributed.Preempted("encoding")
        return {"r1": 0.5}

    with pytest.raises(distributed.Preempted, match=f"router, step {at}"):
        fit_routers(pairs, tmp_path / "stopped", validation=Validation(2, measure))
    steps = [int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir()]
    assert max(steps) == at
    found, summary = fit_routers(pairs, tmp_path / "stopped", validation=Validation(2, measure))
    chex.assert_trees_all_equal(found, expected)
    assert summary["num_steps"] == 7 and summary["steps_now"] == 7 - at and summary["validation_r1"] == 0.5
    lines = map(json.loads, (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines())
    assert {line["step"]: line.get("validation_r1") for line in lines}[7] == 0.5


def test_best_params_are_those_that_were_kept(tmp_path):
    """Also where a resumed phase measures an earlier step anew, and better: it is not kept."""
    state = TrainState(jnp.zeros((), jnp.int32), {"a": jnp.zeros(2)}, {"b": jnp.zeros(2)})

    def stepped(step):
        return state.replace(step=jnp.asarray(step, jnp.int32))

    with Checkpointer(tmp_path / "best", max_to_keep=1) as checkpointer:
        best = _Best(checkpointer, state)
        for step, recall in ((200, 0.5), (100, 0.52), (300, 0.51)):
            best.offer(step, stepped(step), {"r1": recall})
        checkpointer.latest_step()
        assert int(best.restore(state).step) == 300


@exhaustive
def test_frozen_leaves_held_in_bfloat16_come_back_as_they_were(pairs, tmp_path):
    """Training sees them rounded, and the saved model does not."""
    expected, measured = fit_routers(pairs, tmp_path / "float32")
    found, rounded = fit_routers(pairs, tmp_path / "bfloat16", frozen_dtype="bfloat16")
    _, frozen = trees.partition(found, TRAIN_ROUTERS)
    chex.assert_trees_all_equal(frozen, trees.partition(jax.device_get(expected), TRAIN_ROUTERS)[1])
    assert rounded["loss"] != measured["loss"]
    assert rounded["loss"] == pytest.approx(measured["loss"], rel=1e-1)


def test_metrics_file_has_a_line_for_each_logged_step(pairs, tmp_path):
    fit_routers(pairs, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    first = lines[0]
    assert {"contrastive_loss", "balance_loss", "pairs_per_second", "learning_rate"} <= first.keys()
    waited = sorted(line["input_wait_fraction"] for line in lines)
    assert 0 <= waited[0] and waited[-1] <= 1 and waited[3] < 0.5  # everything is in memory
    assert first["loss"] == pytest.approx(first["contrastive_loss"] + first["balance_loss"], rel=1e-5)
    assert all(line["dropped_slots"] == 0 for line in lines)


def test_progress_says_when_it_compiles(pairs, tmp_path, capsys):
    of_its_own = dataclasses.replace(PHASE, b2=0.9)  # no other test has compiled this step
    _, summary = fit_routers(pairs, tmp_path, phase=of_its_own)
    assert "0/7 [00:00<?, ?step/s, compiling]" in capsys.readouterr().err
    assert 0 < summary["compile_seconds_now"] < summary["seconds_now"]


def test_a_loss_that_is_not_finite_stops_with_the_step(pairs, tmp_path):
    records = ", ".join(map(str, ShuffledSampler(len(pairs), 16, seed=3).indices(0)[:5]))
    message = re.escape(
        f"router: contrastive_loss is nan at step 1 (epoch 0, shuffled: records {records}, …); the last good "
        "checkpoint is step 0 in"
    )
    with pytest.raises(ValueError, match=message):
        fit_routers(pairs, tmp_path, scale=float("nan"))

    def measure(params):
        raise ValueError("some features are not finite")

    with pytest.raises(ValueError, match=message):
        fit_routers(pairs, tmp_path / "measured", scale=float("nan"), validation=Validation(1, measure))


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(pairs, tmp_path, monkeypatch):
    """The loss of that step is still finite; the parameters after it are not."""
    real = step_module.optax.tree.norm
    monkeypatch.setattr(step_module.optax.tree, "norm", lambda grads: real(grads) * jnp.nan)
    message = r"router: gradient_norm is nan at step 1 .*; the last good checkpoint is step 0"
    with pytest.raises(ValueError, match=message):
        fit_routers(pairs, tmp_path, phase=dataclasses.replace(PHASE, num_steps=3, clip_norm=0.5))


TAUGHT = LossConfig(imitates="features", teacher=3)


@pytest.fixture(scope="module")
def taught(batches):
    return run_steps(MOE, TRAIN_ROUTERS, one_device(), batches, loss=TAUGHT)


def distance(features, targets, logit_scale) -> float:
    """scale · (1 - cosine), mean over both towers."""
    cosines = [
        np.sum(normalize_features(features[name]) * normalize_features(targets[name]), axis=1)
        for name in ("image_features", "text_features")
    ]
    return math.exp(float(logit_scale)) * (1 - np.mean(cosines))


def test_the_loss_of_a_taught_step_is_the_distance_from_the_teachers_features(batches, taught):
    """Expert 3 as the dense model that it came from."""
    params = init_params(MOE, one_device())
    config, of_teacher = expert_as_dense(params, MOE, 3)
    inputs = batches[0]["image"], batches[0]["text"]
    features = [Clip(c).apply({"params": p}, *inputs) for c, p in ((MOE, params), (config, of_teacher))]
    expected = distance(*features, params["logit_scale"])
    assert expected > 0.01 and taught[1][0] == pytest.approx(expected, rel=1e-4)


def test_routers_come_nearer_to_their_teacher(batches):
    repeated = 40 * batches[:1]
    _, losses = run_steps(MOE, TRAIN_ROUTERS, one_device(), repeated, loss=TAUGHT)
    assert losses[-1] < 0.5 * losses[0]


def test_a_dense_model_comes_nearer_to_the_features_of_a_mixture(batches):
    """The mixture is a frozen model of another shape; the first loss is the distance by hand."""
    of_dense, of_moe = (init_params(config, one_device()) for config in (DENSE, MOE))
    inputs = batches[0]["image"], batches[0]["text"]
    features = [Clip(c).apply({"params": p}, *inputs) for c, p in ((DENSE, of_dense), (MOE, of_moe))]
    loss = LossConfig(imitates="features", teacher=MOE)
    repeated = 40 * batches[:1]
    _, losses = run_steps(DENSE, TRAIN_TOWERS, one_device(), repeated, loss=loss, teacher=of_moe)
    assert losses[0] == pytest.approx(distance(*features, of_dense["logit_scale"]), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]


@exhaustive
def test_a_teacher_on_a_mesh_and_in_microbatches_is_that_of_one_device(batches, taught):
    mesh, phase = sharding.make_mesh(2, 1, 4), dataclasses.replace(PHASE, accumulation_steps=2)
    for found in (
        run_steps(MOE, TRAIN_ROUTERS, mesh, batches, loss=TAUGHT),
        run_steps(MOE, TRAIN_ROUTERS, one_device(), batches, phase, loss=TAUGHT),
    ):
        np.testing.assert_allclose(found[1], taught[1], rtol=1e-4)
        for name, leaf in trees.flatten(taught[0]).items():
            np.testing.assert_allclose(
                trees.flatten(found[0])[name], leaf, rtol=1e-4, atol=1e-5, err_msg=name
            )
