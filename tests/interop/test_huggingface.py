"""Transformers' models, which really run here, against ours on the same weights; every way they are saved."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from grids import exhaustive, grid
from patches import patch_features
from safetensors.numpy import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from clipmoe_jax.convert import convert
from clipmoe_jax.core import trees
from clipmoe_jax.interop import huggingface
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import (
    Clip,
    ClipConfig,
    TextConfig,
    VisionConfig,
    abstract_params,
    normalize_features,
)
from clipmoe_jax.models.transformer import MoeConfig

VOCAB, LENGTH = 100, 12
# Transformers takes the text feature at eos_token_id, we at the highest id: here the same.
END_ID = VOCAB - 1
TOKENS = np.array(
    [
        [98, 5, 17, 3, 42, 8, 77, 20, 61, 9, 30, END_ID],
        [98, 50, 2, END_ID, 0, 0, 0, 0, 0, 0, 0, 0],
        [98, END_ID, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


def make_torch_clip(activation="quick_gelu", **text):
    """Two vision blocks of 4 heads 16 wide, three text blocks of 2 heads 8 wide."""
    torch.manual_seed(0)
    sizes = {"hidden_act": activation, "layer_norm_eps": 1e-3, "projection_dim": 24}
    config = CLIPConfig(
        text_config=sizes
        | {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": LENGTH,
            "bos_token_id": 98,
            "eos_token_id": END_ID,
            "pad_token_id": 1,
        }
        | text,
        vision_config=sizes
        | {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # fresh norms and biases are ones and zeros, which would hide a swap
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=grid("quick_gelu", rest=["gelu"]))
def pair(request, tmp_path_factory):
    """A torch model, the folder it was saved to, and what we read from there."""
    torch_model = make_torch_clip(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    torch_model.save_pretrained(folder)
    return torch_model, folder, read_model(str(folder))


@pytest.fixture(scope="module")
def outputs(pair):
    """Of transformers' model and of ours, for the same images and captions."""
    torch_model, _, loaded = pair
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    pixels, ids = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(TOKENS)
    with torch.no_grad():
        theirs = {
            "image_features": torch_model.get_image_features(pixel_values=pixels).pooler_output,
            "text_features": torch_model.get_text_features(input_ids=ids).pooler_output,
            "logits": torch_model(input_ids=ids, pixel_values=pixels).logits_per_image,
        }
    ours = jax.jit(Clip(loaded.config).apply)({"params": loaded.params}, images, TOKENS)
    return theirs, ours


def test_architecture_and_format_are_read_from_the_folder(pair):
    torch_model, _, loaded = pair
    assert loaded.source == "dense CLIP in transformers' format"
    assert loaded.config == ClipConfig(
        embed_dim=24,
        vision=VisionConfig(image_size=32, patch_size=8, width=64, num_layers=2, head_width=16),
        text=TextConfig(VOCAB, LENGTH, width=16, num_layers=3, head_width=8),
        activation=torch_model.config.text_config.hidden_act,
        layer_norm_eps=1e-3,
    )


@pytest.mark.parametrize("name", ["image_features", "text_features"])
def test_features_equal_transformers(outputs, name):
    theirs, ours = outputs
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value_attention", [False, True], ids=["queries and keys", "values alone"])
def test_patch_features_equal_transformers(pair, value_attention):
    torch_model, _, loaded = pair
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    options = {"output": "patches", "value_attention": value_attention}
    ours, _ = Clip(loaded.config).apply({"params": loaded.params}, images, method="encode_image", **options)
    theirs = patch_features(torch_model, torch.tensor(images.transpose(0, 3, 1, 2)), value_attention)
    assert ours.shape == (3, 4, 4, 24)
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)


def test_logits_equal_transformers(pair, outputs):
    (_, _, loaded), (theirs, ours) = pair, outputs
    image, text = (normalize_features(ours[name]) for name in ("image_features", "text_features"))
    logits = jnp.exp(loaded.params["logit_scale"]) * image @ text.T
    # The scale is about 14, so 1e-4 of the features may become 1e-3.
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", grid(torch.bfloat16, rest=[torch.float32, torch.float16]), ids=str)
def test_export_of_import_is_the_identity(tmp_path, dtype):
    model = make_torch_clip().to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), "huggingface", str(tmp_path / "ours"))
    back, found = CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values())
    assert_same_state(back, model)
    assert back.config.dtype == dtype
    assert read_model(str(tmp_path / "ours")).config == read_model(str(tmp_path / "theirs")).config


def assert_same_state(model, expected):
    """Names, shapes, dtypes and values."""
    state, expected = model.state_dict(), expected.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape, name
        assert torch.equal(state[name], tensor), name


def save_in_shards(model, folder):
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def save_as_pickle(model, folder):
    """As transformers 4 and earlier did."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_as_sharded_pickles(model, folder):
    model.config.save_pretrained(folder)
    state, weight_map = model.state_dict(), {}
    for i, names in enumerate((list(state)[:40], list(state)[40:])):
        torch.save({name: state[name] for name in names}, folder / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save_as_a_compiled_models_pickle(model, folder):
    model.config.save_pretrained(folder)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "save", [save_in_shards, save_as_pickle, save_as_sharded_pickles, save_as_a_compiled_models_pickle]
)
def test_other_kinds_of_files_give_the_same_model(pair, tmp_path, save):
    torch_model, _, loaded = pair
    save(torch_model, tmp_path)
    found = read_model(str(tmp_path))
    assert found.config == loaded.config
    for name, leaf in trees.flatten(loaded.params).items():
        np.testing.assert_array_equal(trees.flatten(found.params)[name], leaf, err_msg=name)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    save_in_shards(make_torch_clip(), tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"of which \['model-00002-of-.*'\] do not exist"):
        read_model(str(tmp_path))


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    save_in_shards(make_torch_clip(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["logit_bias"] = index["weight_map"]["logit_scale"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names tensors that their files lack: \['logit_bias'\]"):
        read_model(str(tmp_path))


def encode(found, images, tokens):
    run = jax.jit(Clip(found.config).apply)
    return run({"params": found.params}, images, tokens)


@pytest.mark.parametrize(
    ("text", "eos"),
    grid(({"eos_token_id": 7}, 7), ({"eos_token_id": 2}, None), rest=[({"eos_token_id": END_ID}, None)]),
)
def test_the_end_token_is_where_transformers_finds_it(tmp_path, text, eos):
    """Id 7 stands inside each row and again further on; 2, of old files, means the highest id."""
    model = make_torch_clip(**text)
    model.save_pretrained(tmp_path)
    found = read_model(str(tmp_path))
    assert found.config.text.eos_token_id == eos
    tokens = np.array(
        [[98, 5, 7, 3, 7, END_ID, 0, 0, 0, 0, 0, 0], [98, 7, 2, 4, END_ID, 0, 0, 0, 0, 0, 0, 7]]
    )
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=torch.tensor(tokens)).pooler_output
    ours = encode(found, np.zeros((2, 32, 32, 3), np.float32), tokens)["text_features"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_feed_forward_layer_of_another_width_is_read(tmp_path):
    model = make_torch_clip(intermediate_size=40)
    model.save_pretrained(tmp_path)
    found = read_model(str(tmp_path))
    assert (found.config.text.mlp_width, found.config.vision.mlp_width) == (40, None)
    with torch.no_grad():
        theirs = model.get_text_features(input_ids=torch.tensor(TOKENS)).pooler_output
    ours = encode(found, np.zeros((3, 32, 32, 3), np.float32), TOKENS)["text_features"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def vision_tower(tmp_path):
    """CLIPVisionModelWithProjection, and the folder it was saved to."""
    whole = make_torch_clip()
    whole.save_pretrained(tmp_path / "whole")
    tower = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "whole")
    tower.save_pretrained(tmp_path / "tower")
    return tower.eval(), tmp_path / "tower"


def test_vision_tower_alone_encodes_images_and_no_text(vision_tower):
    tower, folder = vision_tower
    found = read_model(str(folder))
    assert found.source == "dense CLIP vision tower in transformers' format"
    assert found.config.text is None and found.params.keys() == {"visual"}
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = tower(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).image_embeds
    ours, _ = Clip(found.config).apply({"params": found.params}, images, method="encode_image")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_export_of_an_imported_vision_tower_is_the_identity(vision_tower, tmp_path):
    tower, folder = vision_tower
    convert(str(folder), "huggingface", str(tmp_path / "ours"))
    back, found = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(found.values())
    assert_same_state(back, tower)


def test_a_vision_tower_without_projection_is_refused(tmp_path):
    CLIPVisionModel(make_torch_clip().config.vision_config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a vision tower without its projection: give the whole CLIPModel"):
        read_model(str(tmp_path))


def test_a_bfloat16_file_becomes_float32_of_the_same_values(tmp_path):
    model = make_torch_clip().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    params = trees.flatten(read_model(str(tmp_path)).params)
    kernel = params["text/resblocks_2/mlp/c_fc/kernel"]
    assert kernel.dtype == np.float32
    fc1 = model.state_dict()["text_model.encoder.layers.2.mlp.fc1.weight"]
    np.testing.assert_array_equal(kernel.T, fc1.float().numpy())
    np.testing.assert_array_equal(kernel, kernel.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_position_ids_of_old_files_are_no_parameters(tmp_path):
    model = make_torch_clip()
    model.config.save_pretrained(tmp_path)
    counted = {
        "text_model.embeddings.position_ids": torch.arange(LENGTH)[None],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    torch.save(model.state_dict() | counted, tmp_path / "pytorch_model.bin")
    expected = trees.flatten(abstract_params(read_model(str(tmp_path)).config))
    assert trees.flatten(read_model(str(tmp_path)).params).keys() == expected.keys()


def test_an_empty_config_means_openais_vit_b_32():
    config = huggingface.import_config({"model_type": "clip", "text_config": None})
    assert config == ClipConfig()
    theirs = CLIPConfig()
    assert config == huggingface.import_config(theirs.to_dict())


def test_a_config_dict_of_old_files_wins():
    """As in transformers, fields that it leaves out included."""
    old = {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {"hidden_size": 512, "layer_norm_eps": 1e-3},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        "vision_config": {"num_hidden_layers": 3},
        "vision_config_dict": None,
    }
    config = huggingface.import_config(old)
    assert (config.text.width, config.vision.num_layers, config.layer_norm_eps) == (768, 3, 1e-5)
    theirs = CLIPConfig.from_dict(old).to_dict()
    assert config == huggingface.import_config(theirs)


REFUSED = {
    "not a CLIP": ({"model_type": "siglip"}, r"model_type='siglip'.*give a CLIP \('clip'\)"),
    "one tower": ({"model_type": "clip_text_model"}, "model_type='clip_text_model'"),
    "two activations": (
        {"model_type": "clip", "text_config": {"hidden_act": "gelu"}},
        "text_config.hidden_act='gelu' is not vision_config.hidden_act='quick_gelu'",
    ),
    "an activation we do not have": (
        {"model_type": "clip"} | {f"{t}_config": {"hidden_act": "relu"} for t in ("text", "vision")},
        "activation='relu': choose one of .*'gelu', 'quick_gelu'",
    ),
    "several end tokens": (
        {"model_type": "clip", "text_config": {"eos_token_id": [7, 8]}},
        r"eos_token_id=\[7, 8\]: this program looks for a single id",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_config_of_another_model_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "transformers' config.json and none of .*'model.safetensors'"),
        (b"\x10" * 100, "cannot be read as safetensors or as a PyTorch state dict"),
        (b"\x10" + bytes(7) + b'{"a": 1', "truncated or not a safetensors file: .*header"),
        (b"\x04" + bytes(7) + b'{"a"', "truncated or not a safetensors file: .*JSON"),
    ],
    ids=["no file", "neither kind", "cut in its header", "a broken header"],
)
def test_weights_that_cannot_be_read_are_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


def test_sizes_that_the_config_does_not_say_are_named(pair, tmp_path):
    torch_model, folder, _ = pair
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 77
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    message = r"1 of another shape: text_model.*position_embedding.weight is \(12, 16\), not \(77, 16\)$"
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


def test_truncated_file_is_refused(pair, tmp_path):
    _, folder, _ = pair
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not .*not fully covered"):
        read_model(str(tmp_path))


def test_names_that_do_not_fit_are_named_ten_at_most(tmp_path):
    model = make_torch_clip()
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    for name in [name for name in state if ".layers.1." in name and "vision" in name]:
        del state[name]  # 16 names
    state["text_model.gate.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"1 unexpected: text_model.gate.weight$") as error:
        read_model(str(tmp_path))
    missing = str(error.value).split("16 missing: ")[1].split(", …;")[0].split(", ")
    assert len(missing) == 10 and missing[0].startswith("vision_model.encoder.layers.1.")


def test_weights_of_transformers_without_their_config_are_refused(pair, tmp_path):
    _, folder, _ = pair
    (tmp_path / "some.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="transformers' names, but no config.json beside it says its sizes"):
        read_model(str(tmp_path))
    assert read_model(str(folder / "model.safetensors")).config == read_model(str(folder)).config


SIDE = {"height": 32, "width": 32}
# Fields of an image processor, and how they are refused.
PREPROCESSING = {
    "ours": ({"size": {"shortest_edge": 32}, "crop_size": SIDE, "do_center_crop": True, "resample": 3}, ""),
    "ours in an older file": (
        {"size": 32, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"},
        "",
    ),
    "ours, rounded": ({"image_mean": [0.481, 0.458, 0.408], "rescale_factor": 0.00392157}, ""),
    "ours in other words": (
        {"image_processor_type": "CLIPImageProcessorFast", "size": None, "do_pad": None},
        "",
    ),
    "another mean": (
        {"image_mean": [0.5, 0.5, 0.5]},
        r"image_mean=\[0.5, 0.5, 0.5\], so .* has image_mean=\[0.48",
    ),
    "another deviation": ({"image_std": [1, 1, 1]}, "image_std="),
    "means of two channels": ({"image_mean": [0.4, 0.4]}, "image_mean="),
    "no normalisation": ({"do_normalize": False}, "do_normalize=False, so .*do_normalize=True"),
    "no rescaling": ({"do_rescale": False}, "do_rescale=False"),
    "rescaling to -1 to 1": ({"rescale_factor": 1 / 127.5}, "rescale_factor="),
    "another size": ({"size": {"shortest_edge": 40}}, "size={'shortest_edge': 40}"),
    "another size in an older file": ({"size": 40, "crop_size": 32}, "size={'shortest_edge': 40}"),
    "the longer edge": ({"size": {"longest_edge": 32}}, "size={'longest_edge': 32}"),
    "squashed": ({"size": SIDE}, "size={'height': 32, 'width': 32}"),
    "another crop": ({"crop_size": 28}, "crop_size={'height': 28, 'width': 28}"),
    "no crop": ({"do_center_crop": False}, "do_center_crop=False"),
    "no resizing": ({"do_resize": False}, "do_resize=False"),
    "another filter": ({"resample": 2}, "resample=2"),
    "padding": ({"do_pad": True}, "do_pad=True"),
    "another processor": (
        {"image_processor_type": "ViTImageProcessor"},
        "image_processor_type='ViTImageProcessor', so .*image_processor_type='CLIPImageProcessor'",
    ),
    "several": (
        {"do_center_crop": False, "resample": 2, "image_mean": 0.5},
        "resample=2, do_center_crop=False, image_mean=0.5, so the model was trained on other images",
    ),
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize(("fields", "refused"), PREPROCESSING.values(), ids=PREPROCESSING)
def test_another_preprocessing_is_refused(pair, tmp_path, file, fields, refused):
    """All fields at once, in the image processor's own file and in that of transformers 5."""
    _, folder, _ = pair
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    content = (
        fields if file.startswith("pre") else {"image_processor": fields, "processor_class": "CLIPProcessor"}
    )
    (tmp_path / file).write_text(json.dumps(content))
    if not refused:
        assert read_model(str(tmp_path)).config == read_model(str(folder)).config
        return
    with pytest.raises(ValueError, match=f"/{file} has {refused}"):
        read_model(str(tmp_path))


def test_a_processor_without_images_says_nothing_of_them(pair, tmp_path):
    _, folder, _ = pair
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert read_model(str(tmp_path)).config == read_model(str(folder)).config


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "processor_config.json"])
def test_a_list_in_place_of_fields_is_refused(pair, tmp_path, file):
    _, folder, _ = pair
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / file).write_text("[]")
    with pytest.raises(ValueError, match=f"/{file} holds a list, not an object"):
        read_model(str(tmp_path))


def make_moe_config(moe):
    """Towers of different depth, so that `num_moe_layers` is clipped in one of them."""
    return ClipConfig(
        embed_dim=8,
        vision=VisionConfig(image_size=8, patch_size=8, width=16, num_layers=3, head_width=8, mlp_width=24),
        text=TextConfig(vocab_size=9, context_length=4, width=8, num_layers=1, head_width=4, eos_token_id=5),
        activation="gelu",
        layer_norm_eps=1e-6,
        moe=moe,
    )


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_params(config))


@pytest.mark.parametrize(
    "moe",
    [
        MoeConfig(3, 2, sequence_share=2.0),
        MoeConfig(4, 1, num_moe_layers=2),
        MoeConfig(4, 2, expert_layers="attention_and_feed_forward"),
    ],
    ids=str,
)
def test_export_of_an_imported_clip_moe_is_the_identity(tmp_path, moe):
    config = make_moe_config(moe)
    params = random_params(config)
    arrays = huggingface.export_state_dict(params)
    assert arrays["vision_model.encoder.layers.2.mlp.fc1.weight"].shape == (moe.num_experts, 24, 16)
    described = huggingface.export_config(config, "float32")
    assert huggingface.import_config(json.loads(json.dumps(described))) == config


@pytest.mark.parametrize("old", [False, True])
def test_weights_of_a_clip_moe_are_read_under_both_names(tmp_path, old):
    """Version 0.1.0 wrote the experts one level deeper. The first block is dense: its names are the same."""
    config = make_moe_config(MoeConfig(4, 1, num_moe_layers=2))
    params = random_params(config)
    arrays = {name: a.copy("C") for name, a in huggingface.export_state_dict(params).items()}
    stacked = {name for name, a in arrays.items() if ".mlp.fc" in name and a.shape[0] == 4}
    assert len(stacked) == 3 * 4
    if old:
        arrays = {n.replace(".mlp.", ".mlp.experts.") if n in stacked else n: a for n, a in arrays.items()}
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(huggingface.export_config(config, "float32")))
    found = read_model(str(tmp_path))
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.params, params)


def test_params_of_another_model_are_not_exported():
    with pytest.raises(ValueError, match="transformers' CLIP has no names for .*text/adapter"):
        huggingface.export_state_dict({"text": {"adapter": np.zeros(2)}})


@exhaustive
def test_vit_b_32_at_full_size_equals_transformers(tmp_path):
    """Features of both towers, random weights."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    model.save_pretrained(tmp_path)
    found = read_model(str(tmp_path))
    assert found.config == ClipConfig()
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
    tokens = rng.integers(1, 49406, (2, 77))
    tokens[:, [0, -1]] = 49406, 49407
    with torch.no_grad():
        pixels = torch.tensor(images.transpose(0, 3, 1, 2))
        theirs = {
            "image_features": model.get_image_features(pixel_values=pixels).pooler_output,
            "text_features": model.get_text_features(input_ids=torch.tensor(tokens)).pooler_output,
        }
    ours = encode(found, images, tokens)
    for name, features in theirs.items():
        np.testing.assert_allclose(ours[name], features, rtol=0, atol=1e-4, err_msg=name)
