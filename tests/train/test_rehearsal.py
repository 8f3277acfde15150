"""Which steps rehearse, on which batches, and what they learn from another model's similarities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.data import loader
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import ShuffledSampler
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.train import losses
from clipmoe_jax.train.rehearsal import Drawn, Rehearsal, Targets, open_batches
from clipmoe_jax.train.step import LossConfig

TURNS = loader.CaptionTurns(3)


@pytest.fixture(scope="module")
def pairs(scenes):
    return loader.DecodedPairs(Records(scenes), Tokenizer(32), 32)


def drawn(pairs, seed=9):
    return Drawn(pairs, ShuffledSampler(len(pairs), 8, seed=seed))


def make_rehearsal(pairs, fraction=0.25, targets=None, captions=None):
    return Rehearsal(drawn(pairs), fraction, LossConfig(), targets, captions)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.3, 0.5, 0.7, 0.9])
def test_rehearsing_steps_are_spread_evenly(pairs, fraction):
    rehearsal = make_rehearsal(pairs, fraction)
    steps = [step for step in range(1000) if rehearsal.rehearses(step)]
    assert len(steps) == round(1000 * fraction) and 0 not in steps
    assert set(np.diff(steps)) <= {int(1 / fraction), int(np.ceil(1 / fraction))}


def take(pairs, rehearsal, start_step=0, num_steps=12, **options):
    sampler = ShuffledSampler(len(pairs), 8, seed=3)
    options = {"caption_turns": TURNS, "num_text_shards": 0, "row_cost": 0.0} | options
    with open_batches(
        pairs, sampler, rehearsal, start_step=start_step, num_steps=num_steps, **options
    ) as batches:
        return list(batches)


def test_own_batches_are_those_of_a_phase_without_rehearsal(pairs):
    own = [batch["index"] for rehearses, batch in take(pairs, make_rehearsal(pairs)) if not rehearses]
    alone = [batch["index"] for _, batch in take(pairs, None, num_steps=9)]
    np.testing.assert_array_equal(own, alone)


def test_batches_resume_at_any_step(pairs):
    whole = take(pairs, make_rehearsal(pairs))
    assert [rehearses for rehearses, _ in whole] == 3 * [False, False, False, True]
    for start in (1, 3, 4, 11):
        for (kind, batch), (expected_kind, expected) in zip(
            take(pairs, make_rehearsal(pairs), start, 12 - start), whole[start:], strict=True
        ):
            assert kind == expected_kind
            np.testing.assert_array_equal(batch["index"], expected["index"])


def test_hosts_share_rehearsing_batches_and_their_targets(pairs):
    features = np.random.default_rng(0).normal(size=(2, len(pairs), 4)).astype(np.float32)
    rehearsal = make_rehearsal(pairs, targets=Targets(*features))
    [whole, *parts] = (
        [batch for rehearses, batch in take(pairs, rehearsal, **options) if rehearses]
        for options in ({}, *({"process_index": p, "process_count": 2} for p in (0, 1)))
    )
    for name in ("index", "image", "target_images", "target_texts"):
        joined = [np.concatenate([a[name], b[name]]) for a, b in zip(*parts, strict=True)]
        np.testing.assert_array_equal(joined, [batch[name] for batch in whole])
    np.testing.assert_array_equal(whole[0]["target_texts"], features[1][whole[0]["index"]])


def test_captions_may_come_from_other_records_than_images(pairs, scenes):
    other = loader.DecodedPairs(Records(scenes, "train[5:20]"), Tokenizer(32), 32)
    images, texts = (np.random.default_rng(0).normal(size=(len(p), 4)) for p in (pairs, other))
    rehearsal = make_rehearsal(pairs, targets=Targets(images, texts), captions=drawn(other, seed=4))
    own = make_rehearsal(pairs, targets=Targets(images, images))
    sampler = ShuffledSampler(len(other), 8, seed=4)
    batches = [[b for rehearses, b in take(pairs, r) if rehearses] for r in (rehearsal, own)]
    for step, (batch, of_own) in enumerate(zip(*batches, strict=True)):
        indices = sampler.indices(step)
        np.testing.assert_array_equal(batch["image"], of_own["image"])
        np.testing.assert_array_equal(batch["target_images"], of_own["target_images"])
        np.testing.assert_array_equal(batch["text"], other.gather(indices)["text"])
        np.testing.assert_array_equal(batch["target_texts"], texts[indices])


def unit(key, shape=(6, 8)):
    return losses.normalize_features(jax.random.normal(jax.random.key(key), shape))


def test_distillation_is_the_divergence_from_the_targets_similarities():
    images, texts, target_images, target_texts = (np.asarray(unit(k), np.float64) for k in range(4))
    scale = 10.0

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    expected = 0
    similarities, targets = images @ texts.T, target_images @ target_texts.T
    for a, b in ((similarities, targets), (similarities.T, targets.T)):
        p, q = softmax(scale * b), softmax(scale * a)
        expected += np.mean(np.sum(p * np.log(p / q), axis=1)) / 2
    arguments = (5 * images, texts, target_images, target_texts)  # features of any length
    found = losses.distillation_loss(*map(jnp.float32, arguments), jnp.log(scale))["distillation_loss"]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_distance_of_features_by_hand():
    # Cosines 1 and 0 of the images, 0 and 0.6 of the captions: scale · (1 - (0.5 + 0.3) / 2).
    axes = jnp.eye(2)
    texts = jnp.array([[0.0, 2.0], [0.8, 0.6]])
    arguments = (3 * axes, texts, jnp.array([[1.0, 0.0], [1.0, 0.0]]), axes)
    found = losses.feature_distance(*arguments, jnp.log(10.0))["distillation_loss"]
    assert float(found) == pytest.approx(10 * (1 - 0.4), rel=1e-6)


def test_distance_of_features_keeps_its_digits_where_they_are_close():
    """1 - cosine in float32 has no digit left here."""
    targets, direction = (np.asarray(unit(key), np.float64) for key in range(2))
    images = targets + 1e-4 * direction
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(targets, axis=1)
    cosines = np.sum(images * targets, axis=1) / lengths
    arguments = (jnp.float32(images), *map(jnp.float32, [targets] * 3), jnp.float32(0.0))
    found = losses.feature_distance(*arguments)["distillation_loss"]
    assert float(found) == pytest.approx(np.mean(1 - cosines) / 2, rel=1e-2)


def test_distillation_of_a_model_from_itself_is_nothing():
    images, texts = unit(0), unit(1)

    def loss(images):
        terms = losses.distillation_loss(images, texts, unit(0), unit(1), jnp.log(20.0))
        return terms["distillation_loss"]

    value, gradient = jax.value_and_grad(loss)(images)
    assert abs(float(value)) < 1e-6 and float(jnp.abs(gradient).max()) < 1e-6
