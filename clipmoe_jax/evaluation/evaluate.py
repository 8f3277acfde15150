"""Evaluates every model of a run on its test set and keeps the numbers in eval/results.json."""

import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clipmoe_jax import artifacts, trees
from clipmoe_jax.data import digit_scenes, loader, samplers
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.baselines import baseline_path
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.upcycling import count_active_parameters
from clipmoe_jax.evaluation.retrieval import retrieval_recall
from clipmoe_jax.evaluation.zero_shot import class_embeddings, zero_shot_accuracy
from clipmoe_jax.models.encoder import Encoder

CLIP_MOE, ENSEMBLE = "CLIP-MoE", "feature ensemble"
BASELINE_TITLES = {
    "direct_ft": "direct fine-tuning, one stage's steps",
    "direct_ft_same_pairs": "direct fine-tuning, same total pairs",
    "sparse_upcycling": "sparse upcycling",
    "base_ft_moe": "base + FT MoE",
}


class Captions(NamedTuple):
    """Every caption of the test images: tokens (T, L) int32, image_of_text (T,) int."""

    tokens: np.ndarray
    image_of_text: np.ndarray


def models_of(run: Run) -> dict[str, epath.Path]:
    """{title: model folder} of everything this run's config makes, in the order of the table."""
    rows = {"base": stages.stage_path(run, 0)}
    for name, title in BASELINE_TITLES.items():
        if name in run.config.baselines:
            rows[title] = baseline_path(run, name)
    for stage in range(1, run.config.mcl.num_stages + 1):
        rows[f"stage {stage} alone"] = stages.stage_path(run, stage)
    rows[CLIP_MOE] = run.workdir / "moe" / "params"
    return rows


def evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """{title: numbers} of every model, from eval/results.json or computed now.

    Numbers: image_to_text_r1 … text_to_image_r10, parameters, active_parameters; of digit scenes also
    zero_shot, {attribute: accuracy}. The feature ensemble joins the features of the base and all stages.
    """
    rows = models_of(run)
    for title, path in rows.items():
        artifacts.require(path, "baselines" if path.parent.name == "baselines" else _stage_of(title))

    def build(folder: epath.Path) -> dict:
        captions = read_captions(run)
        results, dense_features = {}, []
        for title, path in rows.items():
            config, params = run.load(path)
            encoder = Encoder(run.model(config), params, run.mesh, run.config.embed.batch_size)
            features = _image_features(run, encoder), encoder.texts(captions.tokens)
            if path in [stages.stage_path(run, s) for s in range(run.config.mcl.num_stages + 1)]:
                dense_features.append(features)
            results[title] = retrieval_recall(*features, captions.image_of_text) | {
                "parameters": trees.count_parameters(params),
                "active_parameters": count_active_parameters(params, config),
            }
            if run.config.data.digit_scenes:
                results[title]["zero_shot"] = _zero_shot_by_attribute(run, encoder, features[0])
        if "feature_ensemble" in run.config.baselines:
            size = len(dense_features) * results["base"]["parameters"]
            # Joined unit vectors: the inner product is the sum of the models' similarities.
            joined = [np.concatenate(parts, axis=1) for parts in zip(*dense_features, strict=True)]
            ensemble = retrieval_recall(*joined, captions.image_of_text)
            ensemble |= {"parameters": size, "active_parameters": size}
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


def _image_features(run: Run, encoder: Encoder) -> np.ndarray:
    """(I, embed) unit features of the test images."""
    pairs = run.pairs("test")
    sampler = samplers.SequentialSampler(len(pairs), encoder.batch_size)
    with loader.batches(
        pairs,
        sampler,
        start_step=0,
        num_steps=sampler.num_steps,
        num_workers=run.config.data.num_workers,
    ) as batches:
        return encoder.batches(batches, ["image"])["image"]


def _zero_shot_by_attribute(run: Run, encoder: Encoder, image_features: np.ndarray) -> dict[str, float]:
    """How well each attribute of a digit scene is told from a phrase for each of its values."""
    file = run.workdir / "data" / "scenes" / "test" / "attributes.json"
    scenes = json.loads(file.read_text())
    accuracy = {}
    for attribute, values in digit_scenes.ATTRIBUTES.items():
        prompts = [digit_scenes.PROMPTS[attribute].format(value) for value in values]
        classes = class_embeddings(encoder.texts(run.tokenizer()(prompts)), range(len(values)))
        labels = [values.index(scene[attribute]) for scene in scenes]
        accuracy[attribute] = zero_shot_accuracy(image_features, classes, labels)
    return accuracy


def _stage_of(title: str) -> str:
    if title == CLIP_MOE:
        return "router"
    return "base" if title == "base" else f"mcl_{title.split()[1]}"
