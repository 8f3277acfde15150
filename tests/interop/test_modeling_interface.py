"""The exported module's interface: options, configs and sizes mean what they mean to transformers' CLIP."""

import pytest
import torch

from benchmarks import torch_ways
from benchmarks.torch_ways import END_ID, OTHER, VISION
from clipmoe_jax.interop import modeling_clip_moe as exported

OUTPUTS = ("hidden_states", "attentions", "router_logits")


@pytest.fixture
def models():
    """A CLIP-MoE whose experts are all the dense model's feed-forward layers, and the dense model."""
    models = torch_ways.make_models()
    moe, dense = models.values()
    own, weights = moe.state_dict(), dense.state_dict()
    own |= {name: weight.expand_as(own[name]) for name, weight in weights.items()}
    moe.load_state_dict(own)
    return moe, dense


def arguments(name):
    """Of a forward by position."""
    return {
        "whole": (OTHER.input_ids, OTHER.pixel_values, OTHER.attention_mask),
        "vision_model": (OTHER.pixel_values,),
        "text_model": (OTHER.input_ids, OTHER.attention_mask),
        "get_image_features": (OTHER.pixel_values,),
        "get_text_features": (OTHER.input_ids, OTHER.attention_mask),
    }[name]


CALLS = ["whole", "vision_model", "text_model", "get_image_features", "get_text_features"]


def call(model, name, **options):
    run = model if name == "whole" else getattr(model, name)
    with torch.no_grad():
        return run(*arguments(name), **options)


def of_towers(outputs):
    """The outputs of the towers in those of a call."""
    both = [outputs.get(name) for name in ("text_model_output", "vision_model_output")]
    return both if both[0] is not None else [outputs]


@pytest.mark.parametrize("output", OUTPUTS)
def test_towers_configs_ask_for_outputs(models, output):
    moe, _ = models
    for tower in (moe.text_model, moe.vision_model):
        # As a config.json has it: transformers' setter also changes the kind of attention.
        private = "_output_attentions" if output == "attentions" else f"output_{output}"
        assert hasattr(tower.config, private)
        setattr(tower.config, private, True)
    for name in CALLS:
        assert_config_asks(moe, name, output)


def assert_config_asks(moe, name, output):
    for found in of_towers(call(moe, name)):
        assert len(found[output]) >= 2, name
    for found in of_towers(call(moe, name, **{f"output_{output}": False})):
        assert output not in found, name


@pytest.mark.parametrize("output", OUTPUTS)
def test_whole_models_config_asks_for_outputs_of_both_towers(models, output):
    moe, _ = models
    setattr(moe.config, "_output_attentions" if output == "attentions" else f"output_{output}", True)
    for name in ("whole", "get_image_features", "get_text_features"):
        assert_config_asks(moe, name, output)


def as_nested(outputs):
    """Sizes of nested tuples and the tensors in them."""
    if isinstance(outputs, tuple):
        return tuple(as_nested(output) for output in outputs)
    assert isinstance(outputs, torch.Tensor)
    return tuple(outputs.shape)


@pytest.mark.parametrize("by", ["argument", "config"])
def test_tuples_are_those_of_transformers_clip(models, by):
    """Nested ones too, in the same order."""
    moe, dense = models
    asked = {"output_hidden_states": True, "return_dict": False}
    expected = {name: call(dense, name, **asked) for name in CALLS}
    if by == "config":
        asked.pop("return_dict")
        for model in (moe, moe.text_model, moe.vision_model):
            model.config.return_dict = False
    for name in CALLS:
        found = call(moe, name, **asked)
        assert as_nested(found) == as_nested(expected[name])
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "kept"), [(-2, [1]), (0, [0]), ([0, -1], [0, 2]), ([], []), (True, [0, 1, 2]), (False, [])]
)
def test_hidden_states_are_those_that_an_index_asks_for(models, asked, kept):
    """LLaVA asks for one by its index: the others need not be kept."""
    moe, _ = models
    everything = call(moe, "vision_model", output_hidden_states=True).hidden_states
    found = call(moe, "vision_model", output_hidden_states=asked).hidden_states
    if not kept:
        assert found is None
        return
    assert len(found) == 3
    for i in range(3):
        assert torch.equal(found[i], everything[i]) if i in kept else found[i] is None


def test_positions_are_resized_as_transformers_clip_does(models):
    for size in ((32, 32), (48, 48), (32, 48), (24, 20)):
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            found, expected = (
                model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
                for model in models
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["whole", "text_model"])
def test_vocabulary_grows(models, name):
    moe, _ = models
    model = moe if name == "whole" else moe.text_model
    before = call(moe, "get_text_features").pooler_output
    embedding = model.resize_token_embeddings(END_ID + 5, mean_resizing=False)
    assert embedding is model.get_input_embeddings() is moe.text_model.embeddings.token_embedding
    assert embedding.weight.shape == (END_ID + 5, 32) and moe.config.text_config.vocab_size == END_ID + 5
    assert torch.equal(call(moe, "get_text_features").pooler_output, before)


def test_patch_embedding_can_be_replaced(models):
    tower = models[0].vision_model
    other = torch.nn.Conv2d(3, VISION["hidden_size"], 8, stride=8, bias=False)
    tower.set_input_embeddings(other)
    assert tower.get_input_embeddings() is tower.embeddings.patch_embedding is other


@pytest.mark.parametrize("name", ["vision_model", "text_model"])
def test_attention_is_the_one_that_is_set(models, name, monkeypatch):
    moe, _ = models
    calls, own = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        exported.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or own(*a, **k)
    )
    fused = call(moe, name).last_hidden_state
    assert len(calls) == 2
    moe.set_attn_implementation("eager")
    torch.testing.assert_close(call(moe, name).last_hidden_state, fused, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="flash_attention_2|Flash Attention"):
        moe.set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize(("name", "missing"), [("whole", "pixel_values"), ("text_model", "input_ids")])
def test_missing_input_is_named(models, name, missing):
    model = models[0] if name == "whole" else models[0].text_model
    given = {"input_ids": OTHER.input_ids, "pixel_values": OTHER.pixel_values}
    with pytest.raises(ValueError, match=f"{missing} is None"):
        model(**{key: value for key, value in given.items() if key != missing})


def test_balance_counts_captions_alone(models):
    """A mask gives the numbers of the tokens that it keeps."""
    torch.manual_seed(0)
    logits = tuple(torch.randn(3, 5, 4) for _ in range(2))
    mask = torch.rand(3, 5) < 0.6
    kept = tuple(block[mask].unsqueeze(0) for block in logits)
    torch.testing.assert_close(exported.load_balance(logits, 2, mask), exported.load_balance(kept, 2))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_every_block_is_checkpointed(models, use_reentrant):
    """And computes the same gradients, also of what comes before it."""
    moe, _ = models
    blocks = [module for module in moe.modules() if isinstance(module, exported.Block)]

    def gradients():
        moe.zero_grad()
        moe.train()(*arguments("whole"), return_loss=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}

    expected, calls = gradients(), []
    moe.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for block in blocks:
        block.layer_norm1.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    assert len(calls) == 2 * len(blocks) == 8
    moe.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 3 * len(blocks)
