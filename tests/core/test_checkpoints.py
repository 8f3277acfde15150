"""Models and training state on disk: what comes back is what went in, on this mesh or another."""

import dataclasses
import json
import os
import resource
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from clipmoe_jax.core import checkpoints, sharding, trees
from clipmoe_jax.core.checkpoints import Checkpointer
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params, check_params
from clipmoe_jax.models.model_folder import load_model, save_model
from clipmoe_jax.models.transformer import MoeConfig
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import init_state

DENSE = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=8, patch_size=4, width=16, num_layers=1, head_width=8),
    text=TextConfig(vocab_size=20, context_length=6, width=16, num_layers=1, head_width=8),
    activation="gelu",
)
CONFIG = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))
PHASE = PhaseConfig(batch_size=8, learning_rate=1e-2, weight_decay=0.1, warmup_steps=0, num_steps=4)
KERNEL = "visual/resblocks_0/moe/c_fc/kernel"


def random_params(config=CONFIG, seed=0):
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def place(mesh, params):
    """On the mesh, by the rules."""
    return jax.device_put(params, sharding.param_shardings(mesh, params))


def assert_same(found, expected):
    """Every leaf, bit for bit, with its dtype."""
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
        assert found[name].dtype == leaf.dtype, name


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, CONFIG, random_params())
    return folder


def test_loaded_model_is_numpy(model_folder):
    config, params = load_model(model_folder)
    assert config == CONFIG
    assert_same(params, random_params())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))


def test_loaded_model_is_placed_on_a_mesh(model_folder):
    mesh = sharding.make_mesh(2, 2, 2)
    _, params = load_model(model_folder, lambda tree: sharding.param_shardings(mesh, tree))
    assert_same(params, random_params())
    shards = trees.flatten(params)[KERNEL].addressable_shards
    assert {shard.data.shape for shard in shards} == {(2, 8, 64)}  # of (4, 16, 64)


def largest_file(folder):
    """Of tensorstore's data files, which have the numbers."""
    return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "data cut off": lambda folder: os.truncate(largest_file(folder), 100),
    "data of zeros": lambda folder: largest_file(folder).write_bytes(
        bytes(largest_file(folder).stat().st_size)
    ),
    "manifest gone": lambda folder: (folder / "manifest.ocdbt").unlink(),
    "tree cut off": lambda folder: os.truncate(folder / "_METADATA", 50),
    "tree of zeros": lambda folder: (folder / "_METADATA").write_bytes(bytes(9)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_params_are_named_in_one_line(model_folder, tmp_path, damage):
    folder = tmp_path / "damaged" / "params"
    shutil.copytree(model_folder / "params", folder)
    damage(folder)
    with pytest.raises(ValueError, match=rf"^{folder} is damaged or not of this model \(") as error:
        checkpoints.load_params(folder, abstract_params(CONFIG))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_params_of_a_file_for_each_array_are_refused(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        checkpointer.save(tmp_path / "params", random_params())
    with pytest.raises(ValueError, match="params is damaged or .*it has no manifest.ocdbt"):
        checkpoints.load_params(tmp_path / "params", abstract_params(CONFIG))


def test_chunks_larger_than_their_array_are_not_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder / "params", tmp_path / "params")
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    key = "text.ln_final.bias/.zarray"
    array = json.loads(store[key]) | {"chunks": [2**20], "compressor": {"id": "zlib", "level": 9}}
    store[key] = json.dumps(array)
    store["text.ln_final.bias/0"] = zlib.compress(bytes(2**22))
    with pytest.raises(ValueError, match=r"not of this model \(text.ln_final.bias has chunks larger than"):
        checkpoints.load_params(folder, abstract_params(CONFIG))


def test_params_of_another_model_are_named_in_one_line(model_folder):
    with pytest.raises(ValueError, match="params is damaged or not of this model") as error:
        checkpoints.load_params(model_folder / "params", abstract_params(DENSE))
    assert "\n" not in str(error.value)


def test_sharded_model_is_written_whole(tmp_path):
    mesh = sharding.make_mesh(2, 2, 2)
    save_model(tmp_path, CONFIG, place(mesh, random_params()))
    assert_same(load_model(tmp_path)[1], random_params())


def test_saving_again_replaces_the_model(tmp_path):
    for seed in (0, 1):
        save_model(tmp_path, CONFIG, random_params(seed=seed))
    assert_same(load_model(tmp_path)[1], random_params(seed=1))


def test_saving_does_not_ask_orbax_whether_to_stop(tmp_path, monkeypatch):
    """Orbax would put its own count of steps where JAX keeps ours, and a SIGTERM would be lost."""
    monkeypatch.setattr(ocp.utils, "reached_preemption", lambda step: pytest.fail("orbax asked"))
    state = state_on(sharding.make_mesh(2, 2, 2))
    with checkpoints.Checkpointer(tmp_path, 2) as checkpointer:
        checkpointer.save(3, state, {"loss": 1.0})
        assert checkpointer.latest_step() == 3


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder: it has no model.json"):
        load_model(tmp_path)


def state_on(mesh, seed=0):
    """Training state of the routers and experts with moments that are not zero, at step 3."""
    params = place(mesh, random_params(seed=seed))
    trainable, _ = trees.partition(params, [(".*/moe/.*", True), (".*", False)])
    state = init_state(mesh, PHASE, trainable)
    moments = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, seed + 1) + leaf if jnp.ndim(leaf) else leaf + 3, state.opt_state
    )
    return state.replace(step=state.step + 3, opt_state=moments)


def values(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 1 to 3, of which two are kept, and the state of the last."""
    folder = tmp_path_factory.mktemp("checkpoints")
    states = [state_on(sharding.make_mesh(2, 2, 2), seed) for seed in range(3)]
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        for step, state in enumerate(states, 1):
            checkpointer.save(step, state, {"loss": step / 2})
    return folder, states[-1]


SIZES = {"the same mesh": (2, 2, 2), "another mesh": (1, 4, 2), "data alone": (8, 1, 1)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_newest_state_is_restored_on_any_mesh(saved, sizes):
    """Parameters, moments and step, placed as the state that asks for them."""
    folder, expected = saved
    like = state_on(sharding.make_mesh(*sizes), seed=9)
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        found, meta = checkpointer.restore(like)
    assert found.step == 3 and meta == {"loss": 1.5}
    for part in ("trainable", "opt_state"):
        arrays, wanted = values(getattr(found, part)), values(getattr(expected, part))
        for array, want in zip(arrays, wanted, strict=True):
            np.testing.assert_array_equal(array, want)
    jax.tree.map(lambda leaf, other: _assert_placed_alike(leaf, other), found, like)


def _assert_placed_alike(leaf, other):
    assert leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim)


def test_old_checkpoints_are_deleted(saved):
    folder, _ = saved
    assert {path.name for path in folder.iterdir()} == {"2", "3"}


def test_latest_step_is_the_newest_whole_checkpoint(saved):
    with Checkpointer(saved[0], max_to_keep=2) as checkpointer:
        assert checkpointer.latest_step() == 3


def cut_files(folder):
    """Each to its half, as a full disk or lost writes would."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_broken_checkpoint_gives_way_to_the_one_before(saved, tmp_path, caplog):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    cut_files(folder / "3" / "trainable")
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        found, meta = checkpointer.restore(saved[1])
        assert found.step == 2 and meta == {"loss": 1.0}
        assert "the checkpoint of step 3 cannot be read and is deleted" in caplog.text
        checkpointer.save(3, found, {"loss": 7.0})  # takes the broken one's place
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        assert checkpointer.restore(saved[1])[1] == {"loss": 7.0}


def widen_chunks(folder):
    """Makes the chunks of an array larger than itself: few bytes would be read as 4 MB."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    arrays = {key: json.loads(store[key]) for key in store.list().result() if key.endswith(b"/.zarray")}
    key, array = next((key, array) for key, array in arrays.items() if array["shape"])
    chunks = [2**20] + array["chunks"][1:]
    store[key] = json.dumps(array | {"chunks": chunks, "compressor": {"id": "zlib", "level": 9}})
    store[key.replace(b".zarray", b".".join([b"0"] * len(chunks)))] = zlib.compress(
        bytes(4 * int(np.prod(chunks)))
    )


@pytest.mark.parametrize("item", ["trainable", "opt_state"])
def test_chunks_larger_than_their_array_are_not_restored(saved, tmp_path, item, caplog):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    widen_chunks(folder / "3" / item)
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        assert checkpointer.restore(saved[1])[0].step == 2
    assert "has chunks larger than itself" in caplog.text


def test_checkpoints_stay_if_none_can_be_read(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    cut_files(folder / "2" / "opt_state")
    (folder / "3" / "meta" / "metadata").write_text('{"loss"')
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        with pytest.raises(
            ValueError, match=r"no checkpoint in \S+ can be read \(step 3: .+; step 2: .+\): start the same"
        ):
            checkpointer.restore(saved[1])
    assert {path.name for path in folder.iterdir()} == {"2", "3"}


def test_folder_with_brackets_is_one_like_any_other(saved, tmp_path):
    """Orbax looks for a checkpoint's files by `glob`, which took a run's name for a pattern."""
    folder = tmp_path / "lr[1e-3]"
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        checkpointer.save(3, saved[1], {"loss": 1.5})
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        found, meta = checkpointer.restore(saved[1])
    assert meta == {"loss": 1.5}
    for array, want in zip(values(found.trainable), values(saved[1].trainable), strict=True):
        np.testing.assert_array_equal(array, want)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of writes that go on
def test_write_that_fails_is_raised_and_not_logged(saved, tmp_path, caplog):
    """As on a full disk: by orbax's threads each error would come with hundreds of lines."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Several writes fail at once: tensorstore's raise ValueError, Python's own OSError.
    raised = pytest.raises((ValueError, OSError), match="File too large")
    with raised, Checkpointer(tmp_path, 2) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            checkpointer.save(3, saved[1], {"loss": 1.5})
            checkpointer.latest_step()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record for record in caplog.records if record.exc_info] == []


def test_restore_without_a_checkpoint_gives_none(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        assert checkpointer.restore(state_on(sharding.make_mesh())) is None
        assert checkpointer.latest_step() is None


def test_rest_of_a_killed_save_is_no_checkpoint(saved, tmp_path):
    _, expected = saved
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with Checkpointer(tmp_path, max_to_keep=2) as checkpointer:
        assert checkpointer.restore(expected) is None


def shapes_of(config):
    return {name: leaf.shape for name, leaf in trees.flatten(abstract_params(config)).items()}


def test_check_params_lets_the_right_ones_pass():
    check_params(CONFIG, shapes_of(CONFIG), "file")


def test_check_params_names_what_differs_in_both_directions():
    shapes = shapes_of(CONFIG) | {"visual/proj": (16, 9), "visual/adapter": (2,)}
    del shapes["text/ln_final/scale"], shapes["logit_scale"]
    with pytest.raises(ValueError) as error:
        check_params(CONFIG, shapes, "some/file")
    assert str(error.value) == (
        "some/file does not fit the architecture: 2 missing: logit_scale, text/ln_final/scale; "
        "1 unexpected: visual/adapter; 1 differing: visual/proj is (16, 9), not (16, 8)"
    )


def test_check_params_names_what_a_dense_file_lacks_for_a_moe():
    # In each tower 4 FFN leaves come, 4 expert leaves and a router are missing.
    with pytest.raises(ValueError, match="10 missing: text/resblocks_0/moe.*; 8 unexpected: text/.*mlp"):
        check_params(CONFIG, shapes_of(DENSE), "file")
