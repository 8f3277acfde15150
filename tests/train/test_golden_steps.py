"""Two optimizer steps of an MCL stage and of router training against those of the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.dmu.recipe import TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.interop import released
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import LossConfig, init_state, make_train_step

LEARNING_RATE, LOGIT_SCALE = 1e-3, 4.60517
KINDS = {  # checkpoint: what trains, weight decay, coefficient of the balance
    "dense": (TRAIN_FFN, 0.2, 0.0),
    "moe_all": (TRAIN_ROUTERS, 1e-2, 0.01),
}


@pytest.mark.parametrize("name", KINDS)
def test_two_steps_change_parameters_as_the_released_code_does(golden_dir, golden, name):
    """But for one departure: it decays biases too."""
    rules, weight_decay, balance_coefficient = KINDS[name]
    expected = np.load(golden_dir / "steps.npz")
    phase = PhaseConfig(6, LEARNING_RATE, weight_decay, num_steps=4, warmup_steps=2)
    rates = phase.learning_rates(4)
    found = read_model(str(golden_dir / f"{name}.pt"))
    params = found.params | {"logit_scale": np.float32(LOGIT_SCALE)}
    before = released.export_state_dict(params)
    images = jnp.asarray(golden["images_nchw"].transpose(0, 2, 3, 1))
    batch = {"image": images, "text": jnp.asarray(golden["tokens"])}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    trainable, frozen = trees.partition(jax.tree.map(jnp.asarray, params), rules)
    state = init_state(mesh, phase, trainable)
    loss = LossConfig(0.1, balance_coefficient, "released")
    step = make_train_step(Clip(found.config), loss, phase)
    for i in range(2):
        state, metrics = step(state, frozen, batch, rates[i], jax.random.key(0))
        np.testing.assert_allclose(metrics["loss"], expected[f"{name}/loss_{i}"], rtol=1e-5)
    after = released.export_state_dict(trees.merge(state.trainable, frozen))
    names = [key.removeprefix(f"{name}/after/") for key in expected if key.startswith(f"{name}/after/")]
    assert len(names) == {"dense": 5, "moe_all": 4}[name]
    for parameter in names:
        change, wanted = (
            a - before[parameter] for a in (after[parameter], expected[f"{name}/after/{parameter}"])
        )
        if parameter.endswith("bias"):
            wanted = wanted + rates[:2].sum() * weight_decay * before[parameter]
        # Where a gradient is nearly nothing Adam's first step is a rounding's sign: compare all of a leaf.
        error = np.linalg.norm(change - wanted) / np.linalg.norm(wanted)
        assert error < 1e-3, f"{parameter}: relative error {error:.1e}"
