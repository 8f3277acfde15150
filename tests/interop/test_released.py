"""The released code's state dicts: in and out, every way a file can be wrong, and `clipmoe_jax.load`."""

import os
import pickle
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import clipmoe_jax
from clipmoe_jax.core import trees
from clipmoe_jax.data import preprocess
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.interop import released
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.interop.nametable import to_ours
from clipmoe_jax.interop.tensor_files import Tensor
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.models.inputs import MEAN, STD
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.positions import stretch_positions
from clipmoe_jax.models.transformer import MoeConfig

POSITIONS, POSITIONS_RES = "positional_embedding", "positional_embedding_res"
FILES = {
    "dense": (None, "dense CLIP"),
    "moe_all": (MoeConfig(4, 2), "CLIP-MoE (4 experts, 2 selected)"),
    "moe_last1": (MoeConfig(4, 2, num_moe_layers=1), "CLIP-MoE (4 experts, 2 selected)"),
}


@pytest.fixture(scope="module")
def states(golden_dir):
    """{file: state dict of float32 arrays}."""
    files = {name: torch.load(golden_dir / f"{name}.pt", weights_only=True) for name in FILES}
    return {name: {k: v.float().numpy() for k, v in state.items()} for name, state in files.items()}


def write(path, arrays):
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)
    return str(path)


def to_params(state):
    """A state dict of numpy arrays to our params."""
    in_memory = {name: Tensor(array.shape, lambda array=array: array) for name, array in state.items()}
    tensors, _ = released.normalise(in_memory)
    return trees.unflatten(to_ours(released.TABLE, tensors, lambda _, leaf: np.asarray(leaf)))


@pytest.mark.parametrize("name", FILES)
def test_export_of_import_is_the_identity(states, name):
    state = {key: array.astype(np.float16) for key, array in states[name].items()}
    exported = released.export_state_dict(to_params(state))
    assert exported.keys() == state.keys()
    for key in state.keys() - {POSITIONS, POSITIONS_RES}:
        np.testing.assert_array_equal(exported[key], state[key], err_msg=key)
        assert exported[key].shape == state[key].shape, key
        assert exported[key].dtype == state[key].dtype, key
    # Of the two position tables, that code reads these rows; the files hold other numbers elsewhere.
    np.testing.assert_array_equal(exported[POSITIONS][:20], state[POSITIONS][:20])
    np.testing.assert_array_equal(exported[POSITIONS_RES][20:], state[POSITIONS_RES][20:])
    np.testing.assert_array_equal(exported[POSITIONS], exported[POSITIONS_RES])


def test_positions_come_from_two_tables(states):
    state = dict(states["dense"])
    state[POSITIONS], state[POSITIONS_RES] = np.full((248, 64), 1.0), np.full((248, 64), 2.0)
    rows = to_params(state)["text"]["positional_embedding"][:, 0]
    np.testing.assert_array_equal(rows, [1.0] * 20 + [2.0] * 228)


def test_a_short_table_is_exported_alone(states):
    state = {name: array for name, array in states["dense"].items() if name != POSITIONS_RES}
    state[POSITIONS] = state[POSITIONS][:77]
    exported = released.export_state_dict(to_params(state))
    assert exported.keys() == state.keys()
    np.testing.assert_array_equal(exported[POSITIONS], state[POSITIONS])


def test_openais_scalars_are_no_parameters(states):
    scalars = {"input_resolution": np.array(32), "context_length": np.array(248), "vocab_size": np.array(300)}
    expected = trees.flatten(to_params(states["dense"]))
    assert trees.flatten(to_params(states["dense"] | scalars)).keys() == expected.keys()


@pytest.mark.parametrize("name", FILES)
def test_architecture_and_format_are_read_from_the_file(golden_dir, states, name):
    moe, source = FILES[name]
    found = read_model(str(golden_dir / f"{name}.pt"))
    assert found.source == f"{source} in the released code's format"
    assert found.config == ClipConfig(
        embed_dim=32,
        vision=VisionConfig(image_size=32, patch_size=8, width=128, num_layers=2),
        text=TextConfig(vocab_size=300, context_length=248, width=64, num_layers=2),
        moe=moe,
    )
    leaves = trees.flatten(found.params)
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    kernel = states[name]["visual.transformer.resblocks.1.attn.in_proj_weight"].T
    np.testing.assert_array_equal(leaves["visual/resblocks_1/attn/in_proj/kernel"], kernel)


def test_num_selected_experts_is_what_was_asked_for(golden_dir):
    found = read_model(str(golden_dir / "moe_all.pt"), num_selected_experts=3)
    assert found.config.moe == MoeConfig(4, 3)
    assert "4 experts, 3 selected" in found.source


def test_activation_is_what_was_asked_for(golden_dir):
    assert read_model(str(golden_dir / "dense.pt")).config.activation == "quick_gelu"
    assert read_model(str(golden_dir / "dense.pt"), activation="gelu").config.activation == "gelu"


def test_more_selected_experts_than_there_are_is_refused(golden_dir):
    with pytest.raises(ValueError, match="num_selected_experts=5 must lie between 1 and num_experts=4"):
        read_model(str(golden_dir / "moe_all.pt"), num_selected_experts=5)


@pytest.fixture(scope="module")
def short_file(states, tmp_path_factory):
    """A dense file of 77 positions, and the positions."""
    state = {name: array for name, array in states["dense"].items() if name != POSITIONS_RES}
    state[POSITIONS] = state[POSITIONS][:77]
    return write(tmp_path_factory.mktemp("short") / "short.pt", state), state[POSITIONS]


@pytest.mark.parametrize("asked", [None, 77])
def test_77_positions_are_kept(short_file, asked):
    path, positions = short_file
    found = read_model(path, context_length=asked)
    assert found.config.text.context_length == 77
    np.testing.assert_array_equal(found.params["text"]["positional_embedding"], positions)


def test_77_positions_are_stretched_on_request(short_file):
    path, positions = short_file
    found = read_model(path, context_length=248)
    assert found.config.text.context_length == 248
    stretched = found.params["text"]["positional_embedding"]
    np.testing.assert_array_equal(stretched, stretch_positions(positions))
    # Row 20 + 4 * 1 + 3 lies three quarters of the way from old row 21 to 22.
    np.testing.assert_allclose(stretched[27], positions[21] / 4 + 3 / 4 * positions[22], rtol=1e-5, atol=1e-6)


def test_other_numbers_of_positions_are_refused(short_file, golden_dir):
    with pytest.raises(
        ValueError, match=r"77 text positions, not 100: keep them \(77\) or stretch them \(248\)"
    ):
        read_model(short_file[0], context_length=100)
    with pytest.raises(ValueError, match="248 text positions, not 77"):
        read_model(str(golden_dir / "dense.pt"), context_length=77)


def test_torchscript_archive_of_openai_is_read(states, tmp_path):
    """A scripted module whose parameters bear the state dict's names, its scalars beside them."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    root.register_buffer("input_resolution", torch.tensor(32))
    for name, array in states["dense"].items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Holder())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.as_tensor(array).clone()))
    torch.jit.script(root).save(str(tmp_path / "ViT.pt"))
    found = read_model(str(tmp_path / "ViT.pt"))
    torch.save({n: torch.as_tensor(a) for n, a in states["dense"].items()}, tmp_path / "plain.pt")
    expected = read_model(str(tmp_path / "plain.pt"))
    assert found.config == expected.config
    chex.assert_trees_all_equal(found.params, expected.params)


def amid(name, part):
    """A name with a part that wraps a tower or a block."""
    for wrapped in ("visual.", "resblocks.0."):
        name = name.replace(wrapped, f"{wrapped}{part}.")
    return name


OPTIMIZER = {
    "state": {0: {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}},
    "param_groups": [{"lr": 1e-3}],
}
# What a state dict is renamed to, and what a checkpoint has around it.
WRAPPED = {
    "under state_dict": (str, lambda state: {"state_dict": state, "epoch": 3, "optimizer": OPTIMIZER}),
    "under model_state_dict": (
        str,
        lambda state: {"model_state_dict": state, "optimizer_state_dict": OPTIMIZER},
    ),
    "under model": (str, lambda state: {"model": state, "rng": {"cpu": torch.zeros(3)}, "args": {"lr": 1}}),
    "under module, as DeepSpeed has it": (str, lambda state: {"module": state, "lr_scheduler": None}),
    "under two keys": (str, lambda state: {"state": {"model": state}, "step": 7}),
    "by DistributedDataParallel": ("module.{}".format, lambda state: {"state_dict": state}),
    "by torch.compile": ("_orig_mod.{}".format, dict),
    "by both": ("_orig_mod.module.{}".format, lambda state: {"model": state}),
    "a tower by torch.compile": (lambda name: amid(name, "_orig_mod"), dict),
    "by FSDP": (lambda name: f"_fsdp_wrapped_module.{amid(name, '_fsdp_wrapped_module')}", dict),
    "blocks by checkpointing": (lambda name: amid(name, "_checkpoint_wrapped_module"), dict),
    "as a part of a module": (
        "clip.{}".format,
        lambda state: {
            "state_dict": state | {"head.weight": torch.zeros(3, 32), "criterion.scale": torch.ones(())}
        },
    ),
    "a teacher alone": ("teacher.backbone.{}".format, dict),
}


@pytest.mark.parametrize(("rename", "wrap"), WRAPPED.values(), ids=WRAPPED)
def test_state_dict_of_a_wrapped_model_is_read(states, tmp_path, rename, wrap):
    state = {rename(name): torch.tensor(array) for name, array in states["dense"].items()}
    torch.save(wrap(state), tmp_path / "wrapped.pt")
    found = read_model(str(tmp_path / "wrapped.pt"))
    assert found.source == "dense CLIP in the released code's format"
    chex.assert_trees_all_equal(found.params, to_params(states["dense"]))


def test_names_of_a_wrapped_model_are_read_from_safetensors_too(states, tmp_path):
    state = {f"_orig_mod.{name}": torch.tensor(array) for name, array in states["dense"].items()}
    safetensors.torch.save_file(state, tmp_path / "wrapped.safetensors")
    found = read_model(str(tmp_path / "wrapped.safetensors"))
    chex.assert_trees_all_equal(found.params, to_params(states["dense"]))


SEVERAL = {
    "a model and its average": lambda state: {"model": state, "model_ema": state},
    "a student and a teacher": lambda state: {
        f"{name}.{key}": tensor for name in ("student", "teacher") for key, tensor in state.items()
    },
    "a model and its average beside it": lambda state: state | {f"ema.{key}": t for key, t in state.items()},
    "the same names twice": lambda state: state | {f"module.{key}": t for key, t in state.items()},
}


@pytest.mark.parametrize("wrap", SEVERAL.values(), ids=SEVERAL)
def test_several_models_in_a_file_are_refused(states, tmp_path, wrap):
    torch.save(wrap({n: torch.tensor(a) for n, a in states["dense"].items()}), tmp_path / "several.pt")
    with pytest.raises(ValueError, match=r"several models \((\S*visual.conv1.weight(, )?){2}\): save one of"):
        read_model(str(tmp_path / "several.pt"))


BAD_NUMBERS = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf}


@pytest.mark.parametrize("number", BAD_NUMBERS.values(), ids=BAD_NUMBERS)
@pytest.mark.parametrize(
    "name", ["visual.transformer.resblocks.1.mlp.c_fc.bias", "logit_scale", POSITIONS_RES]
)
def test_numbers_that_are_none_are_refused_when_they_are_read(states, tmp_path, name, number):
    array = np.array(states["dense"][name], np.float16)
    array[(-1,) * array.ndim] = number
    path = write(tmp_path / "bad.pt", states["dense"] | {name: array})
    expected = POSITIONS if name == POSITIONS_RES else name  # the two tables are read as one
    with pytest.raises(ValueError, match=f"bad.pt: {expected} has NaN or infinite values: give a checkpoint"):
        read_model(path)


def test_numbers_that_are_none_are_refused_in_a_runs_folder_too(run_folder, tmp_path):
    found = read_model(str(run_folder))
    leaves = trees.flatten(found.params)
    leaves["visual/proj"] = np.full_like(leaves["visual/proj"], np.nan)
    save_model(tmp_path / "bad", found.config, trees.unflatten(leaves))
    with pytest.raises(ValueError, match="bad: visual/proj has NaN or infinite values"):
        read_model(str(tmp_path / "bad"))


@pytest.mark.parametrize(
    ("dtype", "number", "text"),
    [("float16", 7e4, r"7e\+04"), ("bfloat16", 3.4e38, r"3.4e\+38"), ("float32", 1e39, r"1e\+39")],
)
def test_numbers_too_large_for_a_dtype_are_refused(states, tmp_path, dtype, number, text):
    array = np.array(states["dense"]["visual.proj"], np.float64)
    array[0, 1] = -number
    path = write(tmp_path / "large.pt", states["dense"] | {"visual.proj": array})
    with (
        warnings.catch_warnings(),
        pytest.raises(
            ValueError,
            match=f"large.pt: visual.proj has values up to {text}, more than {dtype} can hold: choose",
        ),
    ):
        warnings.simplefilter("error")
        read_model(path, dtype=dtype)


@pytest.mark.parametrize("kind", ["the released code's", "OpenAI's"])
def test_files_of_known_code_have_its_head_width(states, golden_dir, tmp_path, kind):
    state = dict(states["dense"])
    if kind == "OpenAI's":
        state = {name: array for name, array in state.items() if name != POSITIONS_RES} | {
            "vocab_size": np.array(300)
        }
    path = write(tmp_path / "known.pt", state)
    assert read_model(path, vision_head_width=64, text_head_width=64).source == f"dense CLIP in {kind} format"
    with pytest.raises(ValueError, match="known.pt says that its text.head_width is 64, not 32: ask for 64"):
        read_model(path, text_head_width=32)


def test_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt does not exist: give a file or .*pretrained="):
        read_model(str(tmp_path / "nowhere.pt"))


def test_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 0}')  # a run's own folder has one
    with pytest.raises(ValueError, match=r"neither model.json \(a run's; give RUN/base, .*transformers"):
        read_model(str(tmp_path))


def test_truncated_file_is_refused(golden_dir, tmp_path):
    content = (golden_dir / "dense.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.pt cannot be read as safetensors or as a PyTorch state dict: "):
        read_model(str(tmp_path / "cut.pt"))


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.pt").touch()
    with pytest.raises(
        ValueError, match="empty.pt cannot be read as safetensors or as a PyTorch state dict: "
    ):
        read_model(str(tmp_path / "empty.pt"))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def save_plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_plain_pickle])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, save):
    save({"visual.proj": Malicious(tmp_path / "owned")}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt cannot be read as safetensors or as a PyTorch state dict: "):
        read_model(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "owned").exists()


def without(*names):
    return lambda state: {k: v for k, v in state.items() if k not in names}


BLOCK = "transformer.resblocks.1"
WRONG = {
    "another model": (
        "dense",
        lambda state: {"conv1.weight": np.zeros(2), "fc.bias": np.zeros(2)},
        r"not a ViT CLIP: its first names are \['conv1.weight', 'fc.bias'\]",
    ),
    "a tensor that gives a size is missing": (
        "dense",
        without("visual.positional_embedding"),
        "the checkpoint lacks visual.positional_embedding$",
    ),
    "leaves are missing": (
        "dense",
        without("ln_final.weight", f"visual.{BLOCK}.mlp.c_fc.bias"),
        f"2 missing: ln_final.weight, visual.{BLOCK}.mlp.c_fc.bias$",
    ),
    "a leaf that the architecture lacks": (
        "moe_all",
        lambda state: state | {f"{BLOCK}.mlp.c_fc.bias": np.zeros(256)},
        f"1 unexpected: {BLOCK}.mlp.c_fc.bias$",
    ),
    "a leaf of another shape": (
        "dense",
        lambda state: state | {"text_projection": np.zeros((64, 48))},
        r"1 of another shape: text_projection is \(64, 48\), not \(64, 32\)$",
    ),
    "all three": (
        "moe_all",
        lambda state: (
            without("ln_final.weight")(state)
            | {f"{BLOCK}.mlp.c_fc.bias": np.zeros(256), "ln_final.bias": np.zeros(3)}
        ),
        f"1 missing: ln_final.weight; 1 unexpected: {BLOCK}.mlp.c_fc.bias; "
        r"1 of another shape: ln_final.bias is \(3,\), not \(64,\)$",
    ),
    "a name that CLIP-MoE does not have": (
        "dense",
        lambda state: state | {"visual.attnpool.bias": np.zeros(2)},
        "1 unexpected: visual.attnpool.bias$",
    ),
    "an expert is missing": (
        "moe_all",
        without(f"{BLOCK}.experts.1.c_proj.weight"),
        f"1 missing: {BLOCK}.experts.1.c_proj.weight$",
    ),
    "the last expert is missing": (
        "moe_all",
        without(f"{BLOCK}.experts.3.c_proj.weight"),
        f"1 missing: {BLOCK}.experts.3.c_proj.weight$",
    ),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_named(states, tmp_path, name, change, message):
    path = write(tmp_path / "wrong.pt", change(states[name]))
    with pytest.raises(ValueError, match=message):
        read_model(path)


def test_pytorch_file_without_a_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt is not a state dict: it holds a list"):
        read_model(str(tmp_path / "list.pt"))
    torch.save({"epoch": 3, "args": {"lr": 1.0}}, tmp_path / "args.pt")
    with pytest.raises(
        ValueError, match=r"args.pt is not a state dict: it holds \['epoch', 'args'\] and no ten"
    ):
        read_model(str(tmp_path / "args.pt"))


def test_names_that_the_format_lacks_are_named():
    with pytest.raises(ValueError, match=r"no names for \['text/adapter/kernel'\]"):
        released.export_state_dict({"text": {"adapter": {"kernel": np.zeros(2)}}})


@pytest.fixture(scope="module")
def golden_clip(golden_dir):
    return clipmoe_jax.load(str(golden_dir / "moe_last1.pt"))


def close_to(found, expected):
    return np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_loaded_model_says_what_it_is_and_prints_nothing(golden_dir, capsys):
    model = clipmoe_jax.load(str(golden_dir / "moe_last1.pt"))
    assert model.source == "CLIP-MoE (4 experts, 2 selected) in the released code's format"
    assert repr(model) == f"<{model.source}, embed_dim 32>"
    assert capsys.readouterr() == ("", "")


def test_features_of_preprocessed_images_equal_the_golden_ones(golden_clip, golden):
    features = golden_clip.encode_image(golden["images_nchw"].transpose(0, 2, 3, 1))
    assert features.dtype == jnp.float32
    assert close_to(features, golden["moe_last1/image_features"])


def test_features_of_token_ids_equal_the_golden_ones(golden_clip, golden):
    features = golden_clip.encode_text(golden["tokens"])
    assert features.dtype == jnp.float32
    assert close_to(features, golden["moe_last1/text_features"])


def test_pil_images_are_encoded_as_their_preprocessed_pixels(golden_clip):
    """Of any size and mode; as the preprocessed pixels of the same images."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (50, 40, 3), np.uint8)),
        Image.fromarray(rng.integers(0, 256, (32, 90), np.uint8)),
    ]
    pixels = np.stack([preprocess.preprocess_image(image, 32) for image in images])
    expected = golden_clip.encode_image(((pixels / 255 - MEAN) / STD).astype(np.float32))
    assert close_to(golden_clip.encode_image(images), expected)
    assert close_to(golden_clip.encode_image(pixels), expected)


def test_normalize_gives_unit_rows_in_the_same_direction(golden_clip, golden):
    for encode, inputs in (
        (golden_clip.encode_image, golden["images_nchw"].transpose(0, 2, 3, 1)),
        (golden_clip.encode_text, golden["tokens"]),
    ):
        features, unit = encode(inputs), encode(inputs, normalize=True)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        assert np.max(np.abs(lengths - 1)) > 0.1
        np.testing.assert_allclose(unit, features / lengths, rtol=1e-5, atol=1e-6)


def test_bfloat16_computation_still_gives_float32(golden_dir, golden):
    model = clipmoe_jax.load(str(golden_dir / "dense.pt"), dtype="bfloat16")
    features = model.encode_image(golden["images_nchw"].transpose(0, 2, 3, 1))
    expected = golden["dense/image_features"]
    assert features.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(features - expected) / np.linalg.norm(expected) < 2e-2


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a run leaves: RUN/stage_1/params holds a model with CLIP's own vocabulary."""
    config = ClipConfig(
        embed_dim=16,
        vision=VisionConfig(image_size=16, patch_size=8, width=16, num_layers=1, head_width=8),
        text=TextConfig(context_length=12, width=16, num_layers=1, head_width=8),
    )
    images, tokens = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 12), jnp.int32)
    params = jax.jit(Clip(config).init)(jax.random.key(0), images, tokens)["params"]
    folder = tmp_path_factory.mktemp("run") / "stage_1"
    save_model(folder / "params", config, params)
    return folder


def test_strings_are_encoded_as_their_token_ids(run_folder):
    model = clipmoe_jax.load(str(run_folder / "params"))
    texts = ["A photo of a cat.", "Two dogs, " + "running " * 20]
    features = model.encode_text(texts)
    np.testing.assert_allclose(features, model.encode_text(Tokenizer(12)(texts)), rtol=1e-6)
    np.testing.assert_allclose(model.encode_text(texts[0]), features[:1], rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(features[0] - features[1])) > 1e-3


def test_a_stage_folder_is_as_good_as_its_params_folder(run_folder):
    outer, inner = read_model(str(run_folder)), read_model(str(run_folder / "params"))
    assert outer.source == inner.source == "dense CLIP of a run"
    assert outer.config == inner.config
    np.testing.assert_array_equal(outer.params["visual"]["proj"], inner.params["visual"]["proj"])
