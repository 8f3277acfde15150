"""The README.md of an exported model: description, usage, provenance, scores."""

import dataclasses
import json
import os
import re

from etils import epath

from clipmoe_jax.core import artifacts, trees
from clipmoe_jax.core.checksums import read_verified
from clipmoe_jax.core.errors import naming_files
from clipmoe_jax.core.terminal import printable
from clipmoe_jax.dmu.recipe import CLIP_MOE, Results
from clipmoe_jax.dmu.recipes import title_of_folder
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.model_folder import MODEL_FILE, read_config
from clipmoe_jax.models.transformer import first_moe_layer
from clipmoe_jax.reporting.read import WRITTEN_ANEW
from clipmoe_jax.reporting.text_tables import has_retrieval, score_columns

PAPER = "[arXiv 2409.19291](https://arxiv.org/abs/2409.19291)"
TITLES = {
    "huggingface": "transformers",
    "sentence-transformers": "sentence-transformers",
    "openclip": "open_clip",
    "clipmoe": "the released CLIP-MoE code",
    "onnx": "ONNX",
    "onnx-int8": "ONNX, int8",
    "stablehlo": "JAX, as StableHLO",
}
LIBRARIES = {
    "huggingface": "transformers",
    "sentence-transformers": "sentence-transformers",
    "openclip": "open_clip",
    "clipmoe": "pytorch",
    "onnx": "onnx",
    "onnx-int8": "onnx",
    "stablehlo": "jax",
}

USE_CLIP = """\
```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({name}{remote})
processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)
image, texts = Image.open("photo.jpg"), ["a dog", "a cat"]
inputs = processor(text=texts, images=image, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
```
"""

PREPROCESSING = """\
The image processor of this folder makes the pixels that the model was trained with, OpenAI's. Without
`trust_remote_code=True` transformers takes its own, which crops a quarter of all shapes one pixel beside; so
does `AutoProcessor` of transformers 4, whose `AutoImageProcessor` takes this one.
"""

USE_VISION_TOWER = """\
The vision tower alone has the interface of `CLIPVisionModel`, so that it replaces CLIP's in other programs:

```python
from transformers.dynamic_module_utils import get_class_from_dynamic_module

CLIPMoEVisionModel = get_class_from_dynamic_module("modeling_clip_moe.CLIPMoEVisionModel", {name})
tower = CLIPMoEVisionModel.from_pretrained({name})
features = tower(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
```

Where a program has the line `CLIPVisionModel.from_pretrained(…)`, as LLaVA's own code does, write
`CLIPMoEVisionModel` instead: `CLIPVisionModel` has no place for experts and refuses this folder.

transformers finds remote code for a whole model, not for a part of one: before you load or build a
`LlavaForConditionalGeneration` whose `vision_config` is this tower's, call `register()`, a function of
`modeling_clip_moe.py`.
"""

USE_VISION_ALONE = """\
```python
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

model = CLIPVisionModelWithProjection.from_pretrained({name})
processor = AutoImageProcessor.from_pretrained({name}, trust_remote_code=True)
print(model(**processor(images=Image.open("photo.jpg"), return_tensors="pt")).image_embeds)
```
"""

USE_OPENCLIP = """\
```python
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms({local_dir})
tokenizer = open_clip.get_tokenizer({local_dir})
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("photo.jpg")).unsqueeze(0), normalize=True)
    text = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
    print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))
```
"""

USE_RELEASED_MOE = """\
`model.pt` is a state dict; `clipmoe.json` holds what it does not say. With the released code's package:

```python
from clipmoe import clipmoe

model, preprocess = clipmoe.loadMoE(
    {file}, num_experts={num_experts}, top_k={top_k}, moe_layers={moe_layers}
)
```
"""

USE_RELEASED_DENSE = """\
`model.pt` is a state dict. With the released code's package, or Long-CLIP's, whose format it is:

```python
from clipmoe import clipmoe

model, preprocess = clipmoe.load({file})
```
"""


USE_SENTENCE_TRANSFORMERS = """\
```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name}, trust_remote_code=True)
image, texts = model.encode([Image.open("photo.jpg")]), model.encode(["a dog", "a cat"])
print(model.similarity(image, texts))
```

Without `trust_remote_code=True` transformers would take its own image processor, which crops a quarter of all
shapes one pixel beside.
"""

USE_ONNX = """\
Features are not of unit length. With `pip install onnxruntime transformers torch torchvision`:

```python
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained({name}, trust_remote_code=True)
pixels = processor(images=[Image.open("photo.jpg")], return_tensors="np")["pixel_values"]
session = onnxruntime.InferenceSession({image_onnx})
image = session.run(["image_features"], {{"pixel_values": pixels.astype(np.float32)}})[0]
```
"""

USE_ONNX_TEXT = """\
```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
texts = ["a dog", "a cat"]
ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="np")["input_ids"]
session = onnxruntime.InferenceSession({text_onnx})
text = session.run(["text_features"], {{"input_ids": ids.astype(np.int64)}})[0]
print(text @ image.T / np.linalg.norm(text, axis=1, keepdims=True) / np.linalg.norm(image, axis=1))
```
"""

USE_STABLEHLO = """\
Features are not of unit length. The programs run on CPU, CUDA and TPU, with `pip install jax safetensors
tokenizers pillow`:

```python
import sys

import numpy as np
from jax import export
from safetensors.numpy import load_file

sys.path.append({name})
from preprocess import preprocess_image

weights = load_file({weights})
encode_image = export.deserialize(bytearray(open({image_stablehlo}, "rb").read())).call
pixels = preprocess_image(open("photo.jpg", "rb").read(), {image_size})
image = encode_image(weights, pixels[np.newaxis])
```
"""

USE_STABLEHLO_TEXT = """\
```python
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file({tokenizer})
tokenizer.enable_truncation({context_length})
tokenizer.enable_padding(length={context_length})
ids = np.array([row.ids for row in tokenizer.encode_batch(["a dog", "a cat"])], np.int32)
encode_text = export.deserialize(bytearray(open({text_stablehlo}, "rb").read())).call
text = encode_text(weights, ids)
print(text @ image.T / np.linalg.norm(text, axis=1, keepdims=True) / np.linalg.norm(image, axis=1))
```
"""


def model_card(
    source: str,
    config: ClipConfig,
    params: trees.Params,
    read_from: str,
    to: str,
    name: str,
    *,
    expert: int | None = None,
    is_blend: bool = False,
) -> str:
    """Returns a model's card in Markdown; of a model folder of a run also the run's config and, if one of its
    rows is this model, the run's evaluation.

    source: the path that the model was read from. read_from: what lay there, in words. to: the format it is
    written in. name: its new folder. expert: which one of the source's it is, or has a part in the blend.
    is_blend: whether the model is an average of the source's and another.
    """
    kind = "CLIP-MoE" if config.moe else "CLIP" if config.text else "CLIP vision tower"
    parts = [
        _front_matter(config, to),
        f"# {kind} for {TITLES[to]}",
        f"Written by `clipmoe_jax` from a {read_from}. {_what_it_is(config)}",
        _sizes(config, params),
        "## Use",
        _usage(config, to)
        .format(**_names(name), **_sizes_in_use(config), **_released_arguments(config))
        .strip(),
        *_provenance(epath.Path(source), config, expert, is_blend),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(config: ClipConfig, to: str) -> str:
    task = "zero-shot-image-classification" if config.text else "image-feature-extraction"
    tags = ["clip", "mixture-of-experts"] if config.moe else ["clip"]
    return "\n".join(
        [
            "---",
            f"library_name: {LIBRARIES[to]}",
            f"pipeline_tag: {task}",
            "tags:",
            *(f"- {t}" for t in tags),
            "---",
        ]
    )


def _what_it_is(config: ClipConfig) -> str:
    if config.moe is None:
        return "It takes CLIP's inputs and gives features of CLIP's kind."
    moe = config.moe
    blocks = f"the last {moe.num_moe_layers} blocks" if moe.num_moe_layers else "every block"
    layers = "attention and feed-forward layer are" if moe.has_attention else "the feed-forward layer is"
    return (
        f"A CLIP-MoE ({PAPER}) takes CLIP's inputs and gives features of CLIP's kind; in {blocks} of each "
        f"tower {layers} a mixture of {moe.num_experts} experts, of which each token uses "
        f"{moe.num_selected_experts}."
    )


def _sizes(config: ClipConfig, params: trees.Params) -> str:
    vision, text = config.vision, config.text
    dtypes = sorted({str(leaf.dtype) for leaf in trees.flatten(params).values()})
    rows = {
        "image": f"{vision.image_size} × {vision.image_size}, patches of {vision.patch_size}",
        "vision tower": _tower(vision),
        "text tower": f"{_tower(text)}, {text.context_length} positions" if text else None,
        "features": f"{config.embed_dim}",
        "activation": config.activation,
        "experts": config.moe and f"{config.moe.num_experts}, {config.moe.num_selected_experts} selected",
        "parameters": f"{trees.count_parameters(params):,}",
        "active parameters": config.moe and f"{count_active_parameters(params, config):,} for each token",
        "stored as": ", ".join(dtypes),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v)])


def _tower(tower) -> str:
    return f"{tower.num_layers} blocks, width {tower.width}, {tower.width // tower.head_width} heads"


def _usage(config: ClipConfig, to: str) -> str:
    if to == "openclip":
        return USE_OPENCLIP
    if to == "clipmoe":
        return USE_RELEASED_MOE if config.moe else USE_RELEASED_DENSE
    if to == "sentence-transformers":
        return USE_SENTENCE_TRANSFORMERS
    has_texts = config.text is not None and config.text.has_clips_tokens
    if to == "stablehlo":
        return USE_STABLEHLO + ("\n" + USE_STABLEHLO_TEXT if has_texts else "")
    if to.startswith("onnx"):
        return USE_ONNX + ("\n" + USE_ONNX_TEXT if has_texts else "")
    if config.text is None:
        return f"{USE_VISION_ALONE}\n{PREPROCESSING}"
    if config.moe:
        use = USE_CLIP.replace("{remote}", ", trust_remote_code=True")
        return "\n".join([use, PREPROCESSING, USE_VISION_TOWER])
    return USE_CLIP.replace("{remote}", "") + "\n" + PREPROCESSING


def _names(name: str) -> dict[str, str]:
    """Returns the folder and what lies in it as Python writes them, whatever characters the name has."""
    names = {"name": name, "local_dir": f"local-dir:{name}", "file": f"{name}/model.pt"}
    names |= {"weights": f"{name}/model.safetensors", "tokenizer": f"{name}/tokenizer.json"}
    for program in ("onnx", "stablehlo"):
        names |= {f"{tower}_{program}": f"{name}/{tower}.{program}" for tower in ("image", "text")}
    return {key: printable(json.dumps(value, ensure_ascii=False)) for key, value in names.items()}


def _sizes_in_use(config: ClipConfig) -> dict[str, int]:
    """Returns the sizes that lines of use have."""
    text = {"context_length": config.text.context_length} if config.text else {}
    return {"image_size": config.vision.image_size, **text}


def _released_arguments(config: ClipConfig) -> dict[str, int]:
    """Returns loadMoE's arguments."""
    if config.moe is None:
        return {}
    depth = config.vision.num_layers
    return {
        "num_experts": config.moe.num_experts,
        "top_k": config.moe.num_selected_experts,
        "moe_layers": min(config.moe.num_moe_layers or depth, depth),
    }


def _provenance(source: epath.Path, config: ClipConfig, expert: int | None, is_blend: bool) -> list[str]:
    """Returns the sections on the run that made a model, if it lies beside it: its config, its evaluation."""
    folders = [source, *list(source.parents)[:2]]
    sections = []
    if (made := next((f for f in folders if artifacts.is_done(f)), None)) is not None:
        versions = artifacts.done_field(made, "versions")
        packages = ", ".join(_plain(f"{name} {version}") for name, version in versions.items())
        which = "The model that was averaged with the base" if is_blend else ""
        which = which if expert is None else f"The CLIP-MoE that has expert {expert}"
        sections += [
            "## Training",
            ("A blend is not trained itself. " if is_blend else "")
            + (f"{which} was made with " if which else "With ")
            + f"{packages}, from this config:",
            f"```json\n{json.dumps(artifacts.done_field(made, 'inputs'), indent=2)}\n```",
        ]
    results = next((f for f in (folder / "eval" / "results.json" for folder in folders) if f.exists()), None)
    if results is None:
        return sections
    run = results.parent.parent
    with naming_files([results, run / "config.json"]):
        numbers = read_verified(results)
        title = None if is_blend else _title(numbers, source, run, config, expert)
        columns = score_columns([numbers], {})
        told = ["R@k: retrieval on the run's test set"] if has_retrieval([numbers]) else []
        if "old" in columns:
            told.append(f"old: {_retention(run / 'config.json')}")
        if columns and title is None:
            sections += ["## Evaluation", "The run that it comes from measured other models, not this one."]
        elif columns:
            explained = f"Bold: this model, as the run measured it. Per cent; {'; '.join(told)}."
            sections += ["## Evaluation", explained, _results(numbers, columns, title)]
    return sections


def _title(
    results: Results, source: epath.Path, run: epath.Path, config: ClipConfig, expert: int | None
) -> str | None:
    """Returns the row of the run's results that is the written model; None if none is.

    An expert is the dense model that it came from, if every block has experts: the stages train all blocks.
    One that was read otherwise than the run measured it, such as with fewer experts, has no row.
    """
    folders = [folder for folder in (source, *source.parents) if run in folder.parents]
    folder = next((f for f in folders if title_of_folder(os.fspath(f.relative_to(run)))), None)
    if folder is None:
        return None
    title = title_of_folder(os.fspath(folder.relative_to(run)))
    stored = read_config(folder) if (folder / MODEL_FILE).exists() else config
    if expert is not None:
        depths = [tower.num_layers for tower in (stored.vision, stored.text) if tower]
        if title != CLIP_MOE or any(first_moe_layer(depth, stored.moe) for depth in depths):
            return None
        title = next((t for t, numbers in results.items() if numbers.get("expert") == expert), None)
        stored = dataclasses.replace(stored, moe=None)
    return title if title in results and stored == config else None


def _plain(text: str) -> str:
    """Returns a text that is one line of nothing but itself in Markdown."""
    return re.sub(r"([\\`*_<\[|])", r"\\\1", printable(" ".join(text.split())))


def _retention(config: epath.Path) -> str:
    """Returns what the base knew, and the line by which the run measured that, if its config is there."""
    if not config.exists():
        return "what the base knew"
    fields = read_verified(config, WRITTEN_ANEW)
    line, data = fields["retention"], fields["data"].get("retention")
    of = f", where data.retention is {_plain(data)}" if "data.retention" in line else ""
    return f"what the base knew, by {_plain(line)}{of}"


def _results(results: Results, columns: dict[str, str], own: str | None) -> str:
    """Returns a table of every model of the run, to compare this one with, whose title is `own`.

    columns: {heading: key}.
    """
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for title, numbers in results.items():
        cells = (f"{100 * numbers[key]:.1f}" if key in numbers else "" for key in columns.values())
        name = f"**{_plain(title)}**" if title == own else _plain(title)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
