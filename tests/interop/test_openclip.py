"""open_clip, which really runs here, against ours on the same weights; its checkpoints in and out."""

import copy
import json

import jax
import numpy as np
import open_clip
import pytest
import torch
from grids import grid, quick
from PIL import Image
from safetensors.torch import load_file, save_file

from clipmoe_jax.convert import convert
from clipmoe_jax.core import trees
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.interop import openclip, released
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, normalize
from clipmoe_jax.models.positions import resize_grid

MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2},
}
TOKENS = np.array([[98, 5, 17, 3, 42, 8, 77, 20, 61, 9, 30, 99], [98, 50, 7, 99, 0, 0, 0, 7, 0, 0, 0, 0]])
EPS = {"norm_kwargs": {"eps": 1e-3}}
CASES = {
    "quick_gelu": {},
    "gelu": {"quick_gelu": False},
    "feed-forward layers of other widths": {
        "vision_cfg": {"mlp_ratio": 4.9231},
        "text_cfg": {"mlp_ratio": 3.3},
    },
    "another eps": {"vision_cfg": EPS, "text_cfg": EPS},
    "the end token by its id": {"text_cfg": {"pool_type": "eos", "eos_id": 7}},
    "the text tower under a prefix": {"custom_text": True},
}


def changed(change, model=MODEL):
    """A model config with some fields changed."""
    model = copy.deepcopy(model)
    for name, value in change.items():
        model[name] = model[name] | value if name in ("vision_cfg", "text_cfg") else value
    return model


def make_model(model_cfg):
    """Random weights, norms and biases too, which would otherwise hide a swap."""
    torch.manual_seed(0)
    fields = {name: value for name, value in model_cfg.items() if name != "custom_text"}
    kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    model = kind(**fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_config(folder, model_cfg, **preprocess_cfg):
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def save_safetensors(model, folder):
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def save_pickle(model, folder):
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")


def assert_same_features(found, model, size=32):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    ours = jax.jit(Clip(found.config).apply)({"params": found.params}, images, TOKENS)
    with torch.no_grad():
        image = model.encode_image(torch.tensor(images.transpose(0, 3, 1, 2)))
        text = model.encode_text(torch.tensor(TOKENS))
    np.testing.assert_allclose(ours["image_features"], image, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours["text_features"], text, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("save", grid(save_safetensors, rest=[save_pickle]))
@pytest.mark.parametrize(
    "change", quick(CASES, "feed-forward layers of other widths", "another eps", "the end token by its id")
)
def test_features_equal_open_clip(tmp_path, change, save):
    model_cfg = changed(change)
    model = make_model(model_cfg)
    write_config(tmp_path, model_cfg)
    save(model, tmp_path)
    found = read_model(str(tmp_path))
    assert found.source == "dense CLIP in open_clip's format"
    assert_same_features(found, model)


def test_architecture_and_format_are_read_from_the_folder(tmp_path):
    model_cfg = changed(CASES["feed-forward layers of other widths"] | CASES["another eps"])
    model_cfg["vision_cfg"]["mlp_ratio"], model_cfg["text_cfg"]["mlp_ratio"] = 4.9231, 4.0
    assert openclip.import_config({"model_cfg": model_cfg}) == ClipConfig(
        embed_dim=24,
        # 64 * 4.9231 = 315.08, rounded down as open_clip does
        vision=VisionConfig(32, 8, width=64, num_layers=3, head_width=16, mlp_width=315),
        text=TextConfig(100, 12, width=32, num_layers=2, head_width=8),
        layer_norm_eps=1e-3,
    )


def test_training_checkpoint_is_read(tmp_path):
    """Names of a wrapped model beside epoch and optimizer; the folder's config describes it."""
    model = make_model(MODEL)
    write_config(tmp_path, MODEL)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": state, "optimizer": optimizer}, tmp_path / "epoch_3.pt"
    )
    assert_same_features(read_model(str(tmp_path / "epoch_3.pt")), model)


def test_a_bare_state_dict_does_not_say_its_activation_and_head_widths(tmp_path):
    """They are what is asked for, and what OpenAI's models have where nobody asks."""
    model = make_model(changed({"quick_gelu": False, "text_cfg": {"width": 64, "heads": 4}}))
    path = tmp_path / "epoch_3.pt"
    torch.save(model.state_dict(), path)
    assumed = read_model(str(path))
    assert assumed.config.activation == "quick_gelu"
    assert (assumed.config.vision.head_width, assumed.config.text.head_width) == (64, 64)
    assert assumed.source == (
        "dense CLIP in OpenAI's names (assumed, as the file does not say it: activation=quick_gelu, "
        "vision.head_width=64, text.head_width=64)"
    )
    told = read_model(str(path), activation="gelu", vision_head_width=16, text_head_width=16)
    assert told.source == "dense CLIP in OpenAI's names"
    assert_same_features(told, model)


def test_a_head_width_must_be_given_where_64_is_none(tmp_path):
    torch.save(make_model(MODEL).state_dict(), tmp_path / "epoch_3.pt")
    with pytest.raises(
        ValueError, match="text tower are, and its width 32 is not a multiple of 64: give text_he"
    ):
        read_model(str(tmp_path / "epoch_3.pt"))
    with pytest.raises(ValueError, match="text.width=32 is not a multiple of text.head_width=24"):
        read_model(str(tmp_path / "epoch_3.pt"), text_head_width=24)


def test_another_head_width_than_the_config_says_is_refused(tmp_path):
    write_config(tmp_path, MODEL)
    save_safetensors(make_model(MODEL), tmp_path)
    assert read_model(str(tmp_path), vision_head_width=16, text_head_width=8).config.text.head_width == 8
    with pytest.raises(ValueError, match="says that its vision.head_width is 16, not 64: ask for 16"):
        read_model(str(tmp_path), vision_head_width=64)
    both = "its vision.head_width is 16, not 64 and its text.head_width is 8, not 4: ask for 16 and 8 "
    with pytest.raises(ValueError, match=both):
        read_model(str(tmp_path), vision_head_width=64, text_head_width=4)


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-e-14"])
def test_head_widths_that_bare_state_dicts_are_given(name):
    vision = open_clip.get_model_config(name)["vision_cfg"]
    assert released.VISION_HEAD_WIDTHS[vision["width"]] == vision["head_width"]


@pytest.mark.parametrize("dtype", grid(torch.bfloat16, rest=[torch.float32, torch.float16]), ids=str)
@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_export_of_import_is_the_identity(tmp_path, change, dtype):
    model_cfg = changed(change)
    state = make_model(model_cfg).to(dtype).state_dict()
    write_config(tmp_path / "theirs", model_cfg)
    save_file(state, tmp_path / "theirs" / "open_clip_model.safetensors")
    convert(str(tmp_path / "theirs"), "openclip", str(tmp_path / "ours"))
    back = load_file(tmp_path / "ours" / "open_clip_model.safetensors")
    # We write the names of open_clip's plain CLIP, which its CustomTextCLIP reads too.
    state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert read_model(str(tmp_path / "ours")).config == read_model(str(tmp_path / "theirs")).config


@pytest.mark.parametrize("change", quick(CASES, "gelu", "the text tower under a prefix"))
def test_open_clip_loads_our_export(tmp_path, change):
    model_cfg = changed(change)
    write_config(tmp_path / "theirs", model_cfg)
    save_safetensors(make_model(model_cfg), tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), "openclip", str(tmp_path / "ours"))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")
    assert_same_features(read_model(str(tmp_path / "theirs")), model.eval())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 41, 3), np.uint8))
    ours = normalize(jax.numpy.asarray(preprocess_image(image, 32))[None])[0]
    np.testing.assert_allclose(preprocess(image).permute(1, 2, 0), ours, atol=1e-5)


def test_77_positions_are_stretched_to_248(tmp_path):
    write_config(tmp_path / "theirs", changed({"text_cfg": {"context_length": 77}}))
    save_safetensors(make_model(changed({"text_cfg": {"context_length": 77}})), tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), "openclip", str(tmp_path / "ours"), context_length=248)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}")
    assert model.positional_embedding.shape == (248, 32)
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path / 'ours'}").context_length == 248


@pytest.mark.parametrize("size", grid(40, rest=[48, 24]), ids="{} pixels".format)
def test_positions_are_resized_as_open_clip_does(tmp_path, size):
    """Larger, smaller and not a simple ratio: what open_clip makes of the grid, and features there."""
    write_config(tmp_path, MODEL)
    save_safetensors(make_model(MODEL), tmp_path)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).eval()
    found = read_model(str(tmp_path), image_size=size)
    positions = found.params["visual"]["positional_embedding"]
    np.testing.assert_allclose(positions, theirs.visual.positional_embedding.detach(), rtol=0, atol=1e-5)
    assert_same_features(found, theirs, size)


def test_positions_from_224_to_336_equal_open_clips_values():
    """The case of ViT-L/14@336: a grid of 16 x 16 to 24 x 24, in float16 as OpenAI's files are."""
    positions = np.random.default_rng(0).normal(size=(257, 8)).astype(np.float16)
    state = {"visual.positional_embedding": torch.tensor(positions).float()}
    grid = type("Model", (), {"visual": type("Visual", (), {"grid_size": (24, 24)})})
    open_clip.model.resize_pos_embed(state, grid)
    ours = resize_grid(positions, 24)
    assert ours.dtype == np.float16 and ours.shape == (577, 8)
    np.testing.assert_allclose(ours, state["visual.positional_embedding"], rtol=2**-10, atol=1e-3)


# Not plain ViTs beside open_clip's own text transformer: other kinds of tower, of pooling, of scaling.
OTHERWISE = ("SigLIP", "CLIPA", "ViT-M-16-alt", "gopt", "roberta")
PLAIN = [
    name
    for name in open_clip.list_models()
    if name.startswith("ViT-") and not any(part in name for part in OTHERWISE)
]
QUICK = ("ViT-B-32", "ViT-H-14-378-quickgelu", "ViT-B-16-SigLIP", "RN50", "coca_ViT-B-32")


@pytest.mark.parametrize("name", grid(*QUICK, rest=sorted({*open_clip.list_models()} - {*QUICK})))
def test_every_config_of_open_clip_is_read_or_refused(name):
    model_cfg = open_clip.get_model_config(name)
    if name not in PLAIN:
        with pytest.raises(ValueError, match="."):
            openclip.import_config(model_cfg)
        return
    config = openclip.import_config(model_cfg)
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    assert (config.vision.width, config.vision.num_layers) == (vision["width"], vision["layers"])
    assert config.vision.head_width == vision.get("head_width", 64)
    assert (config.text.width // config.text.head_width, config.text.num_layers) == (
        text["heads"],
        text["layers"],
    )
    again = openclip.import_config(openclip.export_config(config))
    assert again == config


REFUSED = {
    "a ResNet": ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "is a ResNet, not a ViT: give a ViT CLIP"),
    "a SigLIP": ({"init_logit_bias": -10}, "init_logit_bias=-10 is a SigLIP's"),
    "a CoCa": ({"multimodal_cfg": {}}, "multimodal_cfg is a CoCa's"),
    "a tower of timm": ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name='vit': this"),
    "another text model": (
        {"text_cfg": {"hf_model_name": "roberta"}},
        "hf_model_name='roberta': this",
    ),
    "another pooling": (
        {"vision_cfg": {"pool_type": "avg"}},
        "pool_type='avg': this program pools",
    ),
    "a field of the future": (
        {"vision_cfg": {"twist": 1}},
        "vision_cfg.twist=1 is unknown to this",
    ),
    "two values of eps": ({"vision_cfg": EPS}, "vision_cfg has LayerNorms of eps 0.001, text_cfg of 1e-05"),
    "oblong images": ({"vision_cfg": {"image_size": [32, 48]}}, r"image_size=\[32, 48\]: .* takes square"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_config_that_towers_cannot_follow_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        openclip.import_config({"model_cfg": changed(change)})


def test_config_without_towers_is_refused():
    with pytest.raises(ValueError, match="open_clip_config.json lacks embed_dim, vision_cfg, text_cfg"):
        openclip.import_config({"model_cfg": {}})


def test_another_preprocessing_is_refused():
    """All fields at once; those that are None have open_clip's default."""
    fields = {"mean": [0.5, 0.5, 0.5], "std": None, "resize_mode": "squash", "interpolation": "bilinear"}
    with pytest.raises(
        ValueError,
        match=r"config.json has mean=\[0.5, 0.5, 0.5\], interpolation='bilinear', resize_mode='squash', so ",
    ):
        openclip.import_config({"model_cfg": MODEL, "preprocess_cfg": fields})
    for other in ({"mode": "L"}, {"std": [0.3, 0.3, 0.3]}):
        with pytest.raises(ValueError, match=f"config.json has {next(iter(other))}="):
            openclip.import_config({"model_cfg": MODEL, "preprocess_cfg": other})
    assert openclip.import_config({"model_cfg": MODEL, "preprocess_cfg": None}) == openclip.import_config(
        MODEL
    )


def test_a_real_resnet_is_refused_by_its_kind(tmp_path):
    """Whose text tower has the names of a ViT CLIP's."""
    fields = changed({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}})
    torch.save(open_clip.CLIP(**fields).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt is not a ViT CLIP: its vision tower is a ResNet"):
        read_model(str(tmp_path / "model.pt"))


OTHERS = {
    "a ResNet": ("visual.layer1.0.conv1.weight", "not a ViT CLIP: its vision tower is a ResNet"),
    "a SigLIP": ("logit_bias", "not a ViT CLIP: it has a logit_bias, as SigLIP does"),
    "timm": ("visual.trunk.norm.weight", "not a ViT CLIP: its vision tower is one of timm's"),
}


@pytest.mark.parametrize(("name", "message"), OTHERS.values(), ids=OTHERS)
def test_state_dict_of_another_model_is_refused_by_kind(tmp_path, name, message):
    torch.save({name: torch.zeros(2), "logit_scale": torch.tensor(1.0)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path / "model.pt"))


def test_folder_without_weights_is_refused(tmp_path):
    write_config(tmp_path, MODEL)
    with pytest.raises(ValueError, match="has an open_clip_config.json and none of"):
        read_model(str(tmp_path))


def test_a_folder_of_both_formats_is_read_by_what_lies_there(tmp_path):
    """LAION's repositories hold both configs; who has only open_clip's weights gets those."""
    write_config(tmp_path, MODEL)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    model = make_model(MODEL)
    save_safetensors(model, tmp_path)
    found = read_model(str(tmp_path))
    assert found.source == "dense CLIP in open_clip's format"
    assert trees.count_parameters(found.params) == sum(p.numel() for p in model.parameters())
