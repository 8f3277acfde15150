"""Runs a config: every stage, for every seed of every variant, after everything has been checked."""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.core import artifacts, cli, distributed, sharding
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.core.paths import check_plain_folder
from clipmoe_jax.data.records import NoSplitError, check_stored_size
from clipmoe_jax.data.sources import num_sources
from clipmoe_jax.dmu import results
from clipmoe_jax.dmu.ahead import compile_ahead
from clipmoe_jax.dmu.changes import check_unchanged
from clipmoe_jax.dmu.datasets import WAIT_SECONDS, Dataset, check_disjoint, datasets_of, describe
from clipmoe_jax.dmu.phases import check_mesh, check_rehearsal, phases_of
from clipmoe_jax.dmu.recipe import BASE_NAME, BASELINES_STAGE, REHEARSAL_STAGE, Recipe, Results
from clipmoe_jax.dmu.recipes import check_baselines, distills, rehearses
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.stages import stages_of
from clipmoe_jax.dmu.training import take_architecture
from clipmoe_jax.planning.memory import choose_remat
from clipmoe_jax.train.step_programs import CompiledAhead

DATA_STAGE, EVALUATE_STAGE = "data", "evaluate"
# For any batch and warm-up: how many pairs a source has is known when it is prepared.
ENOUGH_PAIRS = 10**12


def stage_names(config: ConfigDict) -> list[str]:
    """Returns the names of a config's stages, in order."""
    return [DATA_STAGE, *stages_of(config), *([EVALUATE_STAGE] if results.is_wanted(config) else [])]


def run_variants(
    config: ConfigDict,
    workdir: epath.Path,
    stage: str = "",
    profiled: range = range(0),
    show_first: Callable[[Results], None] | None = None,
) -> dict[str, list[Results]]:
    """Runs every stage, or one alone, for every seed of every variant.

    A config without variants is one named "", in the workdir itself. Data is prepared and everything checked
    before the first stage begins; what several variants have in common is made once and copied. profiled: as
    of `Metrics`. show_first: is given the results of the CLIP-MoE and its stages before baselines are made,
    in a run of one seed.

    Returns {variant: results of each seed}, empty lists where `stage` is another than the evaluation. Raises
    ValueError or FileNotFoundError naming what cannot work.
    """
    errors, datasets = Errors(), {}
    num_pairs: dict[Dataset, int] = {}
    with errors.of():
        check_plain_folder(workdir)
    with errors.of():
        config_checks.validate(config)
    variants = configs.variant_configs(config, errors)
    for name, variant in variants.items():
        with errors.of(configs.label(name)):
            check_config(variant, stage)
        for seed in variant.seeds:
            with errors.of(configs.label(name)):
                datasets[name, seed] = datasets_of(variant, config, workdir, name, seed)
                check_sources(variant, datasets[name, seed], num_pairs)
    errors.raise_all()
    for name, variant in variants.items():
        if results.leaves_out_retention(variant) and distributed.is_main():
            where = f"{configs.label(name)}: " if name else ""
            cli.say(
                f"warning: {where}data.retention={variant.data.retention} measures nothing: set retention, "
                "such as zero_shot:data.retention, or leave it empty"
            )
    for (name, _), of_run in datasets.items():
        if not distributed.agree(all(dataset.is_prepared() for dataset in of_run.values())):
            with errors.of(configs.label(name)):  # before hours of preparation
                check_num_pairs(variants[name], {key: num_pairs[dataset] for key, dataset in of_run.items()})
    errors.raise_all()
    for (name, _), of_run in datasets.items():
        for dataset in of_run.values():
            _prepare(dataset, variants[name], stage)
    for (name, _), of_run in datasets.items():
        with errors.of(configs.label(name)):
            check_data(variants[name], of_run, workdir)
    errors.raise_all()
    results_of = {name: [] for name in variants}
    if stage != DATA_STAGE:
        for (name, seed), of_run in datasets.items():
            show = show_first if len(datasets) == 1 and not name else None
            evaluated = _run_seed(
                variants[name], seed, workdir, name, list(variants), of_run, stage, profiled, show
            )
            if evaluated is not None:
                results_of[name].append(evaluated)
    return results_of


def _prepare(dataset: Dataset, config: ConfigDict, stage: str) -> None:
    """Prepares a source unless it is prepared; for a later stage alone it must be."""
    if stage not in ("", DATA_STAGE):
        if dataset.source:
            artifacts.require(epath.Path(dataset.path), DATA_STAGE)
        return
    if distributed.is_main() and not dataset.is_prepared():
        cli.say(f"{dataset.path}: prepares {dataset.source}")
    if dataset.prepare(config.data.max_bad_fraction) and distributed.is_main():
        report = artifacts.measured(epath.Path(dataset.path))
        bad = f"; {report['bad']:,} bad records left out" if report["bad"] else ""
        cli.say(f"{dataset.path}: {report['pairs']:,} pairs{bad}")


def _run_seed(
    config: ConfigDict,
    seed: int,
    workdir: epath.Path,
    variant: str,
    variants: Sequence[str],
    datasets: Mapping[str, Dataset],
    stage: str,
    profiled: range,
    show_first: Callable[[Results], None] | None,
) -> Results | None:
    """The results of one seed, None where the stage is another than the evaluation."""
    part = f"seed_{seed}" if len(config.seeds) > 1 else ""
    folder = workdir / variant / part
    siblings = [workdir / other / part for other in variants if other != variant]
    stages: dict[str, Callable[[Run], Any]] = dict(stages_of(config))
    if results.is_wanted(config):
        stages[EVALUATE_STAGE] = results.evaluate
    mesh, evaluated = sharding.make_mesh(**config.mesh), None
    whole_config = {"seed": seed, **config.to_dict()}
    config = copy.deepcopy(config)
    config.compute.remat = _remat(config, mesh, stage)
    metrics = Metrics(folder, wandb=config.wandb, config=whole_config, profiled=profiled)
    with contextlib.closing(metrics), contextlib.closing(CompiledAhead()) as ahead:
        if sharding.platform() != "cpu":
            metrics.say(f"compute.remat={config.compute.remat}")
        described = {
            "config.json": whole_config,
            "datasets.json": describe(datasets, folder),
        }
        if not all((folder / name).exists() for name in described):  # for a report meanwhile
            _describe(folder, described)
        made_now: list[bool] = []  # of each model

        def after_model(run: Run, recipe: Recipe, is_new: bool) -> None:
            made_now.append(is_new)
            results.tell_model(run, recipe, is_new)

        run = Run(config, seed, folder, mesh, metrics, datasets, siblings, after_model, ahead)
        if not stage:
            check_unchanged(run)
        after_base = next(name for name in stages if name not in (BASE_NAME, REHEARSAL_STAGE))
        for name, make in stages.items():
            if name == after_base and not stage:
                compile_ahead(run)
            if show_first and name == BASELINES_STAGE and not stage:
                if distributed.agree(results.lacks_baselines(run)):
                    show_first(results.evaluate(run, with_baselines=False))
            if stage in ("", name):
                evaluated = make(run)
                if distributed.preempted():
                    raise distributed.Preempted(f"after stage {name}")
        if made_now and not any(made_now):
            metrics.say(f"{folder}: nothing was trained, as all of its models are there")
    if not stage:  # every one has agreed with this config
        _describe(folder, described)
    return evaluated


def _remat(config: ConfigDict, mesh: Mesh, stage: str) -> str:
    """The meaning of compute.remat on these devices: "auto" is "none" where that fits in every process."""
    if config.compute.remat != "auto":
        return config.compute.remat
    phases = phases_of(config, sharding.platform(), ENOUGH_PAIRS)
    phases = [phase for phase in phases if stage in ("", phase.stage)]
    remat = choose_remat(config.compute.remat, mesh.abstract_mesh, phases, sharding.usable_memory())
    return "none" if distributed.all_are(remat == "none") else "dots"


def _describe(folder: epath.Path, described: Mapping[str, Any]) -> None:
    """Writes {name: content} of JSON files that say what a run is."""
    for name, content in described.items():
        artifacts.write_verified_json(folder / name, content)


def check_config(config: ConfigDict, stage: str = "") -> None:
    """Raises ValueError or FileNotFoundError for all that would fail later and needs no data to be seen.

    Fields, the stage's name, the base's checkpoint, whose architecture the config takes, platform and mesh.
    """
    errors = Errors()
    with errors.of():
        config_checks.validate(config)
    with errors.of():
        check_baselines(config)
    is_valid = not errors.any()
    with errors.of():
        if config.base.checkpoint and not epath.Path(configs.base_checkpoint(config)).exists():
            raise FileNotFoundError(
                f"base.checkpoint={config.base.checkpoint} does not exist: give a .pt file, a folder of "
                "transformers' CLIPModel, a model folder of a run, or a name: hf-hub:OWNER/NAME, or "
                "open_clip:MODEL/TAG, such as open_clip:ViT-B-32/openai"
            )
        if is_valid:
            take_architecture(config)
    if is_valid and stage and stage not in (names := stage_names(config)):
        errors.add(f"{stage!r} is not a stage of this config: choose one of {', '.join(names)}")
    if is_valid and stage != DATA_STAGE:  # which needs no device
        with errors.of():
            mesh = sharding.make_mesh(**config.mesh)
            phases = phases_of(config, sharding.platform(), ENOUGH_PAIRS)
            check_mesh(mesh, [phase for phase in phases if stage in ("", phase.stage)])
    errors.raise_all()


def check_sources(config: ConfigDict, datasets: Mapping[str, Dataset], num_pairs: dict[Dataset, int]) -> None:
    """Raises ValueError or FileNotFoundError for sources, data sets and evaluations that are not there.

    It prepares nothing, so that a wrong path is told before hours of preparation. Process 0 looks: the others
    may not see its files. num_pairs: of data sets that have been looked at, which takes seconds for a folder
    of a million files; it gets those of the others, as of `Dataset.check`.
    """
    others = {name: dataset for name, dataset in datasets.items() if dataset not in num_pairs}

    def check() -> dict[str, int]:
        errors, found = Errors(), {}
        for name, dataset in others.items():
            try:
                found[name] = dataset.check()
            except (ValueError, FileNotFoundError) as error:
                with errors.of(f"data.{name}_split" if isinstance(error, NoSplitError) else f"data.{name}"):
                    raise
        errors.raise_all()
        return found

    errors = Errors()
    if (weights := config.data.weights) and (source := datasets["train"].source):
        if (count := num_sources(source)) != len(weights):
            errors.add(
                f"data.weights={tuple(weights)}: data.train has {count} sources: give a weight for each"
            )
    with errors.of():
        found = distributed.on_main("sources are checked", check)
        num_pairs |= {others[name]: count for name, count in found.items()}
    with errors.of():
        results.check_lines(config, datasets)
    errors.raise_all()


def check_data(config: ConfigDict, datasets: Mapping[str, Dataset], workdir: epath.Path) -> None:
    """Raises ValueError or FileNotFoundError for all that the data rules out: batches and so on.

    workdir: the whole command's.
    """
    errors = Errors()
    records = {name: dataset.open() for name, dataset in datasets.items()}
    for name, of_name in records.items():
        if of_name.image_size:
            with errors.of(f"data.{name}"):
                check_stored_size(of_name.image_size, config.base.architecture.vision.image_size)
    with errors.of():
        if config.router.balance != "released" and not config.data.in_memory:
            _ = records["train"].token_counts  # is not there in data sets of an earlier version
    if config.data.weights:
        with errors.of("data.weights"):
            records["train"].source_sizes(len(config.data.weights))
    with errors.of():
        results.open_evaluations(config, datasets)
    if config.data.rehearsal_captions and not distills(config):
        errors.add(
            "data.rehearsal_captions: nothing distills: set router.rehearsal=distill, or leave it empty"
        )
    if rehearses(config):
        with errors.of():
            distributed.on_main(
                "rehearsal is compared", lambda: check_disjoint(records, workdir), WAIT_SECONDS
            )
    with errors.of():
        check_num_pairs(config, {name: len(of_name) for name, of_name in records.items()})
    errors.raise_all()


def check_num_pairs(config: ConfigDict, num_pairs: Mapping[str, int]) -> None:
    """Raises ValueError for batches, warm-ups and clusters that do not fit data sets of so many pairs."""
    errors = Errors()
    with errors.of():
        check_rehearsal(config, num_pairs)
    with errors.of():
        phases_of(config, sharding.platform(), num_pairs["train"], num_pairs.get("base", 0))
    errors.raise_all()
