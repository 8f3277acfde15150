"""The card of an exported model, whatever its folder and a stranger's run are called."""

import ast
import dataclasses
import json
import re

import pytest
from etils import epath

from clipmoe_jax.core import artifacts
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.transformer import MoeConfig
from clipmoe_jax.reporting.model_card import model_card

DENSE = ClipConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=8, patch_size=4, width=64, num_layers=1),
    text=TextConfig(vocab_size=20, context_length=77, width=64, num_layers=1),
)
MOE = dataclasses.replace(DENSE, moe=MoeConfig(4, 2))


def card(to, name, config=DENSE, source="nowhere", **options):
    return model_card(source, config, abstract_params(config), "dense CLIP", to, name, **options)


def strings(text):
    """All strings in the card's code."""
    [*blocks] = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    nodes = (node for block in blocks for node in ast.walk(ast.parse(block)))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


NAMES = [
    'the "best"',
    "it's",
    "two\nlines",
    "a\n```\n# b",
    "back\\slash",
    "{name}",
    "\u202egpj",
    "\udcff",
    "ä 東 👩‍🚀",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize(
    ("to", "config", "path"),
    [
        ("huggingface", MOE, "{}"),
        ("huggingface", dataclasses.replace(DENSE, text=None), "{}"),
        ("openclip", DENSE, "local-dir:{}"),
        ("clipmoe", DENSE, "{}/model.pt"),
        ("clipmoe", MOE, "{}/model.pt"),
    ],
    ids=["moe", "vision", "openclip", "dense", "released"],
)
def test_name_of_the_folder_breaks_no_line_of_code(to, config, path, name):
    text = card(to, name, config)
    assert path.replace("{}", name) in strings(text)
    assert not re.search("[\u202a-\u202e\udc80-\udcff]", text)


def test_usual_name_stands_as_it_is():
    assert 'AutoModel.from_pretrained("clip-moe", trust_remote_code=True)' in card(
        "huggingface", "clip-moe", MOE
    )


def test_experts_are_of_the_layers_that_the_config_says():
    assert "in every block of each tower the feed-forward layer is a mixture of 4 experts" in card(
        "huggingface", "out", MOE
    )
    moe = MoeConfig(4, 2, num_moe_layers=1, expert_layers="attention_and_feed_forward")
    text = card("huggingface", "out", dataclasses.replace(DENSE, moe=moe))
    assert "in the last 1 blocks of each tower attention and feed-forward layer are a mixture of 4" in text


@pytest.mark.parametrize("has_test_set", [True, False])
def test_evaluation_has_what_the_base_knew(tmp_path, has_test_set):
    numbers = {f"{way}_r{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    numbers = numbers if has_test_set else {}
    results = {"CLIP-MoE": numbers | {"retention": 0.75}, "ensemble of before": numbers}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
    text = card("huggingface", "out", MOE, source=str(tmp_path / "moe" / "params"))
    recall = 2 * " 50.0 |" if has_test_set else ""  # at 1, and at 5
    assert f"| **CLIP-MoE** |{recall} 75.0 |{recall}\n| ensemble of before |{recall}  |{recall}\n" in text
    assert "old: what the base knew.\n" in text and ("R@k" in text) == has_test_set
    config = {"retention": "zero_shot:data.retention", "data": {"retention": "glyphs:test?pairs=20"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = card("huggingface", "out", MOE, source=str(tmp_path / "moe" / "params"))
    told = r"what the base knew, by zero\_shot:data.retention, where data.retention is glyphs:test?pairs=20."
    assert told in text


def test_strangers_run_adds_no_markup(tmp_path):
    (tmp_path / "eval").mkdir()
    numbers = {f"{way}_r{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    title = "CLIP|MoE\n<script>x</script> [link](http://x) `y` \u202e"
    (tmp_path / "eval" / "results.json").write_text(json.dumps({title: numbers, "base": numbers}))
    artifacts.make(epath.Path(tmp_path / "base"), {"a": "```\n<b>"}, lambda folder: {})
    done = json.loads((tmp_path / "base" / "done.json").read_text())
    done["versions"] = {"jax": "1\n\n# [a](b)"}
    (tmp_path / "base" / "done.json").write_text(json.dumps(done))
    (tmp_path / "base" / "checksums.json").unlink()
    text = card("openclip", "out", source=str(tmp_path / "base"))
    row = r"| CLIP\|MoE \<script>x\</script> \[link](http://x) \`y\` \\u202e | 50.0 |"
    assert row in text
    assert "With jax 1 # \\[a](b), from this config:" in text
    assert re.findall(r"^```.*$", text, re.MULTILINE)[2:] == ["```json", "```"]


@pytest.fixture
def run(tmp_path):
    """A run whose results have a base, a stage that became expert 1, and a CLIP-MoE of both."""
    numbers = {f"{way}_r{k}": 0.5 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    experts = {"base": 0, "stage 1 alone": 1, "CLIP-MoE": None}
    results = {title: numbers | {"expert": expert} for title, expert in experts.items()}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
    for name, config in {
        "base": DENSE,
        "stage_1/params": DENSE,
        "moe/params": MOE,
        "moe/upcycled": MOE,
    }.items():
        artifacts.make(epath.Path(tmp_path / name), {"a": name}, lambda folder: {})
        (tmp_path / name / "model.json").write_text(json.dumps(config.to_dict()))
    return tmp_path


LAST = dataclasses.replace(MOE, moe=MoeConfig(4, 2, num_moe_layers=1))
ROWS = {
    "base": ("base", DENSE, {}, "base"),
    "stage": ("stage_1/params", DENSE, {}, "stage 1 alone"),
    "moe": ("moe/params", MOE, {}, "CLIP-MoE"),
    "expert": ("moe/params", DENSE, {"expert": 1}, "stage 1 alone"),
    "expert that no row is": ("moe/params", DENSE, {"expert": 3}, None),
    "before its training": ("moe/upcycled", MOE, {}, None),
    "blend": ("stage_1/params", DENSE, {"is_blend": True}, None),
    "blend of an expert": ("moe/params", DENSE, {"is_blend": True, "expert": 1}, None),
    "fewer experts": ("moe/params", dataclasses.replace(MOE, moe=MoeConfig(4, 1)), {}, None),
}


@pytest.mark.parametrize(("folder", "config", "options", "title"), ROWS.values(), ids=ROWS)
def test_row_of_the_model_is_marked(run, folder, config, options, title):
    text = card("huggingface", "out", config, source=str(run / folder), **options)
    assert re.findall(r"^\| \*\*(.*)\*\*", text, re.MULTILINE) == ([title] if title else [])
    assert ("| 50.0 |" in text) == bool(title)
    assert ("measured other models, not this one" in text) == (title is None)
    assert ("A blend is not trained itself. " in text) == ("is_blend" in options)
    which = f"The CLIP-MoE that has expert {options.get('expert')} was made with jax "
    assert (which in text) == ("expert" in options)


def test_expert_of_some_blocks_is_no_stage(run):
    """The stage trained the blocks without experts, too, and there the expert is the base."""
    deep = dataclasses.replace(LAST, vision=dataclasses.replace(LAST.vision, num_layers=2))
    (run / "moe/params/model.json").write_text(json.dumps(deep.to_dict()))
    dense = dataclasses.replace(deep, moe=None)
    assert "| **" not in card("huggingface", "out", dense, source=str(run / "moe/params"), expert=1)
