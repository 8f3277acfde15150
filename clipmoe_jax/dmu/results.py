"""Evaluates the models of a run, each when its stage is done, and brings the numbers together at the end.

evaluated/MODEL/test/   retrieval, and image.npy and text.npy, the model's features of the test set
evaluated/MODEL/…       one folder for each of the config's evaluations
evaluated/MODEL/blends-…  blends of the model with the base, where the config wants them
eval/                   results.json of all models, and diagnostics of the CLIP-MoE

In an evaluation line the paths `data.test` and `data.retention` stand for the run's own data sets.
"""

import contextlib
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, checksums, distributed, trees
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.core.terminal import duration
from clipmoe_jax.data.npy import load_array, save_array
from clipmoe_jax.dmu import diagnostics, recipes
from clipmoe_jax.dmu.datasets import Dataset
from clipmoe_jax.dmu.recipe import BASE_NAME, CLIP_MOE, ROUTER_NAME, Recipe
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.training import budget_of
from clipmoe_jax.evaluation.evaluations import (
    Evaluation,
    NotApplicableError,
    open_applicable,
    parse_evaluation,
)
from clipmoe_jax.evaluation.retrieval import RECALL_AT_1, retrieval_features, retrieval_recall
from clipmoe_jax.evaluation.scores import shown_score
from clipmoe_jax.evaluation.subject import EnsembleSubject, Subject
from clipmoe_jax.models.clip import METHODS, abstract_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.model_folder import read_config

# What an evaluation says of what the base knew: {kind: metrics whose mean it is}.
RETENTION = {"zero_shot": ("top1",), "retrieval": RECALL_AT_1}
# Pairs of the test set that routing and experts are diagnosed on, and examples that are shown.
DIAGNOSED_PAIRS, EXAMPLES = 2048, 8
DIAGNOSES = ("routing", "changes of routing", "differences of experts", "cost")
# Below these training changed nothing that a report could show: 1 - CKA, and a share of tokens.
LEAST_DIVERSITY, LEAST_CHANGE = 5e-4, 5e-3
BLEND_SHARES = tuple(i / 20 for i in range(1, 20))  # of the model; the rest is the base's
OWN = {"data.test": "test", "data.retention": "retention"}  # paths that stand for the run's own data sets


def is_wanted(config: ConfigDict) -> bool:
    """Returns whether a config says what to evaluate on."""
    return bool(config.data.test or config.evaluations or config.retention)


def lines_of(config: ConfigDict) -> tuple[str, ...]:
    """Returns a config's evaluations, that of retention last."""
    return (*config.evaluations, *filter(None, [config.retention]))


def check_lines(config: ConfigDict, datasets: Mapping[str, Dataset]) -> None:
    """Raises ValueError or FileNotFoundError for evaluations that cannot be, before data is prepared."""
    errors = Errors()
    for line in lines_of(config):
        with errors.of(), contextlib.suppress(NotApplicableError):
            evaluation = parse_evaluation(line)
            if evaluation.path not in OWN:
                _ = evaluation.data
            elif OWN[evaluation.path] not in datasets:
                raise ValueError(f"evaluation {line}: {evaluation.path} is empty: set it, or name a data set")
            if line == config.retention and evaluation.kind not in RETENTION:
                choices = ", ".join(RETENTION)
                raise ValueError(f"retention={line}: {evaluation.kind} is none of {choices}")
    errors.raise_all()


def leaves_out_retention(config: ConfigDict) -> bool:
    """Returns whether a config has data.retention, and no line that measures on it."""
    paths = [parse_evaluation(line).path for line in lines_of(config)]
    return bool(config.data.retention) and "data.retention" not in paths


def open_evaluations(
    config: ConfigDict, datasets: Mapping[str, Dataset], say: Callable[[str], None] = lambda text: None
) -> list[Evaluation]:
    """Returns a config's evaluations, each with its data opened once.

    One that does not apply to its data set is left out, and `say` told. Raises as `check_lines` does, for the
    test set too.
    """
    evaluations = []
    for line in lines_of(config):
        evaluation = parse_evaluation(line)
        if evaluation.path in OWN:
            own = datasets[OWN[evaluation.path]]
            options = {"split": own.split, **evaluation.options}
            evaluation = dataclasses.replace(evaluation, path=own.path, options=options)
        evaluations.append(evaluation)
    applicable, reasons = open_applicable(evaluations)
    for reason in reasons:
        say(f"skipped: {reason}")
    return applicable


def tell_model(run: Run, recipe: Recipe, is_new: bool) -> None:
    """Evaluates a model, and says in a line how it was made and what it reaches.

    is_new: whether it was made now. One that was made and evaluated before is not told again.
    """
    numbers = {}
    if is_wanted(run.config) and recipe.group != "part":
        is_new |= not evaluation_folder(run, recipe).exists()
        numbers = _evaluate_model(run, recipe)
    if is_new:
        measured = artifacts.measured(run.workdir / recipe.folder)
        run.metrics.say(f"{recipe.name}: {', '.join([*_making(measured), *_reached(run, numbers)])}")
        scores = {f"recall/{name}": numbers[name] for name in RECALL_AT_1 if name in numbers}
        scores |= {"recall/retention": numbers["retention"]} if "retention" in numbers else {}
        run.metrics.log_scores(recipe.name, measured.get("num_steps", 0), scores)


def _making(measured: Mapping[str, Any]) -> list[str]:
    """The making of a model, in words."""
    if "num_steps" not in measured:
        return [measured["source"]]  # an imported base
    steps, now = measured["num_steps"], measured["steps_now"]
    took = f"{steps:,} steps" + (f", the last {now:,}" if now < steps else "")
    took += f" in {duration(measured['seconds_now'])}"
    if (compiling := measured["compile_seconds_now"]) > 1:
        took += f" ({duration(compiling)} compiling)"
    return [took, f"loss {measured['loss']:.3f}"]


def _reached(run: Run, numbers: Mapping[str, Any]) -> list[str]:
    """Recall@1, the first number of each evaluation, and retention, in words."""
    told = []
    if "test" in run.datasets and numbers:
        i2t, t2i = (shown_score(name, numbers[name]) for name in RECALL_AT_1)
        told.append(f"R@1 {i2t} i2t {t2i} t2i")
    for line, metrics in numbers.get("evaluations", {}).items():
        if line != run.config.retention:
            name = "mean" if "mean" in metrics else next(iter(metrics))
            told.append(f"{line.partition(':')[0]} {name} {shown_score(name, metrics[name])}")
    if "retention" in numbers:
        told.append(f"old {shown_score('retention', numbers['retention'])}")
    return told


def evaluate(run: Run, *, with_baselines: bool = True) -> dict[str, dict[str, Any]]:
    """Returns {title: numbers} of every model, which also go to eval/results.json.

    with_baselines: False leaves out baselines, and ensembles, which may be of them: before they are made.

    Numbers: parameters, active_parameters; pairs and flops, which its training took after the base's; expert
    (which expert of the CLIP-MoE a dense model became, or None); with a test set `retrieval_recall`'s, errors
    among them; with config.retention "retention", a share; "evaluations" and "chance", {line: {metric:
    value}}, of the config's evaluations and of retention; "blends", {share of the model: the same numbers of
    its blend with the base}, of those that config.blends names. A feature ensemble joins the features of its
    members.
    """
    results, budget, rows = {}, budget_of(run), recipes.table_rows(run.config)
    if not with_baselines:
        rows = [row for row in rows if not row.is_baseline and row.group != "ensemble"]
    clip_moe = recipes.recipes(run.config)[ROUTER_NAME]
    inputs = _inputs(run, clip_moe) | _test_inputs(run)
    began = time.perf_counter()
    with run.metrics.progress("evaluate", 0, len(rows) + len(DIAGNOSES), unit="part") as progress:
        for recipe in rows:
            progress.set_postfix_str(recipe.title, refresh=False)
            if recipe.group != "ensemble":
                results[recipe.title] = _evaluate_model(run, recipe)
            else:
                results[recipe.title] = _evaluate_ensemble(run, recipe)
            results[recipe.title] |= recipes.cost_of(budget, [recipe.name])._asdict()
            if recipe.name in run.config.blends:
                results[recipe.title]["blends"] = _evaluate_blends(run, recipe)
            progress.update()
        is_new = run.make(run.workdir / "eval", inputs, lambda folder: _diagnose(run, folder, progress))
    artifacts.write_verified_json(run.workdir / "eval" / "results.json", results)
    if is_new:
        parts = [f"{len(rows)} models", *(DIAGNOSES if "test" in run.datasets else ())]
        run.metrics.say(f"evaluate: {', '.join(parts)} in {duration(time.perf_counter() - began)}")
        for warning in _nothing_changed(run):
            run.metrics.say(f"warning: {warning}")
    return results


def _nothing_changed(run: Run) -> Iterator[str]:
    """Warnings of training that changed nothing that can be seen, with what to raise."""
    if "test" not in run.datasets or not distributed.is_main():
        return

    def how_long(section: str) -> str:
        settings = run.config[section]
        length = "num_steps" if settings.num_steps else "num_epochs"
        names = ("learning_rate", length)
        return " or ".join(f"{section}.{name} (now {settings[name]:g})" for name in names)

    diversity = read_json(run.workdir / "eval" / "experts.json")["diversity"]
    changed = read_json(run.workdir / "eval" / "routing_change.json")
    if diversity < LEAST_DIVERSITY:
        yield f"the experts compute the same (diversity {diversity:.3f}): raise {how_long('mcl')}"
    share = float(np.mean([share for of_tower in changed.values() for share in of_tower]))
    if share < LEAST_CHANGE:
        yield (
            f"training the routers changed the experts of {100 * share:.1f} % of the tokens: raise "
            f"{how_long('router')}"
        )


def lacks_baselines(run: Run) -> bool:
    """Returns whether a run's numbers are wanted and some baseline is still to be made."""
    made = recipes.recipes(run.config).values()
    missing = any(row.is_baseline and not artifacts.is_done(run.workdir / row.folder) for row in made)
    return missing and is_wanted(run.config)


def _inputs(run: Run, recipe: Recipe) -> dict[str, Any]:
    """The inputs that a model was made from."""
    return configs.upgrade_inputs(artifacts.done_field(run.workdir / recipe.folder, "inputs"))


def _test_inputs(run: Run) -> dict[str, Any]:
    """The fields and contents of the test set that numbers depend on."""
    inputs = run.fields("data.test", "data.test_split", "data.max_caption_tokens")
    if "test" in run.datasets:
        inputs[f"{artifacts.CONTENTS}data.test"] = run.records("test").fingerprint
    return inputs


def inputs_of_ensemble(members: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the inputs of an ensemble. members: {name: inputs of the model}."""
    return {f"{name}: {field}": value for name, inputs in members.items() for field, value in inputs.items()}


def evaluation_folder(run: Run, recipe: Recipe) -> epath.Path:
    """Returns where the numbers and features of a model lie, a folder for each evaluation."""
    name = recipe.title
    for removed in (" alone", ",", "'", "+ "):
        name = name.replace(removed, "")
    return run.workdir / "evaluated" / name.replace(" ", "_")


def _features(run: Run, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """A model's features of the test set: images (N, d) and captions (T, d), float32 unit vectors."""
    image, text = (load_array(evaluation_folder(run, recipe) / "test" / f"{tower}.npy") for tower in METHODS)
    return image, text


def _evaluate_model(run: Run, recipe: Recipe) -> dict[str, Any]:
    """The model's numbers, from its artifacts or computed now."""
    path = artifacts.require(run.workdir / recipe.folder, recipe.stage)
    subject = functools.cache(lambda: run.subject(run.encoder(path)))  # loaded for what is not there yet
    made_from, numbers = _inputs(run, recipe), {}
    if "test" in run.datasets:
        folder = evaluation_folder(run, recipe) / "test"
        run.make(
            folder, made_from | _test_inputs(run), lambda new: _evaluate_test(run, recipe, subject(), new)
        )
        numbers |= checksums.read_verified(folder / "results.json")
    numbers |= _evaluate_lines(run, recipe, made_from, subject)
    return numbers | _sizes(path) | {"expert": _expert(run, recipe)}


def _evaluations(run: Run) -> list[Evaluation]:
    return run.once("evaluations", lambda: open_evaluations(run.config, run.datasets, run.metrics.say))


def _retention_line(run: Run) -> Evaluation | None:
    return next((e for e in _evaluations(run) if e.line == run.config.retention), None)


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:8]


def _evaluate_lines(
    run: Run, recipe: Recipe, made_from: Mapping[str, Any], subject: Callable[[], Subject]
) -> dict[str, Any]:
    """A model's numbers of the config's evaluations, from artifacts or computed now."""
    numbers, metrics, chance = {}, {}, {}
    for evaluation in _evaluations(run):
        folder = evaluation_folder(run, recipe) / f"{evaluation.kind}-{_digest(evaluation.line)}"
        inputs = {**made_from, "line": evaluation.line, **_contents(evaluation)}
        with evaluation.naming_line():
            run.make(folder, inputs, functools.partial(_evaluate_line, run, recipe, evaluation, subject))
        found = metrics[evaluation.line] = checksums.read_verified(folder / "results.json")
        if evaluation.line == run.config.retention:
            numbers["retention"] = _retention(evaluation, found)
        if evaluation.chance:
            chance[evaluation.line] = evaluation.chance
    numbers |= {"evaluations": metrics} if metrics else {}
    return numbers | ({"chance": chance} if chance else {})


def _contents(evaluation: Evaluation) -> dict[str, str]:
    return {artifacts.CONTENTS + name: of_one for name, of_one in evaluation.contents.items()}


def _retention(evaluation: Evaluation, found: Mapping[str, float]) -> float:
    return float(np.mean([found[name] for name in RETENTION[evaluation.kind]]))


def _expert(run: Run, recipe: Recipe) -> int | None:
    """Which expert of the CLIP-MoE a model became, if any."""
    clip_moe = recipes.recipes(run.config)[ROUTER_NAME]
    experts = clip_moe.experts(run.config)
    if recipe.name not in experts or (recipe.group == "base" and clip_moe.extends(run.config)):
        return None
    return experts.index(recipe.name) + configs.num_base_experts(run.config) - 1


def _sizes(path: epath.Path) -> dict[str, int]:
    architecture = read_config(path)
    abstract = abstract_params(architecture)
    return {
        "parameters": trees.count_parameters(abstract),
        "active_parameters": count_active_parameters(abstract, architecture),
    }


def _evaluate_test(run: Run, recipe: Recipe, subject: Subject, folder: epath.Path) -> dict:
    features = retrieval_features(subject, run.records("test"), run.captions("test"))
    save_array(folder / "image.npy", features.images)
    save_array(folder / "text.npy", features.texts)
    arrays = features.images, features.texts, features.image_of_text
    numbers = retrieval_recall(*arrays, with_errors=True)
    artifacts.write_json(folder / "results.json", numbers)
    return {}


def _evaluate_line(
    run: Run, recipe: Recipe, evaluation: Evaluation, subject: Callable[[], Subject], folder: epath.Path
) -> dict:
    numbers = evaluation.measure(subject())
    artifacts.write_json(folder / "results.json", numbers)
    return {}


def _evaluate_ensemble(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Numbers of the joined features of several models.

    The inner product of unit vectors side by side is the sum of the models' similarities.
    """
    made, numbers = recipes.recipes(run.config), {}
    members = [made[name] for name in recipe.experts(run.config)]
    if "test" in run.datasets:
        parts = zip(*(_features(run, member) for member in members), strict=True)
        images, texts = (np.concatenate(of_members, axis=1) for of_members in parts)
        numbers |= retrieval_recall(images, texts, run.captions("test").image_of_text, with_errors=True)
    made_from = inputs_of_ensemble({member.name: _inputs(run, member) for member in members})

    @functools.cache
    def subject() -> EnsembleSubject:
        encoders = [run.encoder(run.workdir / member.folder) for member in members]
        return EnsembleSubject([run.subject(encoder) for encoder in encoders])

    numbers |= _evaluate_lines(run, recipe, made_from, subject)
    sizes = [_sizes(run.workdir / member.folder) for member in members]
    return numbers | {key: sum(size[key] for size in sizes) for key in sizes[0]} | {"expert": None}


def _evaluate_blends(run: Run, recipe: Recipe) -> dict[str, dict[str, float]]:
    """{share: recall@1 and retention} of the base and a dense model blended weight by weight (WiSE-FT,
    arXiv 2109.01903)."""
    inputs = _inputs(run, recipe) | _test_inputs(run) | {"blends": BLEND_SHARES}
    if evaluation := _retention_line(run):
        inputs |= {"line": evaluation.line, **_contents(evaluation)}

    def build(folder: epath.Path) -> dict:
        made = recipes.recipes(run.config)
        architecture, base = run.load(run.workdir / made[BASE_NAME].folder)
        _, params = run.load(run.workdir / recipe.folder)
        # A file each, so that a killed pass goes on with the next share.
        files = {share: folder / f"{share:.2f}.json" for share in BLEND_SHARES}
        for share, file in files.items():
            if not distributed.agree(file.exists()):
                blend = trees.blend(base, params, share)
                artifacts.write_json(file, _both_axes(run, run.subject(run.encoder_of(architecture, blend))))
        if distributed.is_main():
            artifacts.write_json(
                folder / "results.json", {file.stem: read_json(file) for file in files.values()}
            )
        return {}

    folder = evaluation_folder(run, recipe) / f"blends-{_digest(run.config.retention)}"
    run.make(folder, inputs, build)
    return checksums.read_verified(folder / "results.json")


def _both_axes(run: Run, subject: Subject) -> dict[str, float]:
    """A subject's recall@1 on the test set, and its retention, as far as the config has them."""
    numbers = {}
    if "test" in run.datasets:
        features = retrieval_features(subject, run.records("test"), run.captions("test"))
        numbers = retrieval_recall(features.images, features.texts, features.image_of_text, ranks=(1,))
    if evaluation := _retention_line(run):
        numbers["retention"] = _retention(evaluation, evaluation.measure(subject))
    return numbers


def _diagnose(run: Run, folder: epath.Path, progress: tqdm) -> dict:
    """Writes what the CLIP-MoE does with the first pairs of the test set, if there is one."""
    if "test" not in run.datasets:
        return {}
    parts = iter(DIAGNOSES)

    def begin() -> None:
        progress.set_postfix_str(next(parts))
        progress.update()

    made = recipes.recipes(run.config)
    compared = {recipe.title: recipe for recipe in (made[BASE_NAME], made[ROUTER_NAME])}
    captions = run.captions("test")
    base_features, moe_features = (_features(run, recipe) for recipe in compared.values())
    diagnostics.write_neighbours(folder, base_features, moe_features, captions.texts, captions.image_of_text)
    architecture, params = run.load(run.workdir / compared[CLIP_MOE].folder)
    model, pairs = run.model(architecture), run.pairs("test")
    encoder = run.encoder_of(architecture, params)
    num_pairs = min(len(pairs), DIAGNOSED_PAIRS)
    _, untrained = run.load(run.workdir / compared[CLIP_MOE].upcycled_folder)
    for write in (
        diagnostics.write_routing,
        functools.partial(diagnostics.write_routing_change, before=untrained),
        diagnostics.write_experts,
    ):
        begin()
        with encoder.open(pairs, stop=num_pairs, num_workers=run.config.data.num_workers) as batches:
            write(folder, model, params, batches=batches, mesh=run.mesh)
    examples = np.arange(min(len(pairs), EXAMPLES))
    batch = pairs.gather(examples)
    first_captions = [run.records("test")[int(i)]["captions"][0] for i in examples]
    arrays = batch["image"], batch["text"], first_captions, examples
    diagnostics.write_heat_maps(folder, model, params, *arrays, run.mesh, encoder.batch_size)
    begin()
    architectures = {title: read_config(run.workdir / recipe.folder) for title, recipe in compared.items()}
    diagnostics.write_cost(folder, architectures, batch["text"].shape[1])
    return {"num_images": len(pairs), "num_captions": len(captions.texts), "num_pairs_diagnosed": num_pairs}
