"""Every config file builds, is valid, and its training steps lower at full size from abstract shapes."""

import dataclasses
import importlib.util
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from grids import grid
from ml_collections import config_flags

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks, main
from clipmoe_jax.core import trees
from clipmoe_jax.core.errors import SeveralErrors
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.phases import phases_of
from clipmoe_jax.dmu.recipe import TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.dmu.training import take_architecture
from clipmoe_jax.models.clip import VARIANTS, Clip, abstract_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.transformer import MoeConfig
from clipmoe_jax.train.step import LossConfig, TrainState, make_train_step

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
QUICK_FILES = ("demo",)


def get_config(name: str, arg: str = ""):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(arg)
    if not config.data.train:
        config.base.checkpoint, config.data.train = "clip", "data/train"
    return config


def lowered_text(model: Clip, params, rules, phase, loss) -> str:
    """The training step's StableHLO for one batch of the config's size."""
    trainable, frozen = trees.partition(params, rules)
    opt_state = jax.eval_shape(phase.direction().init, trainable)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state)
    vision, text = model.config.vision, model.config.text
    batch = {
        "image": jax.ShapeDtypeStruct((phase.batch_size, vision.image_size, vision.image_size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((phase.batch_size, text.context_length), jnp.int32),
    }
    rate, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    return make_train_step(model, loss, phase).lower(state, frozen, batch, rate, key).as_text()


@pytest.mark.parametrize("name", grid(*QUICK_FILES, rest=sorted({*FILES} - {*QUICK_FILES})))
def test_config_is_valid_and_its_steps_lower(name):
    config = get_config(name)
    config_checks.validate(config)
    assert recipes.recipes(config)
    dense = configs.architecture(config)
    moe = dataclasses.replace(dense, moe=configs.moe_config(config))
    params, moe_params = abstract_params(dense), abstract_params(moe)

    run = configs.compute_config(config, "gpu", training_routers=True)
    phase, loss = configs.phase_config(config.router), LossConfig(0.1, 0.01)
    text = lowered_text(Clip(moe, run), moe_params, TRAIN_ROUTERS, phase, loss)
    batch, size = phase.batch_size // phase.accumulation_steps, dense.vision.image_size
    assert f"{batch}x{size}x{size}x3xui8" in text and "bf16" in text

    phase, loss = configs.phase_config(config.mcl), LossConfig(config.mcl.label_smoothing)
    run = configs.compute_config(config, "gpu")
    text = lowered_text(Clip(dense, run), params, TRAIN_FFN, phase, loss)
    assert f"{dense.vision.width}x{4 * dense.vision.width}xbf16" in text


def test_defaults_are_the_papers_numbers():
    """Batch 800, AdamW 1e-5 and 0.2, 200 warm-up steps, smoothing 0.1; routers 1e-6 and 1e-2; E 4, K 2."""
    config = get_config("vit_l14_sharegpt4v")
    mcl, router = config.mcl, config.router
    assert (mcl.batch_size, mcl.learning_rate, mcl.weight_decay, mcl.warmup_steps) == (800, 1e-5, 0.2, 200)
    assert (router.learning_rate, router.weight_decay, router.balance_coefficient) == (1e-6, 1e-2, 0.01)
    assert (mcl.label_smoothing, mcl.init_from, mcl.num_stages, mcl.num_epochs) == (0.1, "base", 3, 1)
    assert configs.moe_config(config).num_experts == 4 and config.moe.num_selected_experts == 2
    assert config.base.logit_scale == 100 and config.moe.expert_dropout_rate == 0.1


def test_active_parameters_of_the_papers_model():
    """ViT-L/14, E = 4, K = 2 in every block. By hand: a feed-forward layer of width D has 8 D^2 + 5 D
    parameters, a token uses one more of them than in the dense model, and the router's 4 D: 1.61 times the
    base's 427.7 M. (The paper says 1.7.)"""
    config = get_config("vit_l14_sharegpt4v")
    dense = configs.architecture(config)
    moe = dataclasses.replace(dense, moe=configs.moe_config(config))
    base = trees.count_parameters(abstract_params(dense))
    active = count_active_parameters(abstract_params(moe), moe)
    extra = sum(layers * (8 * d * d + 5 * d + 4 * d) for layers, d in ((24, 1024), (12, 768)))
    assert active == base + extra
    assert active / base == pytest.approx(1.605, abs=0.005)


def test_arguments_of_config_files_reach_their_fields():
    assert get_config("demo", "seeds=3").seeds == (1, 2, 3)
    assert get_config("demo", "small").mcl.num_steps < get_config("demo").mcl.num_steps
    assert get_config("vit_b32", "variant=ViT-B/16").base.architecture.vision.patch_size == 16
    assert get_config("vit_l14_sharegpt4v", "init_from=previous").mcl.init_from == "previous"
    with pytest.raises(ValueError, match="config argument 'sedes' does not exist; there are seeds, small"):
        get_config("demo", "sedes=3")


@pytest.mark.parametrize("name", ["demo", "drawings"])
@pytest.mark.parametrize("switches", ["controls", "controls,flops"])
def test_controls_can_be_tried_on_the_small_settings(name, switches):
    whole, small = (get_config(name, f"{switches}{more}") for more in ("", ",small"))
    config_checks.validate(small)
    assert small.baselines == whole.baselines and small.router.num_steps < whole.router.num_steps
    phases_of(small, "cpu", 800)


@pytest.mark.parametrize(
    ("platform", "dtype", "grouped_mlp", "attention"),
    [
        ("cpu", "float32", "blocks", "chunked"),
        ("tpu", "bfloat16", "ragged_dot", "xla"),
        ("gpu", "bfloat16", "fixed_blocks", "xla"),
        ("cuda", "bfloat16", "fixed_blocks", "cudnn"),
        ("hopper", "bfloat16", "tiles", "cudnn"),
        ("hopper", "float32", "fixed_blocks", "xla"),
        ("cuda", "float32", "fixed_blocks", "xla"),  # cuDNN's attention has half precision alone
    ],
)
def test_platform_gets_kernels_that_it_has(platform, dtype, grouped_mlp, attention):
    config = configs.default_config()
    config.compute.dtype = dtype
    compute = configs.compute_config(config, platform)
    assert (compute.grouped_mlp, compute.attention) == (grouped_mlp, attention)


BAD_FIELDS = {
    "more selected than experts": ("moe.num_selected_experts", 5, "between 1 and the number of experts, 4"),
    "unknown dispatch": ("moe.dispatch", "scatter", "choose one of ragged, dense, capacity"),
    "gradients that vanish": ("compute.dtype", "float16", "float32, bfloat16"),
    "unknown init_from": ("mcl.init_from", "last", "base, previous"),
    "unknown balance": ("router.balance", "none", "paper, released"),
    "no training data": ("data.train", "", "clipmoe_jax.prepare"),
    "no base": ("base.checkpoint", "", "base.checkpoint is empty"),
    "no batch": ("mcl.batch_size", 0, "mcl.batch_size=0 must lie between 1 and"),
    "dropout of everything": ("moe.expert_dropout_rate", 1.5, "must lie between 0.0 and 0.99"),
    "no such type": ("compute.dtype", "bf16", "float32, bfloat16"),
    "a source that is not drawn from": (
        "data.weights",
        (1, 0),
        "must be positive numbers, one for each source",
    ),
    "no room for a word": ("data.max_caption_tokens", 2, "use 3 or more, or 0"),
    "fewer pairs than centres": ("cluster.max_fit_pairs", 2, "is fewer than cluster.num_clusters=3"),
    "labels beyond 64 bits": ("cluster.num_clusters", 1000, "more than 2.63 clusters in mcl.num_stages=4"),
    "a seed twice": ("seeds", (0, 0), r"seeds=\(0, 0\) must be whole numbers from 0, each once"),
    "half a seed": ("seeds", (0.5,), "must be whole numbers"),
    "a mean that grows": ("mcl.b1", 1.5, "mcl.b1=1.5 must lie between 0.0 and"),
    "no scale": ("base.logit_scale", float("nan"), "base.logit_scale=nan must lie between"),
    "no device": ("mesh.fsdp", 0, "mesh.fsdp=0 must lie between 1 and"),
    "no patch": (
        "base.architecture.vision.patch_size",
        0,
        "vision.patch_size=0 must be a whole number from 1",
    ),
    "no head": ("base.architecture.text.head_width", 0, "text.head_width=0 must be a whole number from 1"),
    "no seed": ("seeds", (), "give at least one"),
    "validation of nothing": ("validation.every_steps", 100, "data.validation='' go together: set both"),
    "validation without a time": ("data.validation", "held_out", "validation.every_steps=0 and data.valid"),
    "the best of none": ("validation.keep_best", True, "measures nothing: set validation.every_steps"),
    "rehearsal of nothing": ("router.rehearsal_fraction", 0.25, "needs data.rehearsal: set it"),
    "features of pairs": ("router.loss", "mse", "router.loss='mse': choose one of contrastive, features"),
    "patch does not divide the image": ("base.architecture.vision.patch_size", 15, "not a multiple"),
}


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_value_is_named_with_the_fix(field, value, message):
    config = get_config("vit_l14_sharegpt4v")
    *groups, last = field.split(".")
    section = config
    for group in groups:
        section = section[group]
    with section.ignore_type():
        section[last] = value
    config.mcl.num_stages = 4 if field == "cluster.num_clusters" else 3
    if field == "moe.num_selected_experts":  # a checkpoint could bring more experts
        config.base.checkpoint, config.data.base = "", "data/base"
    with pytest.raises(ValueError, match=message):
        config_checks.validate(config)


@pytest.mark.parametrize("name", ["vit_b32", "vit_l14_sharegpt4v"])
def test_recipe_that_keeps_needs_something_to_rehearse(name):
    config = get_config(name, "keep")
    config.base.checkpoint = config.data.train = "x"
    with pytest.raises(ValueError, match="router.rehearsal_fraction=0.25 needs data.rehearsal"):
        config_checks.validate(config)
    config.data.rehearsal = "x"
    config_checks.validate(config)


def test_taught_routers_need_a_teacher_and_a_loss_for_what_they_rehearse():
    config = get_config("vit_l14_sharegpt4v", "keep")
    config.base.checkpoint = config.data.train = config.data.rehearsal = "x"
    config.router.rehearsal = "pairs"
    with pytest.raises(ValueError, match="has no loss for rehearsal=pairs: set router.rehearsal=distill"):
        config_checks.validate(config)
    config.router.rehearsal, config.moe.experts = "distill", ("consolidation", "base")
    with pytest.raises(ValueError, match="the last of moe.experts teaches, and it is 'base'"):
        config_checks.validate(config)


def test_all_that_is_wrong_with_a_config_is_told_at_once():
    config = get_config("vit_l14_sharegpt4v")
    config.base.checkpoint, config.data.base = "", "data/base"  # a checkpoint could bring more experts
    config.moe.num_selected_experts, config.mcl.batch_size, config.seeds = 5, 0, ()
    config.base.architecture.vision.patch_size, config.base.architecture.text.head_width = 15, 100
    config.base.architecture.activation, config.data.train, config.router.balance = "relu", "", "none"
    with pytest.raises(SeveralErrors) as refused:
        config_checks.validate(config)
    begun = [message.partition(":")[0] for message in refused.value.messages]
    assert begun == [
        "activation='relu'",
        "vision.image_size=224 is not a multiple of vision.patch_size=15",
        "text.width=768 is not a multiple of text.head_width=100",
        "moe.num_selected_experts=5 must lie between 1 and the number of experts, 4 (mcl.num_stages + 1)",
        "router.balance='none'",
        "seeds=() runs nothing",
        "data.train is empty",
        "mcl.batch_size=0 must lie between 1 and 1000000000000",
    ]


def none_fields(config) -> set[str]:
    """Dotted names of the fields that are None."""
    flat = trees.flatten(config.to_dict())
    return {name.replace("/", ".") for name, value in flat.items() if value is None}


def parsed(name: str, *overrides: str):
    """The config of a command line."""
    given = flags.FlagValues()
    argv = ["command", f"--config={FOLDER / name}.py", *overrides]
    config_flags.DEFINE_config_file("config", None, flag_values=given, sys_argv=argv)
    given(argv)
    return given.config


@pytest.mark.parametrize("name", FILES)
def test_field_that_is_none_has_its_type_and_its_flag(name):
    """Except `moe` of the base, which a checkpoint says. A base that is trained has an activation."""
    config = get_config(name)
    optional = {f"base.architecture.{field}": kind for field, kind in configs.OPTIONAL.items()}
    given = {"base.architecture.activation"} if config.data.base else set()
    assert none_fields(config) == (optional.keys() | {"base.architecture.moe"}) - given
    config = parsed(name, *(f"--config.{field}=192" for field in optional))
    assert none_fields(config) == {"base.architecture.moe"}
    for field, kind in optional.items():
        *groups, last = field.split(".")
        section = config
        for group in groups:
            section = section[group]
        assert section[last] == kind(192) and section.get_type(last) is kind
    with pytest.raises(flags.IllegalFlagValueError, match="mlp_width=wide: invalid literal for int"):
        parsed(name, "--config.base.architecture.text.mlp_width=wide")


def test_variant_sets_a_field_that_is_none():
    config = get_config("demo")
    field = "base.architecture.text.mlp_width"
    configs.set_variants(config, {"narrow": {field: 192}, "same": {}})
    variants = configs.variant_configs(config)
    assert variants["narrow"].base.architecture.text.mlp_width == 192
    assert variants["same"].base.architecture.text.mlp_width is None
    assert config.base.architecture.text.mlp_width is None
    configs.set_variants(config, {"wide": {field: "192"}})
    with pytest.raises(ValueError, match=r"variants\.wide: .*mlp_width='192' must be of type int"):
        configs.variant_configs(config)


def test_recorded_architecture_is_that_of_an_earlier_version():
    """Typed fields are recorded as the None that they were, and the activation as OpenAI's without a
    checkpoint that says another, so that workdirs go on."""
    config = configs.default_config()
    take_architecture(config)
    text = dataclasses.replace(VARIANTS["ViT-L/14"].text, context_length=248)
    expected = dataclasses.replace(VARIANTS["ViT-L/14"], text=text).to_dict()
    assert config.base.architecture.to_dict() == expected
    assert json.loads(json.dumps(config.to_dict()))["base"]["architecture"] == expected


NO_BASE = {
    "no text": ({"text": None}, "base.architecture.text=None must be a group of fields"),
    "an MoE": ({"moe": MoeConfig(4, 2)}, "base.architecture.moe must be None, as a base that is"),
}


@pytest.mark.parametrize(("change", "message"), NO_BASE.values(), ids=NO_BASE)
def test_base_is_a_dense_clip_of_both_towers(change, message):
    config = get_config("vit_l14_sharegpt4v")
    config.base.checkpoint, config.data.base = "", "data/base"
    configs.set_architecture(config, dataclasses.replace(configs.architecture(config), **change))
    with pytest.raises(ValueError, match=message):
        config_checks.validate(config)


def test_field_that_does_not_exist_is_refused_by_name():
    config = get_config("demo")
    with pytest.raises(AttributeError, match="learning_rate"):
        config.mcl.learningrate = 1.0
    config.mcl.unlock()
    config.mcl.learningrate = 1.0
    with pytest.raises(ValueError, match="config field mcl.learningrate does not exist"):
        config_checks.validate(config)


def test_learning_rate_is_float32():
    assert configs.phase_config(get_config("demo").mcl).learning_rates(240).dtype == np.float32


def test_inputs_of_an_earlier_version_get_todays_names():
    inputs = {"seed": 0, "run.dtype": "", "contents of data.train": "ab", "data.digit_scenes": 0}
    upgraded = {"seed": 0, "compute.dtype": "", "contents of data.train": "ab"}
    assert configs.upgrade_inputs(inputs) == upgraded
    of_evaluation = {"line": "knn:a?train=b", "contents": {"path": "12", "train": "34"}}
    upgraded = {"line": "knn:a?train=b", "contents of path": "12", "contents of train": "34"}
    assert configs.upgrade_inputs(of_evaluation) == upgraded
    with pytest.raises(ValueError, match="with data.digit_scenes=800, now data.train=digit_scenes:train"):
        configs.upgrade_inputs(inputs | {"data.digit_scenes": 800})


def test_config_argument_is_given_once():
    assert configs.parse_arg("seeds=3,small", seeds=1, small=False).to_dict() == {"seeds": 3, "small": True}
    with pytest.raises(ValueError, match="config argument 'seeds' is given twice: give it once"):
        configs.parse_arg("seeds=3,small,seeds=2", seeds=1, small=False)


@pytest.mark.parametrize(
    ("given", "seeds"), [("", ()), ("3", (1, 2, 3)), ("21-23", (21, 22, 23)), ("0-0", (0,))], ids=repr
)
def test_seeds_are_a_number_or_a_range(given, seeds):
    assert configs.parse_seeds(given) == seeds


@pytest.mark.parametrize("given", ["x", "0", "3-1", "1,2", "-1"])
def test_seeds_that_are_none_say_how_to_give_them(given):
    with pytest.raises(ValueError, match=f"seeds='{given}': give a number, 3 for seeds 1 to 3, or"):
        configs.parse_seeds(given)


def test_renamed_fields_name_fields_of_today():
    flat = {name.replace("/", ".") for name in trees.flatten(configs.default_config().to_dict())}
    for old, new in configs.RENAMED.items():
        assert old not in flat
        field = new.partition("=")[0]
        assert field in flat or field in ("compute", "chosen by platform", "chosen by the program")


@pytest.mark.parametrize(
    ("seeds", "variants", "folder"),
    [((0,), {"": []}, "moe/params"), ((3, 4), {"one": [], "two": []}, "one/seed_3/moe/params")],
    ids=["run", "sweep"],
)
def test_last_line_of_a_run_that_evaluates_nothing_says_where_the_model_is(
    monkeypatch, tmp_path, seeds, variants, folder
):
    config = get_config("demo")
    config.seeds = seeds
    given = types.SimpleNamespace(
        workdir=str(tmp_path), stage="", profile="", distributed="off", config=config
    )
    monkeypatch.setattr(main.flags, "FLAGS", given)
    monkeypatch.setattr(main.distributed, "initialize", lambda *arguments: None)
    monkeypatch.setattr(main.distributed, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(main, "run_variants", lambda *arguments: variants)
    last = main.main([])
    assert last.startswith(f"{tmp_path}/{folder}: the CLIP-MoE. Nothing was evaluated: name a test set with ")
    assert last.endswith(f"clipmoe_jax.evaluate --model={tmp_path}/{folder} --data=DATA")
    given.stage = "router"
    assert main.main([]) is None
