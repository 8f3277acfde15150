"""Features, router logits, losses and gradients against what the released PyTorch code computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import exhaustive

from clipmoe_jax.interop import released
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, text_mask
from clipmoe_jax.models.positions import stretch_positions
from clipmoe_jax.train import losses

CHECKPOINTS = ["dense", "moe_all", "moe_last1"]
MOE_CHECKPOINTS = CHECKPOINTS[1:]
LABEL_SMOOTHING, BALANCE = 0.1, 0.01


@pytest.fixture(scope="module")
def computed(golden_dir, golden):
    """For each checkpoint: its model, its params, and what the model gives for the golden inputs."""
    images = jnp.asarray(golden["images_nchw"].transpose(0, 2, 3, 1))
    tokens = jnp.asarray(golden["tokens"])
    results = {}
    for name in CHECKPOINTS:
        found = read_model(str(golden_dir / f"{name}.pt"))
        model, params = Clip(found.config), found.params
        outputs = jax.jit(model.apply)({"params": params}, images, tokens)
        results[name] = model, params, (images, tokens), outputs
    return results


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_features(computed, golden, name, tower):
    features = computed[name][3][f"{tower}_features"]
    assert_close(features, golden[f"{name}/{tower}_features"], 1e-4)


@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_router_logits(computed, golden, name, tower):
    logits = computed[name][3][f"{tower}_aux"]["router_logits"]  # (B, M, L, E)
    batch, blocks, length, experts = logits.shape
    sequence_major = logits.transpose(1, 2, 0, 3).reshape(blocks, length * batch, experts)
    assert_close(sequence_major, golden[f"{name}/{tower}_router_logits"], 1e-4)


def all_losses(model, params, inputs, kind="released"):
    outputs = model.apply({"params": params}, *inputs)
    found = losses.contrastive_loss(
        outputs["image_features"], outputs["text_features"], params["logit_scale"], LABEL_SMOOTHING
    )
    return found | losses.balance_losses(outputs, text_mask(inputs[1]), 2, BALANCE, kind)


@exhaustive  # tests/train/test_golden_steps.py has losses and gradients of two
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_losses(computed, golden, name):
    model, params, inputs, _ = computed[name]
    found = all_losses(model, params, inputs)
    assert_close(found["contrastive_loss"], golden[f"{name}/clip_loss"], 1e-4)
    if name in MOE_CHECKPOINTS:
        assert_close(found["balance_image"], golden[f"{name}/balance_image"], 1e-4)
        assert_close(found["balance_text"], golden[f"{name}/balance_text"], 1e-4)
        assert_close(losses.total_loss(found), golden[f"{name}/total_loss"], 1e-4)


@exhaustive
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gradients(computed, golden, name):
    model, params, inputs, _ = computed[name]
    gradient = jax.jit(jax.grad(lambda p: losses.total_loss(all_losses(model, p, inputs))))(params)
    arrays = released.export_state_dict(gradient)
    prefix = f"{name}/grad/"
    expected = {key.removeprefix(prefix): golden[key] for key in golden if key.startswith(prefix)}
    assert len(expected) == {"dense": 2, "moe_all": 4, "moe_last1": 2}[name]
    for key, value in expected.items():
        assert_close(arrays[key], value, 1e-3)


@pytest.mark.parametrize("name", MOE_CHECKPOINTS)
def test_paper_balance_equals_its_formula_on_the_golden_router_logits(computed, golden, name):
    """E * sum_e f_e P_e per block, by loops over the tokens of the golden logits."""
    outputs = computed[name][3]
    tokens = golden["tokens"]
    ends = tokens.argmax(axis=1)
    found = losses.balance_losses(outputs, text_mask(tokens), 2, 1.0, "paper")
    for tower, length in (("image", 17), ("text", 248)):
        rows = golden[f"{name}/{tower}_router_logits"].astype(np.float64)
        blocks = []
        for block in rows.reshape(len(rows), length, 6, 4):
            slots, probability, count = np.zeros(4), np.zeros(4), 0
            for position in range(length):
                for example in range(6):
                    if tower == "text" and position > ends[example]:
                        continue
                    p = np.exp(block[position, example])
                    p /= p.sum()
                    slots[np.argsort(-p)[:2]] += 1
                    probability += p
                    count += 1
            blocks.append(4 * np.sum(slots / (2 * count) * probability / count))
        assert_close(found[f"balance_{tower}"], np.mean(blocks), 1e-4)


def test_position_stretching(golden):
    """The released code stretches in float16: bit for bit there, and to its rounding in float32."""
    half = golden["pos77"].astype(np.float16)
    np.testing.assert_array_equal(stretch_positions(half), golden["pos248"].astype(np.float16))
    assert_close(stretch_positions(golden["pos77"]), golden["pos248"], 1e-3)


def assert_close(found, expected, tolerance):
    """Largest difference relative to the expected array's norm per element, or to the scalar."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error:.2e}"
