"""Evaluates every model of a run on its test set and keeps the numbers in eval/results.json."""

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clipmoe_jax import artifacts, trees
from clipmoe_jax.data import digit_scenes
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.baselines import baseline_path
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.upcycling import count_active_parameters
from clipmoe_jax.evaluation.retrieval import retrieval_recall
from clipmoe_jax.evaluation.zero_shot import class_embeddings, classification_metrics
from clipmoe_jax.models.encoder import Encoder

CLIP_MOE, ENSEMBLE = "CLIP-MoE", "feature ensemble"
BASELINE_TITLES = {
    "direct_ft": "direct fine-tuning, one stage's steps",
    "direct_ft_same_pairs": "direct fine-tuning, same total pairs",
    "full_ft": "full fine-tuning, one stage's steps",
    "long_clip": "Long-CLIP's recipe",
    "sparse_upcycling": "sparse upcycling",
    "drop_upcycling": "Drop-Upcycling",
    "clip_up": "CLIP-UP's recipe",
    "base_ft_moe": "base + FT MoE",
}


class Captions(NamedTuple):
    """Every caption of the test images: tokens (T, L) int32, image_of_text (T,) int."""

    tokens: np.ndarray
    image_of_text: np.ndarray


class Model(NamedTuple):
    """A row of the table: where it lies, which --stage makes it, which expert it became, if any."""

    path: epath.Path
    made_by: str
    expert: int | None = None


def models_of(run: Run) -> dict[str, Model]:
    """{title: model} of everything this run's config makes, in the order of the table."""
    rows = {"base": Model(stages.stage_path(run, 0), "base", 0)}
    for name, title in BASELINE_TITLES.items():
        if name in run.config.baselines:
            rows[title] = Model(baseline_path(run, name), "baselines")
    for stage in range(1, run.config.mcl.num_stages + 1):
        rows[f"stage {stage} alone"] = Model(stages.stage_path(run, stage), stages.stage_name(stage), stage)
    rows[CLIP_MOE] = Model(run.workdir / "moe" / "params", "router")
    return rows


def evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """{title: numbers} of every model, from eval/results.json or computed now.

    Numbers: those of `retrieval_recall`, parameters, active_parameters, expert (which expert of the CLIP-MoE
    a dense model became, or None); of digit scenes also zero_shot, {attribute: accuracy}. The feature
    ensemble joins the features of the base and all stages.
    """
    rows = models_of(run)
    for model in rows.values():
        artifacts.require(model.path, model.made_by)

    def build(folder: epath.Path) -> dict:
        captions = read_captions(run)
        results, dense_features = {}, []
        for title, model in rows.items():
            config, params = run.load(model.path)
            encoder = Encoder(run.model(config), params, run.mesh, run.config.embed.batch_size)
            images = run.encode("test", encoder, towers=["image"])["image"]
            texts = encoder.texts(captions.tokens)
            if model.expert is not None:
                dense_features.append((images, texts))
            results[title] = retrieval_recall(images, texts, captions.image_of_text) | {
                "parameters": trees.count_parameters(params),
                "active_parameters": count_active_parameters(params, config),
                "expert": model.expert,
            }
            if run.config.data.digit_scenes:
                results[title]["zero_shot"] = _zero_shot_by_attribute(run, encoder, images)
        if "feature_ensemble" in run.config.baselines:
            size = len(dense_features) * results["base"]["parameters"]
            # Joined unit vectors: the inner product is the sum of the models' similarities.
            joined = [np.concatenate(parts, axis=1) for parts in zip(*dense_features, strict=True)]
            ensemble = retrieval_recall(*joined, captions.image_of_text)
            ensemble |= {"parameters": size, "active_parameters": size, "expert": None}
            moe = results.pop(CLIP_MOE)
            results |= {ENSEMBLE: ensemble, CLIP_MOE: moe}
        artifacts.write_json(folder / "results.json", results)
        return {"num_images": len(run.records("test")), "num_captions": len(captions.tokens)}

    fields = run.fields(*stages.ROUTER_FIELDS, "baselines", "data.test", "data.test_split")
    artifacts.make(run.workdir / "eval", fields, build)
    return json.loads((run.workdir / "eval" / "results.json").read_text())


def read_captions(run: Run) -> Captions:
    """All captions of the test data."""
    records = run.records("test")
    captions = [records[i]["captions"] for i in range(len(records))]
    image_of_text = np.repeat(np.arange(len(captions)), [len(of_one) for of_one in captions])
    tokens = run.tokenizer()([caption for of_one in captions for caption in of_one])
    return Captions(tokens, image_of_text)


def _zero_shot_by_attribute(run: Run, encoder: Encoder, image_features: np.ndarray) -> dict[str, float]:
    """How well each attribute of a digit scene is told from a phrase for each of its values."""
    file = run.workdir / "data" / "scenes" / "test" / "attributes.json"
    scenes = json.loads(file.read_text())
    accuracy = {}
    for attribute, values in digit_scenes.ATTRIBUTES.items():
        prompts = [digit_scenes.PROMPTS[attribute].format(value) for value in values]
        classes = class_embeddings(encoder.texts(run.tokenizer()(prompts)), range(len(values)))
        labels = [values.index(scene[attribute]) for scene in scenes]
        accuracy[attribute] = classification_metrics(image_features, classes, labels)["top1"]
    return accuracy
