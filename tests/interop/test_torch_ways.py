"""The exported module inside other programs: traced, exported, compiled, offloaded, quantised, adapted.

Each way is made with one input and must compute the eager features of another. benchmarks/torch_ways.py
prints them all as a table.
"""

import copy
import functools

import pytest
import torch
from grids import exhaustive, quick
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from benchmarks import torch_ways
from benchmarks.torch_ways import EXAMPLE, LENGTH, OTHER, WAYS, Features
from clipmoe_jax.interop import modeling_clip_moe as exported

EXACT = 1e-5  # the largest feature is about 3
ONE_GRAPH = functools.partial(torch_ways.compile_whole, backend="eager")  # captures, and generates no code
CASES = {way.__name__: (way, EXACT) for way in WAYS.values()} | {
    "quantize": (torch_ways.quantize, 0.5),  # int8; the dense model differs as much
    "one graph": (ONE_GRAPH, EXACT),
}


@pytest.fixture(scope="module")
def models():
    return torch_ways.make_models(num_blocks=1)


@pytest.mark.parametrize(("way", "most"), quick(CASES, "trace", "export", "quantize"))
def test_features_are_those_of_eager_mode(models, way, most):
    assert torch_ways.difference(models["CLIP-MoE"], way) < most


def test_table_tells_differences_and_failures(capsys, monkeypatch):
    def fail(model, folder):
        raise RuntimeError("no such way\nand more")

    monkeypatch.setattr(torch_ways, "WAYS", {"eager": lambda model, _: Features(model), "other": fail})
    torch_ways.main()
    *_, eager, other = capsys.readouterr().out.splitlines()
    assert eager == "| eager | 0 | 0 |"
    assert other == "| other | fails: RuntimeError: no such way | fails: RuntimeError: no such way |"


@exhaustive
@pytest.mark.parametrize(
    "parameters", [None, ["mlp.fc1.weight", "mlp.fc2.weight"]], ids=["linear", "experts too"]
)
def test_adapters_of_routers_and_experts_learn(models, parameters):
    """A fresh adapter's second matrix is zero, and has a gradient unless something bypasses it."""
    import peft

    config = peft.LoraConfig(target_modules="all-linear", target_parameters=parameters, lora_dropout=0.0)
    adapted = peft.get_peft_model(copy.deepcopy(models["CLIP-MoE"]), config).model
    asked = {"return_loss": True, "output_router_logits": True}
    adapted(OTHER.input_ids, OTHER.pixel_values, OTHER.attention_mask, **asked).loss.backward()
    adapters = {n: p.grad for n, p in adapted.named_parameters() if "lora_B" in n}
    assert sum("router" in name for name in adapters) == 2
    assert sum(".mlp.fc" in name for name in adapters) == (0 if parameters is None else 4)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in adapters.values())


def test_whole_model_with_its_losses_is_one_graph(models):
    """Both losses, a mask, attentions and hidden states: nothing of it looks at a value."""
    asked = {"return_loss": True, "output_router_logits": True, "output_hidden_states": True}
    arguments = (OTHER.input_ids, OTHER.pixel_values, OTHER.attention_mask)
    model = models["CLIP-MoE"]
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*arguments, **asked)
        eager = model(*arguments, **asked)
    torch.testing.assert_close(compiled.loss, eager.loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.aux_loss, eager.aux_loss, rtol=1e-5, atol=1e-5)
    states = compiled.text_model_output.hidden_states
    assert len(states) == len(eager.text_model_output.hidden_states)


def test_trace_holds_for_other_sizes(models):
    """Another batch, shorter captions, larger images."""

    class Towers(Features):
        def forward(self, pixel_values, input_ids):
            vision = self.model.vision_model(pixel_values, interpolate_pos_encoding=True)
            return vision.pooler_output, self.model.text_model(input_ids).last_hidden_state

    towers = Towers(models["CLIP-MoE"])
    with torch.no_grad():
        traced = torch.jit.trace(towers, (EXAMPLE.pixel_values, EXAMPLE.input_ids), check_trace=False)
        pixels, ids = torch.randn(1, 3, 48, 64), OTHER.input_ids[:, : LENGTH - 3]
        torch.testing.assert_close(traced(pixels, ids), towers(pixels, ids), rtol=1e-4, atol=1e-4)


def test_features_have_shapes_without_values(models):
    """As programs that plan memory see the model: FakeTensors have no values to look at."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        image, text = Features(models["CLIP-MoE"])(*map(mode.from_tensor, OTHER))
    assert image.shape == text.shape == (3, 24)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_every_weight_is_used_by_its_own_module_alone(models, tower):
    """Offloading, sharding and adapters put themselves around the calls of the modules that have parameters.

    Here each module's parameters are not numbers except while it is called.
    """
    model = torch_ways.make_models(num_blocks=1)["CLIP-MoE"]

    def hide(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.full_like(parameter.data, torch.nan)

    def show(weights, module, _):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = weights[name]

    for module in model.modules():
        if weights := {name: p.data for name, p in module.named_parameters(recurse=False)}:
            module.register_forward_pre_hook(functools.partial(show, weights))
            module.register_forward_hook(hide)
            hide(module)

    def run(model):
        asked = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
        if tower == "text":
            return model.get_text_features(OTHER.input_ids, OTHER.attention_mask, **asked).to_tuple()
        pixels = torch.nn.functional.interpolate(OTHER.pixel_values, size=(48, 40))
        return model.get_image_features(pixels, interpolate_pos_encoding=True, **asked).to_tuple()

    with torch.no_grad():
        torch.testing.assert_close(run(model), run(models["CLIP-MoE"]), rtol=0, atol=0)


@pytest.mark.parametrize("selected", [1, 2, 5])
def test_running_all_experts_gives_the_values_and_gradients_of_running_a_few(selected):
    torch.manual_seed(0)
    config = exported.CLIPMoEVisionConfig(
        hidden_size=16, intermediate_size=24, num_experts=5, num_experts_per_tok=selected
    )
    moe, x = exported.MoE(config), torch.randn(2, 7, 16, requires_grad=True)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.rand(14, 5).argsort(dim=1)[:, :selected]
    weights = torch.randn(14, selected, 16)
    inputs = [x, moe.fc1.weight, moe.fc1.bias, moe.fc2.weight, moe.fc2.bias]
    results = []
    for run_experts in (exported._run_all, exported._run_selected):
        y = run_experts(moe._run, 5, x.flatten(0, 1), ids)
        results.append((y, *torch.autograd.grad((y * weights).sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of_transformers", [CLIPVisionModel, CLIPVisionModelWithProjection, CLIPModel])
def test_dense_models_refuse_the_folder(models, tmp_path, of_transformers):
    """LLaVA's line is `CLIPVisionModel.from_pretrained`: feed-forward layers must not be left random."""
    models["CLIP-MoE"].save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        of_transformers.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["CLIPMoEModel", "CLIPMoEVisionModel"])
def test_dense_folder_is_refused(models, tmp_path, name):
    models["dense"].save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        getattr(exported, name).from_pretrained(tmp_path)
