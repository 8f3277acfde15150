"""The exported PyTorch module: against our model in JAX, alone, and inside other programs."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from grids import exhaustive, quick
from patches import patch_features
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from clipmoe_jax.convert import convert
from clipmoe_jax.dmu.upcycling import stack_experts
from clipmoe_jax.interop import modeling_clip_moe as exported
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, VisionConfig, abstract_params, text_mask
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import MoeConfig
from clipmoe_jax.train import losses

LENGTH, END_ID = 12, 99
TOKENS = np.array(
    [
        [98, 5, 17, 3, 42, 8, 77, 20, 61, 9, 30, END_ID],
        [98, 50, 2, END_ID, 0, 0, 0, 0, 0, 0, 0, 0],
        [98, END_ID, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
IMAGES = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
PIXELS, IDS = torch.tensor(IMAGES.transpose(0, 3, 1, 2)), torch.tensor(TOKENS)
DENSE = ClipConfig(
    embed_dim=24,
    vision=VisionConfig(image_size=32, patch_size=8, width=64, num_layers=3, head_width=16),
    text=TextConfig(vocab_size=100, context_length=LENGTH, width=32, num_layers=2, head_width=8),
    activation="gelu",
    layer_norm_eps=1e-3,
)


def random_params(config):
    """Norms and biases too: fresh ones are ones and zeros, which would hide a swap."""
    rng = np.random.default_rng(1)
    abstract = abstract_params(config)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.15, leaf.shape).astype(np.float32), abstract)


CASES = {
    "every block": ("gelu", MoeConfig(4, 2, sequence_share=2.0)),
    "the last two blocks, one expert of three": ("quick_gelu", MoeConfig(3, 1, num_moe_layers=2)),
    "all experts": ("quick_gelu", MoeConfig(3, 3, num_moe_layers=1)),
    "experts of attention too": (
        "gelu",
        MoeConfig(4, 2, num_moe_layers=2, sequence_share=2.0, expert_layers="attention_and_feed_forward"),
    ),
}


QUICK = "the last two blocks, one expert of three"


@pytest.fixture(scope="module", params=quick({name: (case,) for name, case in CASES.items()}, QUICK))
def pair(request, tmp_path_factory):
    """Our config and params, the folder they were exported to, and the PyTorch model from there."""
    activation, moe = request.param
    config = ClipConfig(DENSE.embed_dim, DENSE.vision, DENSE.text, activation, DENSE.layer_norm_eps, moe)
    params = random_params(config)
    folder = tmp_path_factory.mktemp("moe")
    save_model(folder / "ours", config, params)
    convert(str(folder / "ours"), "huggingface", str(folder / "exported"))
    model, found = exported.CLIPMoEModel.from_pretrained(folder / "exported", output_loading_info=True)
    assert not any(found.values())
    return config, params, folder / "exported", model.eval()


@pytest.fixture(scope="module")
def outputs(pair):
    """Of our model and of the exported one."""
    config, params, _, model = pair
    ours = jax.jit(Clip(config).apply)({"params": params}, IMAGES, TOKENS)
    with torch.no_grad():
        theirs = model(IDS, PIXELS, output_router_logits=True, return_loss=True)
    return ours, theirs


def test_features_equal_ours(pair, outputs):
    _, _, _, model = pair
    ours, _ = outputs
    with torch.no_grad():
        image, text = model.get_image_features(PIXELS), model.get_text_features(IDS)
    np.testing.assert_allclose(image.pooler_output, ours["image_features"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(text.pooler_output, ours["text_features"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value_attention", [False, True], ids=["queries and keys", "values alone"])
def test_patch_features_equal_ours(pair, value_attention):
    config, params, _, model = pair
    options = {"output": "patches", "value_attention": value_attention}
    ours, _ = Clip(config).apply({"params": params}, IMAGES, method="encode_image", **options)
    theirs = patch_features(model, PIXELS, value_attention)
    np.testing.assert_allclose(ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_router_logits_equal_ours(outputs, tower):
    ours, theirs = outputs
    found = theirs.vision_model_output if tower == "image" else theirs.text_model_output
    expected = ours[f"{tower}_aux"]["router_logits"]  # (B, M, L, E)
    assert len(found.router_logits) == expected.shape[1]
    np.testing.assert_allclose(torch.stack(found.router_logits, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_loss_and_balance_equal_ours(pair, outputs):
    config, params, _, model = pair
    ours, theirs = outputs
    contrastive = losses.contrastive_loss(
        ours["image_features"], ours["text_features"], params["logit_scale"]
    )["contrastive_loss"]
    selected = config.moe.num_selected_experts
    balance = losses.balance_losses(ours, text_mask(jnp.asarray(TOKENS)), selected, 0.01)["balance_loss"]
    np.testing.assert_allclose(0.01 * theirs.aux_loss, balance, rtol=1e-4)
    np.testing.assert_allclose(theirs.loss, contrastive + balance, rtol=1e-4)
    with torch.no_grad():
        alone = model(IDS, PIXELS, return_loss=True)
    np.testing.assert_allclose(alone.loss, contrastive, rtol=1e-4)
    assert alone.aux_loss is None and alone.vision_model_output.router_logits is None


def test_bfloat16_stays_close_to_float32(pair, outputs):
    config, _, folder, _ = pair
    ours, _ = outputs
    model = exported.CLIPMoEModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        image = model.get_image_features(PIXELS.bfloat16()).pooler_output
        text = model.get_text_features(IDS).pooler_output
    assert image.dtype == text.dtype == torch.bfloat16
    for found, name in ((image.float().numpy(), "image_features"), (text.float().numpy(), "text_features")):
        expected = np.asarray(ours[name])
        difference = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        # Where there is a choice, rounding may send a token of a row to another expert.
        choice = config.moe.num_selected_experts < config.moe.num_experts
        assert (np.median(difference) if choice else difference.max()) < 2e-2, name


def naive_experts(moe, x):
    """A loop over experts and a mask for each, as the released code has it. (N, D) -> (N, D)."""
    gates, ids = functional.linear(x, moe.router.weight).softmax(dim=-1).topk(moe.num_selected, dim=-1)
    gates = gates / gates.sum(dim=-1, keepdim=True)
    y, fc1, fc2 = torch.zeros_like(x), moe.fc1, moe.fc2
    for e in range(len(fc1.weight)):
        token, place = torch.where(ids == e)
        h = functional.linear(x[token], fc1.weight[e], fc1.bias[e])
        h = functional.linear(h * torch.sigmoid(1.702 * h), fc2.weight[e], fc2.bias[e])
        y = y.index_add(0, token, h * gates[token, place, None])
    return y


def make_moe(num_experts=5, num_selected=2):
    torch.manual_seed(0)
    config = exported.CLIPMoEVisionConfig(
        hidden_size=16, intermediate_size=24, num_experts=num_experts, num_experts_per_tok=num_selected
    )
    moe = exported.MoE(config)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


@pytest.mark.parametrize(("experts", "selected"), [(5, 2), (3, 3), (4, 1), (1, 1)])
def test_values_and_gradients_equal_a_masked_loop(experts, selected):
    moe, x = make_moe(experts, selected), torch.randn(2, 7, 16, requires_grad=True)
    weights = torch.randn(2, 7, 16)
    inputs = [x, *moe.parameters()]
    routing = moe.route(x)
    y, logits = moe(x, routing), routing.logits
    naive = naive_experts(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(y, naive, rtol=1e-5, atol=1e-5)
    assert logits.shape == (2, 7, experts) and logits.dtype == torch.float32
    found = torch.autograd.grad((y * weights).sum(), inputs)
    expected = torch.autograd.grad((naive * weights).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_get_zero_gradients():
    moe, x = make_moe(), torch.rand(1, 4, 16)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3] += 1  # all inputs are positive: everybody goes to 3, then to a tie's first
    y = moe(x, moe.route(x))
    y.sum().backward()
    used = moe.fc1.weight.grad.flatten(1).abs().sum(dim=1) > 0
    assert used.tolist().count(True) == 2 and used[3]


def test_autocast_routes_in_float32():
    moe, x = make_moe(), torch.randn(1, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        routing = moe.route(x)
        y = moe(x, routing)
    torch.testing.assert_close(routing.logits, moe.route(x).logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y.float(), moe(x, moe.route(x)), rtol=5e-2, atol=5e-2)


@pytest.fixture(scope="module")
def equal_experts(tmp_path_factory):
    """A random CLIPModel of transformers, and the MoE all of whose experts are its feed-forward layers."""
    torch.manual_seed(0)
    shared = {"hidden_act": "quick_gelu", "projection_dim": 24, "num_hidden_layers": 3}
    clip = CLIPModel(
        CLIPConfig(
            text_config=shared
            | {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4}
            | {"max_position_embeddings": LENGTH, "bos_token_id": 98, "eos_token_id": END_ID},
            vision_config=shared
            | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
            | {"image_size": 32, "patch_size": 8},
            projection_dim=24,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("equal")
    clip.save_pretrained(folder / "clip")
    dense = read_model(str(folder / "clip"))
    params = stack_experts([dense.params] * 3, jax.random.key(0))
    config = ClipConfig(24, dense.config.vision, dense.config.text, "quick_gelu", 1e-5, MoeConfig(3, 2))
    save_model(folder / "ours", config, params)
    convert(str(folder / "ours"), "huggingface", str(folder / "exported"))
    return clip, folder / "exported"


def test_outputs_have_the_interface_of_transformers_clip(equal_experts):
    """With equal experts every output must be CLIPModel's: hidden states, attentions, poolers, logits."""
    clip, folder = equal_experts
    model = exported.CLIPMoEModel.from_pretrained(folder).eval()
    asked = {"output_hidden_states": True, "output_attentions": True, "return_loss": True}
    attention_mask = torch.tensor(TOKENS != 0).long()
    for mask in (None, attention_mask):
        with torch.no_grad():
            clip.set_attn_implementation("eager")
            theirs, found = clip(IDS, PIXELS, mask, **asked), model(IDS, PIXELS, mask, **asked)
        for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
            torch.testing.assert_close(found[name], theirs[name], rtol=1e-4, atol=1e-4)
        for tower in ("vision_model_output", "text_model_output"):
            assert len(found[tower].hidden_states) == len(theirs[tower].hidden_states) == 4
            seen = slice(None) if mask is None or tower == "vision_model_output" else mask.bool()
            for name in ("last_hidden_state", "pooler_output"):
                rows = seen if name == "last_hidden_state" else slice(None)
                torch.testing.assert_close(
                    found[tower][name][rows], theirs[tower][name][rows], rtol=1e-4, atol=1e-4
                )
            for name in ("hidden_states", "attentions"):
                for one, other in zip(found[tower][name], theirs[tower][name], strict=True):
                    if name == "attentions" and tower == "text_model_output":
                        rows = attention_mask.bool()
                        one, other = one.transpose(1, 2)[rows], other.transpose(1, 2)[rows]
                    elif name == "hidden_states":
                        one, other = one[seen], other[seen]
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_vision_tower_alone_loads_from_the_whole_model(pair):
    """From the whole model's folder: the trap is weights that are silently random."""
    _, _, folder, model = pair
    tower, found = exported.CLIPMoEVisionModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        alone = tower.eval()(PIXELS, output_hidden_states=True)
        whole = model.vision_model(PIXELS, output_hidden_states=True)
    for one, other in zip(alone.hidden_states, whole.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(alone.pooler_output, whole.pooler_output)
    assert tower.config.hidden_size == 64 and tower.config.image_size == 32 and tower.config.patch_size == 8


def test_text_tower_alone_loads_from_the_whole_model(pair):
    _, _, folder, model = pair
    tower, found = exported.CLIPMoETextModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(tower.eval()(IDS).pooler_output, model.text_model(IDS).pooler_output)


@pytest.mark.parametrize("name", ["CLIPMoEModel", "CLIPMoEVisionModel", "CLIPMoETextModel"])
def test_saving_and_loading_is_the_identity(pair, tmp_path, name):
    _, _, folder, _ = pair
    model = getattr(exported, name).from_pretrained(folder)
    model.save_pretrained(tmp_path)
    back, found = getattr(exported, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


def test_another_image_size_needs_interpolation(pair):
    _, _, _, model = pair
    with pytest.raises(ValueError, match="images of 48 x 48 pixels; this model takes 32 x 32"):
        model.get_image_features(torch.zeros(2, 3, 48, 48))


def test_every_router_is_trained(pair):
    _, _, folder, _ = pair
    model = exported.CLIPMoEModel.from_pretrained(folder).train()
    model(IDS, PIXELS, return_loss=True, output_router_logits=True).loss.backward()
    routers = {name: p.grad for name, p in model.named_parameters() if name.endswith("router.weight")}
    assert routers and all(gradient.abs().sum() > 0 for gradient in routers.values())


REMOTE = """
import sys
for name in ("jax", "flax", "clipmoe_jax", "torchvision"):
    sys.modules[name] = None  # importing it raises
import torch
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, out = sys.argv[1:]
model, found = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(found.values()), found
again = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
assert type(again) is type(model) and type(model).__name__ == "CLIPMoEModel"
tower = get_class_from_dynamic_module("modeling_clip_moe.CLIPMoEVisionModel", folder).from_pretrained(folder)
pixels, ids = torch.load(out + "/inputs.pt")
with torch.no_grad():
    features = model.get_image_features(pixels).pooler_output, model.get_text_features(ids).pooler_output
    torch.save((*features, tower(pixels).pooler_output), out + "/features.pt")
model.save_pretrained(out + "/saved")
AutoModel.from_pretrained(out + "/saved", trust_remote_code=True)
"""


@exhaustive
def test_remote_code_loads_without_jax(pair, tmp_path):
    """In a process of its own that has neither JAX nor this package; what it saves can be loaded again."""
    _, _, folder, model = pair
    torch.save((PIXELS, IDS), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", REMOTE, str(folder), str(tmp_path)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # another number rounds otherwise
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    image, text, pooled = torch.load(tmp_path / "features.pt")
    with torch.no_grad():
        assert torch.equal(image, model.get_image_features(PIXELS).pooler_output)
        assert torch.equal(text, model.get_text_features(IDS).pooler_output)
        assert torch.equal(pooled, model.vision_model(PIXELS).pooler_output)
    assert (tmp_path / "saved" / "modeling_clip_moe.py").exists()


def test_vision_tower_runs_inside_llava(pair, tmp_path):
    """The paper's claim, plug and play: a tiny random LLaVA whose vision tower is ours, feature layer -2."""
    _, _, folder, model = pair
    exported.register()
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(folder).vision_config,
        text_config=LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        vision_feature_layer=-2,
        image_token_index=49,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    tower = llava.model.vision_tower
    assert type(tower) is exported.CLIPMoEVisionModel
    tower.load_state_dict(model.vision_model.state_dict())
    with torch.no_grad():
        expected = model.vision_model(PIXELS, output_hidden_states=True).hidden_states[-2][:, 1:]
        projected = llava.model.get_image_features(PIXELS).pooler_output
        for found, features in zip(projected, llava.model.multi_modal_projector(expected), strict=True):
            torch.testing.assert_close(found, features)
    ids = torch.tensor([[1, *[49] * 16, 2, 3]])  # 16 patches, a place for each
    outputs = llava(input_ids=ids, pixel_values=PIXELS[:1], labels=ids)
    outputs.loss.backward()
    assert llava.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    llava.save_pretrained(tmp_path)
    back, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        again = back.eval()(input_ids=ids, pixel_values=PIXELS[:1], labels=ids)
    torch.testing.assert_close(again.loss, outputs.loss)


def test_bad_configs_are_named():
    with pytest.raises(ValueError, match="hidden_act='relu': choose one of"):
        exported.CLIPMoEVisionConfig(hidden_act="relu")
    with pytest.raises(ValueError, match="num_experts_per_tok=5 must lie between 1 and num_experts=4"):
        exported.CLIPMoETextConfig(num_experts_per_tok=5)


def test_captions_that_are_too_long_are_named(pair):
    _, _, _, model = pair
    with pytest.raises(ValueError, match="input_ids have length 13; this model takes at most 12 tokens"):
        model.get_text_features(torch.zeros(1, 13, dtype=torch.long))


def test_fresh_model_is_initialised(pair):
    """Built from a config, not loaded: every parameter is set, norms to one."""
    _, _, folder, _ = pair
    exported.register()
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    assert torch.equal(model.vision_model.post_layernorm.weight, torch.ones(64))
    assert model.logit_scale.shape == () and abs(float(model.logit_scale) - 2.6592) < 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 3, name
        assert name.endswith("bias") or parameter.std() > 0 or "norm" in name or parameter.ndim == 0, name
    assert json.loads((folder / "config.json").read_text())["model_type"] == model.config.model_type
