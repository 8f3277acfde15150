"""Model folders: equal experts are stored once, and come back as they were on every mesh."""

import functools
import json

import jax
import numpy as np
import pytest
from etils import epath
from grids import exhaustive, grid, quick

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.model_folder import EXPERTS_FILE, load_model, save_model
from clipmoe_jax.models.transformer import MoeConfig

CONFIG = ClipConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=2, head_width=8),
    text=TextConfig(context_length=12, width=16, num_layers=2, head_width=8),
    moe=MoeConfig(4, 2, num_moe_layers=1),
)
KERNEL = "visual/resblocks_1/moe/c_fc/kernel"


def make_params(stored: list[int]) -> dict:
    """Numpy params whose expert e is drawn by the number stored[e]."""
    leaves = {}
    for number, (name, leaf) in enumerate(trees.flatten(abstract_params(CONFIG)).items()):
        rng = np.random.default_rng(number)
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        leaves[name] = drawn[stored] if "/moe/c_" in name else drawn
    return trees.unflatten(leaves)


def assert_equal(params, others):
    for name, leaf in trees.flatten(params).items():
        np.testing.assert_array_equal(leaf, trees.flatten(others)[name], err_msg=name)


@pytest.mark.parametrize("stored", grid([0, 0, 1, 2], rest=[[0, 1, 0, 1], [0, 0, 0, 0]]), ids=str)
def test_equal_experts_are_stored_once(tmp_path, stored):
    params = make_params(stored)
    save_model(epath.Path(tmp_path / "moe"), CONFIG, params)
    assert json.loads((tmp_path / "moe" / EXPERTS_FILE).read_text()) == stored
    config, loaded = load_model(epath.Path(tmp_path / "moe"))
    assert config == CONFIG
    assert_equal(loaded, params)


@exhaustive
def test_a_folder_with_equal_experts_is_smaller(tmp_path):
    sizes = []
    for stored in ([0, 1, 2, 3], [0, 0, 0, 0]):
        folder = tmp_path / str(stored)
        save_model(epath.Path(folder), CONFIG, make_params(stored))
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    leaves = trees.flatten(make_params([0])).items()
    of_one = sum(leaf.nbytes for name, leaf in leaves if "/moe/c_" in name)
    assert sizes[0] - sizes[1] > 0.5 * 3 * of_one  # the rest is what the format adds


def test_experts_that_differ_in_one_number_are_all_stored(tmp_path):
    leaves = trees.flatten(make_params([0, 0, 1, 2]))
    leaves[KERNEL] = leaves[KERNEL].copy()
    leaves[KERNEL][1, 0, 0] += 1e-3
    save_model(epath.Path(tmp_path / "moe"), CONFIG, make_params([0, 0, 1, 2]))
    save_model(epath.Path(tmp_path / "moe"), CONFIG, trees.unflatten(leaves))  # over it
    assert not (tmp_path / "moe" / EXPERTS_FILE).exists()
    assert_equal(load_model(epath.Path(tmp_path / "moe"))[1], trees.unflatten(leaves))


@pytest.mark.parametrize(
    ("saved_on", "sizes", "stored"),
    quick(
        {
            "two on two": ((2, 2, 2), (2, 2, 2), [0, 1, 0, 1]),
            "three of one device on four": ((8, 1, 1), (1, 2, 4), [0, 0, 1, 2]),
        },
        "three of one device on four",
    ),
)
def test_equal_experts_are_placed_as_others_are(tmp_path, saved_on, sizes, stored):
    mesh, params = sharding.make_mesh(*sizes), make_params(stored)
    place = functools.partial(sharding.param_shardings, mesh)
    where = place(abstract_params(CONFIG))
    before = sharding.param_shardings(sharding.make_mesh(*saved_on), abstract_params(CONFIG))
    save_model(epath.Path(tmp_path / "moe"), CONFIG, jax.tree.map(jax.device_put, params, before))
    assert json.loads((tmp_path / "moe" / EXPERTS_FILE).read_text()) == stored
    _, loaded = load_model(epath.Path(tmp_path / "moe"), place)
    assert_equal(loaded, params)
    for name, leaf in trees.flatten(loaded).items():
        assert leaf.sharding.is_equivalent_to(trees.flatten(where)[name], leaf.ndim), name


def test_all_experts_are_stored_where_fewer_do_not_divide_over_the_devices(tmp_path):
    """Three of four over two devices: each would have to hold all."""
    params = make_params([0, 0, 1, 2])
    where = sharding.param_shardings(sharding.make_mesh(2, 2, 2), abstract_params(CONFIG))
    save_model(epath.Path(tmp_path / "moe"), CONFIG, jax.tree.map(jax.device_put, params, where))
    assert not (tmp_path / "moe" / EXPERTS_FILE).exists()
    assert_equal(load_model(epath.Path(tmp_path / "moe"))[1], params)
