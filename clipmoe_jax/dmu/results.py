"""Evaluates the models of a run, each when its stage is done, and brings the numbers together at the end.

evaluated/MODEL/test/   retrieval, and image.npy and text.npy, the model's features of the test set
evaluated/MODEL/…       one folder for each of the config's evaluations
eval/                   results.json of all models, and what there is to see in the CLIP-MoE (`diagnose`)
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax.core import artifacts, distributed, trees
from clipmoe_jax.data.npy import load_array
from clipmoe_jax.data.sources.digit_scenes import ATTRIBUTES
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.baselines import baseline_path
from clipmoe_jax.dmu.diagnostics import (
    write_cost,
    write_experts,
    write_heat_maps,
    write_neighbours,
    write_routing,
    write_routing_change,
)
from clipmoe_jax.dmu.recipes import BASELINE_TITLES, CLIP_MOE, ENSEMBLE
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.stages import save_array
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.evaluation.evaluations import Evaluation, parse_evaluation
from clipmoe_jax.evaluation.retrieval import retrieval_recall
from clipmoe_jax.evaluation.subject import Subject
from clipmoe_jax.evaluation.zero_shot import class_embeddings, classification_metrics
from clipmoe_jax.models.clip import METHODS, ClipConfig, abstract_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.model_folder import load_model, read_config

# Pairs of the test set that routing and experts are looked at on, and examples that are shown.
DIAGNOSED_PAIRS, EXAMPLES = 2048, 8


class Captions(NamedTuple):
    """Every caption of the test images: texts (T,), tokens (T, L) int32, image_of_text (T,) int."""

    texts: list[str]
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


def is_wanted(config: ConfigDict) -> bool:
    """Whether a config says what to evaluate on."""
    return has_test_set(config) or bool(config.evaluations)


def has_test_set(config: ConfigDict) -> bool:
    """Whether there is a test set for retrieval."""
    return bool(config.data.test or config.data.digit_scenes)


def read_evaluations(run: Run) -> list[Evaluation]:
    """The config's evaluations, each with its data opened once. Raises FileNotFoundError or ValueError for
    what is not there."""
    found = []
    for line in run.config.evaluations:
        found.append(run.once(f"evaluation {line}", lambda line=line: parse_evaluation(line)))
        _ = found[-1].data
    return found


def evaluate_stage(run: Run, stage: str) -> None:
    """Evaluates the models that a stage has made, and says the numbers."""
    for title, model in models_of(run).items():
        if model.made_by == stage:
            _evaluate_model(run, title, model)


def evaluate(run: Run) -> dict[str, dict[str, Any]]:
    """{title: numbers} of every model, also written to eval/results.json.

    Numbers: parameters, active_parameters, expert (which expert of the CLIP-MoE a dense model became, or
    None); with a test set `retrieval_recall`'s; of digit scenes also zero_shot, {attribute: accuracy}; of the
    config's evaluations {line: {metric: value}}. The feature ensemble joins the features of the base and all
    stages.
    """
    models = models_of(run)
    results = {title: _evaluate_model(run, title, model) for title, model in models.items()}
    if has_test_set(run.config):
        moe = results.pop(CLIP_MOE)
        if "feature_ensemble" in run.config.baselines:
            results[ENSEMBLE] = _evaluate_ensemble(run, models)
        results[CLIP_MOE] = moe
    inputs = _inputs(models[CLIP_MOE]) | _test_fields(run)
    run.make(run.workdir / "eval", inputs, lambda folder: _diagnose(run, folder))
    artifacts.write_json(run.workdir / "eval" / "results.json", results)
    return results


def _inputs(model: Model) -> dict[str, Any]:
    """What a model was made from."""
    return json.loads((model.path / "done.json").read_text())["inputs"]


def _test_fields(run: Run) -> dict[str, Any]:
    fields = run.fields("data.test", "data.test_split", "data.max_caption_tokens")
    if run.config.data.test:
        fields["contents of data.test"] = run.records("test").fingerprint
    return fields


def _folder(run: Run, title: str) -> epath.Path:
    name = title.replace(" alone", "").replace(",", "").replace("'", "").replace("+ ", "")
    return run.workdir / "evaluated" / name.replace(" ", "_")


def _features(run: Run, title: str) -> tuple[np.ndarray, np.ndarray]:
    """What a model makes of the test set: images (N, d) and captions (T, d), float32 unit vectors."""
    image, text = (load_array(_folder(run, title) / "test" / f"{tower}.npy") for tower in METHODS)
    return image, text


def _evaluate_model(run: Run, title: str, model: Model) -> dict[str, Any]:
    """The model's numbers, from its artifacts or computed now."""
    artifacts.require(model.path, model.made_by)
    config = read_config(model.path)
    abstract = abstract_params(config)
    numbers: dict[str, Any] = {}
    once = functools.cache(lambda: _encoder(run, model))  # a model is loaded for what is not there yet
    if has_test_set(run.config):
        path = _folder(run, title) / "test"
        inputs = _inputs(model) | _test_fields(run)
        run.make(path, inputs, lambda folder: _evaluate_test(run, title, once(), folder))
        numbers |= json.loads((path / "results.json").read_text())
    found = {}
    for evaluation in read_evaluations(run):
        digest = hashlib.sha256(evaluation.line.encode()).hexdigest()[:8]
        path = _folder(run, title) / f"{evaluation.kind}-{digest}"
        inputs = _inputs(model) | {"line": evaluation.line, "contents": evaluation.contents}
        run.make(path, inputs, functools.partial(_evaluate_line, run, title, evaluation, once, config))
        found[evaluation.line] = json.loads((path / "results.json").read_text())
    if found:
        numbers["evaluations"] = found
    return numbers | {
        "parameters": trees.count_parameters(abstract),
        "active_parameters": count_active_parameters(abstract, config),
        "expert": model.expert,
    }


def _encoder(run: Run, model: Model) -> Encoder:
    config, params = run.load(model.path)
    return Encoder(run.model(config), params, run.mesh, run.config.embed.batch_size)


def _evaluate_test(run: Run, title: str, encoder: Encoder, folder: epath.Path) -> dict:
    captions = read_captions(run)
    images = run.encode("test", encoder, towers=["image"])["image"]
    texts = encoder.texts(captions.tokens)
    save_array(folder / "image.npy", images)
    save_array(folder / "text.npy", texts)
    numbers: dict[str, Any] = retrieval_recall(images, texts, captions.image_of_text)
    both = (100 * numbers[f"{name}_r1"] for name in ("image_to_text", "text_to_image"))
    run.metrics.say("{}: R@1 {:.1f} i2t, {:.1f} t2i".format(title, *both))
    if run.config.data.digit_scenes:
        numbers["zero_shot"] = _zero_shot_by_attribute(run, encoder, images)
    artifacts.write_json(folder / "results.json", numbers)
    return {}


def _evaluate_line(
    run: Run,
    title: str,
    evaluation: Evaluation,
    encoder: Callable[[], Encoder],
    config: ClipConfig,
    folder: epath.Path,
) -> dict:
    subject = Subject(encoder(), run.tokenizer(), config.vision.image_size, run.config.data.num_workers)
    numbers = evaluation.measure(subject)
    told = ", ".join(f"{name} {value:.3f}" for name, value in list(numbers.items())[:3])
    run.metrics.say(f"{title}: {evaluation.line}: {told}")
    artifacts.write_json(folder / "results.json", numbers)
    return {}


def _evaluate_ensemble(run: Run, models: Mapping[str, Model]) -> dict[str, Any]:
    """The features of the base and all stages, joined: the inner product of unit vectors side by side is the
    sum of the models' similarities."""
    dense = [title for title, model in models.items() if model.expert is not None]
    parts = zip(*(_features(run, title) for title in dense), strict=True)
    joined = [np.concatenate(of_models, axis=1) for of_models in parts]
    numbers = retrieval_recall(*joined, read_captions(run).image_of_text)
    config = read_config(models["base"].path)
    size = len(dense) * trees.count_parameters(abstract_params(config))
    return numbers | {"parameters": size, "active_parameters": size, "expert": None}


def _diagnose(run: Run, folder: epath.Path) -> dict:
    """Files that show what the CLIP-MoE does with the first pairs of the test set, if there is one."""
    if not has_test_set(run.config):
        return {}
    run.metrics.say("evaluate: routing, differences of experts and cost of the CLIP-MoE")
    captions, paths = read_captions(run), {title: models_of(run)[title].path for title in ("base", CLIP_MOE)}
    features = [_features(run, title) for title in paths]
    write_neighbours(folder, *features, captions.texts, captions.image_of_text)
    config, params = run.load(paths[CLIP_MOE])
    model, pairs = run.model(config), run.pairs("test")
    encoder = Encoder(model, params, run.mesh, run.config.embed.batch_size)
    num_pairs = min(len(pairs), DIAGNOSED_PAIRS)
    _, untrained = run.load(run.workdir / "moe" / "upcycled")
    for write in (write_routing, functools.partial(write_routing_change, before=untrained), write_experts):
        with encoder.open(pairs, stop=num_pairs, num_workers=run.config.data.num_workers) as batches:
            write(folder, model, params, batches=batches, mesh=run.mesh)
    examples = np.arange(min(len(pairs), EXAMPLES))
    batch = pairs.gather(examples, epoch=0)
    first_captions = [run.records("test")[i]["captions"][0] for i in examples]
    write_heat_maps(folder, model, params, batch["image"], batch["text"], first_captions, examples, run.mesh)
    whole = {title: load_model(path) for title, path in paths.items()}  # by all processes
    models = {title: (run.model(config), params) for title, (config, params) in whole.items()}
    if distributed.is_main():
        write_cost(folder, models, batch["image"], batch["text"])
    return {"num_images": len(pairs), "num_captions": len(captions.texts), "num_pairs_diagnosed": num_pairs}


def read_captions(run: Run) -> Captions:
    """All captions of the test data."""
    records = run.records("test")
    captions = [records[i]["captions"] for i in range(len(records))]
    image_of_text = np.repeat(np.arange(len(captions)), [len(of_one) for of_one in captions])
    texts = [caption for of_one in captions for caption in of_one]
    tokens = run.tokenizer()(texts)
    return Captions(texts, tokens, image_of_text)


def _zero_shot_by_attribute(run: Run, encoder: Encoder, image_features: np.ndarray) -> dict[str, float]:
    """How well each attribute of a digit scene is told from a phrase for each of its values."""
    scenes = json.loads((run.workdir / "data" / "attributes.json").read_text())
    accuracy = {}
    for attribute, (prompt, values) in ATTRIBUTES.items():
        prompts = [prompt.format(value) for value in values]
        classes = class_embeddings(encoder.texts(run.tokenizer()(prompts)), range(len(values)))
        labels = [values.index(scene[attribute]) for scene in scenes]
        accuracy[attribute] = classification_metrics(image_features, classes, labels)["top1"]
    return accuracy
