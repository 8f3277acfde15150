"""Transformers' CLIPModel, which really runs here, against ours on the same weights; import and export."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from clipmoe_jax import trees
from clipmoe_jax.checkpoints import abstract_params
from clipmoe_jax.interop import huggingface
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, normalize_features
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


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
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


def test_what_was_read(pair):
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
def test_features_agree(outputs, name):
    theirs, ours = outputs
    np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def test_logits_agree(pair, outputs):
    (_, _, loaded), (theirs, ours) = pair, outputs
    image, text = (normalize_features(ours[name]) for name in ("image_features", "text_features"))
    logits = jnp.exp(loaded.params["logit_scale"]) * image @ text.T
    # The scale is about 14, so 1e-4 of the features may become 1e-3.
    np.testing.assert_allclose(logits, theirs["logits"], rtol=0, atol=1e-3)


def test_export_of_import_is_the_identity(pair):
    torch_model, _, loaded = pair
    expected = {name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}
    exported = huggingface.export_state_dict(loaded.params)
    assert exported.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
        assert exported[name].dtype == array.dtype, name
        assert exported[name].shape == array.shape, name  # assert_array_equal lets () equal (1,)
        assert exported[name].flags.c_contiguous, name  # safetensors writes memory as it lies


def test_transformers_loads_our_export(pair):
    torch_model, _, loaded = pair
    fresh = CLIPModel(torch_model.config)
    exported = huggingface.export_state_dict(loaded.params)
    fresh.load_state_dict({name: torch.tensor(array) for name, array in exported.items()}, strict=True)
    for name, tensor in torch_model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_bfloat16_file_becomes_float32_of_the_same_values(tmp_path):
    model = make_torch_clip().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    params = trees.flatten(read_model(str(tmp_path)).params)
    kernel = params["text/resblocks_2/mlp/c_fc/kernel"]
    assert kernel.dtype == np.float32
    fc1 = model.state_dict()["text_model.encoder.layers.2.mlp.fc1.weight"]
    np.testing.assert_array_equal(kernel.T, fc1.float().numpy())
    np.testing.assert_array_equal(kernel, kernel.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_position_ids_of_old_files_are_no_parameters():
    model = make_torch_clip()
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    old = arrays | {
        "text_model.embeddings.position_ids": np.arange(LENGTH)[None],
        "vision_model.embeddings.position_ids": np.arange(17)[None],
    }
    _, leaves = huggingface.import_state_dict(old, model.config.to_dict())
    _, expected = huggingface.import_state_dict(arrays, model.config.to_dict())
    assert leaves.keys() == expected.keys()


def test_an_empty_config_means_openais_vit_b_32():
    config = huggingface.import_config({"model_type": "clip", "text_config": None})
    assert config == ClipConfig()
    theirs = CLIPConfig()
    assert config == huggingface.import_config(theirs.to_dict())


def test_an_eos_id_of_2_means_the_highest_id():
    config = make_torch_clip(eos_token_id=2).config.to_dict()
    assert huggingface.import_config(config).text.vocab_size == VOCAB


REFUSED = {
    "not a CLIP": ({"model_type": "siglip"}, r"model_type='siglip'.*model_type is 'clip'"),
    "one tower": ({"model_type": "clip_text_model"}, "model_type='clip_text_model'"),
    "two activations": (
        {"model_type": "clip", "text_config": {"hidden_act": "gelu"}},
        "text_config.hidden_act='gelu' is not vision_config.hidden_act='quick_gelu'",
    ),
    "an activation we do not have": (
        {"model_type": "clip"} | {f"{t}_config": {"hidden_act": "relu"} for t in ("text", "vision")},
        "activation='relu': choose one of .*'gelu', 'quick_gelu'",
    ),
    "a narrow FFN": (
        {"model_type": "clip", "vision_config": {"intermediate_size": 1000}},
        "vision_config.intermediate_size=1000 is not 4 times its hidden_size=768",
    ),
    "an end token inside the vocabulary": (
        {"model_type": "clip", "text_config": {"eos_token_id": 7}},
        r"eos_token_id=7 is not the highest id \(49407\)",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_configs_that_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no model.safetensors"), (b"\x10" * 100, "cannot be read as a safetensors file")],
    ids=["no file", "not a safetensors file"],
)
def test_weights_that_cannot_be_read(tmp_path, content, message):
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
    message = r"1 differing: text/positional_embedding is \(12, 16\), not \(77, 16\)"
    with pytest.raises(ValueError, match=message):
        read_model(str(tmp_path))


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"1 names that a CLIPModel does not: \['text_model.gate'\]"):
        huggingface.import_state_dict({"text_model.gate": np.zeros(2)}, {"model_type": "clip"})


def test_a_missing_part_of_q_k_v_is_named(pair):
    torch_model, _, _ = pair
    arrays = {name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}
    del arrays["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"visual/resblocks_1/attn/in_proj/bias: .*\['k'\] of q, k, v"):
        huggingface.import_state_dict(arrays, torch_model.config.to_dict())


def test_a_moe_does_not_fit_into_a_clip_model():
    config = ClipConfig(
        embed_dim=8,
        vision=VisionConfig(image_size=8, patch_size=8, width=8, num_layers=1, head_width=8),
        text=TextConfig(vocab_size=9, context_length=4, width=8, num_layers=1, head_width=8),
        moe=MoeConfig(2, 1),
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_params(config))
    with pytest.raises(ValueError, match="no names for .*text/resblocks_0/moe/c_fc/bias.* a dense model"):
        huggingface.export_state_dict(params)
