"""The mesh, where every parameter lies on it, and batches that reach it whole."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.feed_forward import quick_gelu
from clipmoe_jax.models.moe import MoeMlp
from clipmoe_jax.models.transformer import MoeConfig

DENSE = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=8, patch_size=4, width=16, num_layers=1, head_width=8),
    text=TextConfig(vocab_size=20, context_length=6, width=16, num_layers=1, head_width=8),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))


def init_moe(key):
    """One MoE block's params at their place in the tree."""
    moe = MoeMlp(4, 2, 64, quick_gelu).init(key, jnp.zeros((1, 1, 16)))["params"]
    return {"visual": {"resblocks_0": {"moe": moe}}}


MESHES = {
    "the rest goes to data": ({}, (8, 1, 1)),
    "the rest beside fsdp and experts": ({"fsdp": 2, "expert": 2}, (2, 2, 2)),
    "no rest": ({"expert": 8}, (1, 1, 8)),
    "all said": ({"data": 2, "fsdp": 4, "expert": 1}, (2, 4, 1)),
}


@pytest.mark.parametrize(("asked", "sizes"), MESHES.values(), ids=MESHES)
def test_mesh_takes_the_sizes_asked_for_and_data_the_rest(asked, sizes):
    mesh = sharding.make_mesh(**asked)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert"), sizes, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x expert=1 does not use the 8 devices"),
        ({"fsdp": 3}, "data=2 x fsdp=3 x expert=1"),  # 8 // 3 = 2, and 2 * 3 = 6
        ({"expert": 16}, "data=0 x fsdp=1 x expert=16"),
        ({"data": -2, "fsdp": -4}, "data=-2 x fsdp=-4"),  # whose product is 8
    ],
)
def test_mesh_that_does_not_use_all_devices_is_refused(asked, message):
    with pytest.raises(ValueError, match=f"{message}.*choose sizes whose product is 8"):
        sharding.make_mesh(**asked)


def devices_of(*processes):
    return [types.SimpleNamespace(process_index=process, id=i) for i, process in enumerate(processes)]


def test_devices_of_a_process_follow_each_other(monkeypatch):
    """Whatever order JAX lists them in: a process gives the rows of its own devices."""
    monkeypatch.setattr(sharding, "Mesh", lambda devices, *_, **__: devices)
    mesh = sharding.make_mesh(fsdp=2, devices=devices_of(1, 0, 1, 0))
    found = [[(one.process_index, one.id) for one in row.flat] for row in mesh]
    assert found == [[(0, 1), (0, 3)], [(1, 0), (1, 2)]]


def test_processes_of_different_numbers_of_devices_are_refused():
    with pytest.raises(ValueError, match=r"numbers of devices \(process 0 has 1, process 1 has 3\)"):
        sharding.make_mesh(devices=devices_of(1, 0, 1, 1))


DENSE_SPECS = {
    "logit_scale": P(),
    "visual/conv1/kernel": P(),
    "visual/ln_post/scale": P(),
    "visual/proj": P(),
    "visual/positional_embedding": P(),
    "visual/resblocks_0/attn/in_proj/kernel": P("fsdp", None),
    "visual/resblocks_0/attn/in_proj/bias": P(),
    "text/resblocks_0/attn/out_proj/kernel": P("fsdp", None),
    "text/resblocks_0/mlp/c_fc/kernel": P("fsdp", None),
    "text/resblocks_0/mlp/c_proj/bias": P(),
    "text/token_embedding/embedding": P(),
}
MOE_SPECS = {
    "visual/resblocks_0/moe/router/kernel": P(),
    "visual/resblocks_0/moe/c_fc/kernel": P("expert", "fsdp", None),
    "text/resblocks_0/moe/c_proj/kernel": P("expert", "fsdp", None),
    "text/resblocks_0/moe/c_proj/bias": P("expert"),
    "text/resblocks_0/attn/in_proj/kernel": P("fsdp", None),
}


@pytest.mark.parametrize(("config", "specs"), [(DENSE, DENSE_SPECS), (MOE, MOE_SPECS)], ids=["dense", "MoE"])
def test_each_parameter_has_the_sharding_of_its_rule(config, specs):
    shardings = sharding.param_shardings(sharding.make_mesh(fsdp=2, expert=2), abstract_params(config))
    found = {name: leaf.spec for name, leaf in trees.flatten(shardings).items()}
    assert {name: found[name] for name in specs} == specs
    assert found.keys() == trees.flatten(abstract_params(config)).keys()


def test_every_rule_is_the_first_match_of_some_leaf():
    names = [*trees.flatten(abstract_params(DENSE)), *trees.flatten(abstract_params(MOE))]
    trees.match_rules(sharding.PARAM_RULES, names)  # raises for a rule that nothing uses


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        # 4 experts on 8 devices; 1, 2 and 4 divide 4.
        ({"expert": 8}, r"moe/c_fc/bias has an axis of size 4, .*expert=8 .*among \[1, 2, 4\]"),
        # A width of 12 on 8 devices.
        ({"fsdp": 8}, r"text/.*kernel has an axis of size 12, .*fsdp=8 .*\[1, 2, 3, 4, 6, 12\]"),
    ],
    ids=["experts", "width"],
)
def test_axis_that_does_not_divide_is_refused_with_the_sizes_that_do(sizes, message):
    text = dataclasses.replace(MOE.text, width=12, head_width=12)
    params = abstract_params(dataclasses.replace(MOE, text=text))
    with pytest.raises(ValueError, match=message):
        sharding.param_shardings(sharding.make_mesh(**sizes), params)


def test_params_are_initialised_sharded_and_the_same_on_every_mesh():
    mesh = sharding.make_mesh(fsdp=2, expert=2)
    params = sharding.init_params(mesh, init_moe, jax.random.key(0))
    kernel = params["visual"]["resblocks_0"]["moe"]["c_fc"]["kernel"]
    assert kernel.shape == (4, 16, 64)
    # Two experts and half of the width on each device.
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 64)}

    one = sharding.make_mesh(devices=jax.devices()[:1])
    expected = trees.flatten(sharding.init_params(one, init_moe, jax.random.key(0)))
    for name, leaf in trees.flatten(params).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_put_param_keeps_values_and_places_them():
    mesh = sharding.make_mesh(fsdp=8)
    kernel = np.arange(16 * 48, dtype=np.float32).reshape(16, 48)
    placed = sharding.put_param(mesh, "text/attn/in_proj/kernel", kernel)
    np.testing.assert_array_equal(placed, kernel)
    np.testing.assert_array_equal(placed.addressable_shards[3].data, kernel[6:8])


def test_put_batch_gives_each_device_its_rows():
    mesh = sharding.make_mesh(data=2, fsdp=2, expert=2)
    batch = {"image": np.arange(16 * 3).reshape(16, 3), "text": np.arange(16)}
    arrays = sharding.put_batch(mesh, batch)
    np.testing.assert_array_equal(arrays["text"], batch["text"])
    for position, device in enumerate(mesh.devices.flat):
        (rows,) = [s.data for s in arrays["image"].addressable_shards if s.device == device]
        np.testing.assert_array_equal(rows, batch["image"][2 * position : 2 * position + 2])


def test_batch_that_devices_and_accumulation_cannot_share_is_refused():
    mesh = sharding.make_mesh()
    sharding.check_batch(mesh, 48, accumulation_steps=3)
    message = "batch size 40 cannot be split over 8 devices x 3 accumulation steps: .*multiple of 24"
    with pytest.raises(ValueError, match=message):
        sharding.check_batch(mesh, 40, accumulation_steps=3)


def test_devices_that_are_not_there_are_told_in_one_line(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda': no GPU")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(
        ValueError, match="^JAX_PLATFORMS=cuda: JAX finds no such device here .Unable to init"
    ):
        sharding.make_mesh()


@pytest.mark.parametrize(
    ("backend", "version", "capability", "wanted"),
    [
        ("cpu", "cpu", None, "cpu"),
        ("tpu", "libtpu", None, "tpu"),
        ("gpu", "rocm 60300", "9.0", "gpu"),
        ("gpu", "PJRT C API\ncuda 13000", "7.5", "gpu"),
        ("gpu", "cuda 13000", "8.9", "cuda"),
        ("gpu", "cuda 13000", "9.0", "hopper"),
        ("gpu", "cuda 13000", "10.0", "cuda"),
    ],
)
def test_platform_tells_gpus_by_what_runs_on_them(monkeypatch, backend, version, capability, wanted):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(
        jax.extend.backend, "get_backend", lambda: types.SimpleNamespace(platform_version=version)
    )
    assert sharding.platform() == wanted
