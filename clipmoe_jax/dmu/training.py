"""Makes the models of a run by the rows of the recipe table: imported, upcycled, trained."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, sharding, trees
from clipmoe_jax.data import loader, samplers
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import load_array
from clipmoe_jax.dmu import phases, recipes
from clipmoe_jax.dmu.phases import architecture_of, frozen_dtype, loss_config
from clipmoe_jax.dmu.recipe import (
    BASELINES_STAGE,
    CONSOLIDATION,
    REHEARSAL_FOLDER,
    REHEARSAL_STAGE,
    Budget,
    Recipe,
)
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.upcycling import extend_experts, reinitialize_experts, stack_experts
from clipmoe_jax.evaluation.retrieval import RECALL_AT_1, retrieval_features, retrieval_recall
from clipmoe_jax.interop.load import describe, read_architecture, read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, check_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.train.adapters import Adapters, add_adapters, fold_adapters
from clipmoe_jax.train.loop import LoopConfig, Validation, fit
from clipmoe_jax.train.rehearsal import Drawn, Rehearsal, Targets
from clipmoe_jax.train.step import LossConfig

ADAPTED = ("vision/image_size", "text/context_length")  # of a checkpoint to what base.architecture says
EPOCHS = "epochs_of_train"  # in a model's done.json: epochs of the training pairs up to its last step


def model_path(run: Run, name: str) -> epath.Path:
    """Returns the folder of the model that a recipe makes. Raises FileNotFoundError if it is not made yet."""
    recipe = recipes.recipes(run.config)[name]
    return artifacts.require(run.workdir / recipe.folder, recipe.stage)


def inputs_of(run: Run, recipe: Recipe) -> dict:
    """Returns what a recipe's model depends on: fields of the config, and the contents of the data."""
    if recipe.group == "base":
        return run.fields(*recipes.BASE_FIELDS)
    fields = recipes.MOE_FIELDS if recipe.is_moe(run.config) else recipes.STAGE_FIELDS
    of_teacher = inputs_of(run, recipes.recipes(run.config)[recipe.teacher]) if recipe.teacher else {}
    return of_teacher | _fields(run, recipe, fields)


def _fields(run: Run, recipe: Recipe, prefixes: Sequence[str]) -> dict:
    """The fields under these prefixes that a recipe's model depends on, and consolidation's if it does."""
    if CONSOLIDATION in (recipe.section, *recipe.experts(run.config)):
        prefixes = (*prefixes, "consolidation.")
    if recipe.rehearsal in ("pairs", "distill"):
        prefixes = (*prefixes, "router.rehearsal_fraction")
    of_others = () if recipe.group == "moe" else recipes.OF_CLIP_MOE
    settings = run.config.baseline_settings.get(recipe.name, {})
    replaced = [f"{recipe.section}.{field}" for field in settings]
    prefixes = (*prefixes, *(f"baseline_settings.{name}." for name in _lineage(run.config, recipe)))
    fields = run.fields(*prefixes, without=(*recipe.ignores, *of_others, *replaced))
    return {n: recipe.router_stddev(run.config) if n == "moe.router_stddev" else v for n, v in fields.items()}


def _lineage(config: ConfigDict, recipe: Recipe) -> set[str]:
    """The names of a recipe and of all that its model is made from."""
    made = recipes.recipes(config)
    return {recipe.name}.union(*(_lineage(config, made[name]) for name in recipe.experts(config)))


def inputs_of_encoding(run: Run, recipe: Recipe) -> dict:
    """Returns what a model's features of the training pairs depend on."""
    if recipe.group == "base":
        return run.fields(*recipes.FIRST_STAGE_FIELDS)
    return inputs_of(run, recipe)


def inputs_of_upcycling(run: Run, recipe: Recipe) -> dict:
    """Returns what the MoE of a recipe depends on before its training."""
    fields = recipes.UPCYCLED_FIELDS if recipe.group == "moe" else recipes.MOE_FIELDS
    return _fields(run, recipe, fields)


def make_model(run: Run, recipe: Recipe) -> None:
    """Makes the model of a recipe in its folder, unless it is there."""
    if recipe.group == "base":
        is_new = _make_base(run, recipe)
    elif recipe.is_moe(run.config):
        start = artifacts.require(run.workdir / recipe.upcycled_folder, _upcycling_stage(recipe))
        is_new = _train(run, recipe, start)
    else:
        [source] = recipe.experts(run.config)
        is_new = _train(run, recipe, model_path(run, source))
    run.after_model(run, recipe, is_new)


def make_baselines(run: Run) -> None:
    """Makes every model of the baselines that the config names."""
    for recipe in recipes.recipes(run.config).values():
        if recipe.is_baseline:
            if recipe.is_moe(run.config):
                upcycle(run, recipe)
            make_model(run, recipe)


def _upcycling_stage(recipe: Recipe) -> str:
    return BASELINES_STAGE if recipe.is_baseline else "upcycle"


def _make_base(run: Run, recipe: Recipe) -> bool:
    """base/: the checkpoint that the config names, or a CLIP trained from scratch on data.base."""
    architecture = configs.architecture(run.config)

    def build(folder: epath.Path) -> dict:
        if run.config.base.checkpoint:
            params, measured = _import_base(run)
            save_model(folder, architecture, params)
            return measured
        model = run.model(architecture)
        images = jnp.zeros((1, architecture.vision.image_size, architecture.vision.image_size, 3))
        tokens = jnp.zeros((1, run.config.base.architecture.text.context_length), jnp.int32)
        with ThreadPoolExecutor(1) as thread:
            pairs = thread.submit(run.pairs, "base", short_captions=False)  # while initialisation compiles
            params = sharding.init_params(
                run.mesh, lambda key: model.init(key, images, tokens)["params"], jax.random.key(run.seed)
            )
            pairs.result()  # raises what is wrong with them
        section = recipe.hyperparameters(run.config)
        sampler = samplers.ShuffledSampler(len(run.records("base")), section.batch_size, run.seed)
        return _fit(run, recipe, architecture, params, folder, sampler)

    return run.make(run.workdir / recipe.folder, inputs_of(run, recipe), build)


def take_architecture(config: ConfigDict) -> None:
    """Sets the fields of base.architecture that are None, and `moe`, to those of the base's checkpoint, if it
    has one.

    Raises ValueError for a checkpoint of one tower, and naming every other field in which they differ; the
    image's size and the context length are the config's.
    """
    wanted = configs.architecture(config)
    if config.base.checkpoint:
        found = read_architecture(
            configs.base_checkpoint(config),
            activation=config.base.architecture.activation,
            vision_head_width=wanted.vision.head_width,
            text_head_width=wanted.text.head_width if wanted.text else None,
        )
        if found.text is None:
            raise ValueError(
                f"base.checkpoint={config.base.checkpoint} is a {describe(found)}: a base must have both "
                "towers"
            )
    else:
        found = wanted
    known = trees.flatten(found.to_dict())
    for field in configs.OPTIONAL:
        tower, _, name = field.rpartition(".")
        section = config.base.architecture[tower] if tower else config.base.architecture
        if section[name] is None:
            section[name] = known.get(field.replace(".", "/"))  # a vision tower alone has no text
    config.base.architecture.moe = found.moe and ConfigDict(dataclasses.asdict(found.moe))
    has, wants = (trees.flatten(one.to_dict()) for one in (found, configs.architecture(config)))
    differing = [
        f"{name.replace('/', '.')}={has.get(name)!r}, not {wants.get(name)!r}"
        for name in has | wants
        if name not in ADAPTED and has.get(name) != wants.get(name)
    ]
    if differing:
        raise ValueError(
            f"base.checkpoint={config.base.checkpoint} does not fit base.architecture: it has "
            f"{'; '.join(differing)}: set these fields to what it has, or give another checkpoint"
        )


def _import_base(run: Run) -> tuple[dict, dict]:
    architecture, checkpoint = configs.architecture(run.config), configs.base_checkpoint(run.config)
    loaded = read_model(
        checkpoint,
        activation=architecture.activation,
        vision_head_width=architecture.vision.head_width,
        text_head_width=architecture.text.head_width if architecture.text else None,
        context_length=run.config.base.architecture.text.context_length,
        image_size=architecture.vision.image_size,
        place=functools.partial(sharding.put_param, run.mesh),
    )
    if loaded.config.text is None:
        raise ValueError(f"base.checkpoint={checkpoint} is a {loaded.source}; the base must have both towers")
    shapes = {name: leaf.shape for name, leaf in trees.flatten(loaded.params).items()}
    check_params(architecture, shapes, f"base.checkpoint={checkpoint} ({loaded.source})")
    if loaded.config != architecture:  # same shapes, another meaning: activation, head width, eps
        has, wants = (trees.flatten(c.to_dict()) for c in (loaded.config, architecture))
        name = next(name for name in has if has[name] != wants[name])
        raise ValueError(
            f"base.checkpoint={checkpoint} has {name}={has[name]!r} and base.architecture says "
            f"{wants[name]!r}"
        )
    params = loaded.params
    if run.config.base.logit_scale:
        logit_scale = np.asarray(math.log(run.config.base.logit_scale), np.float32)
        params["logit_scale"] = sharding.put_replicated(run.mesh, logit_scale)
    return params, {"source": loaded.source}


def upcycle(run: Run, recipe: Recipe) -> None:
    """Writes the MoE of a recipe before its training: layers of experts stacked, routers random."""
    paths = [model_path(run, name) for name in recipe.experts(run.config)]

    def build(folder: epath.Path) -> dict:
        architecture = architecture_of(run.config, recipe)
        moe = architecture.moe
        assert moe is not None  # it is stacked from several models
        key = jax.random.fold_in(jax.random.key(run.seed), len(paths))
        place = functools.partial(sharding.param_shardings, run.mesh)
        stddev = recipe.router_stddev(run.config)
        if recipe.extends(run.config):
            config, base = run.load(paths[0])
            added = [run.load(path)[1] for path in paths[1:]]
            params = extend_experts(base, config, added, key, router_stddev=stddev, place=place)
        else:
            loaded = {path: run.load_dense(path)[1] for path in dict.fromkeys(paths)}
            params = stack_experts(
                [loaded[path] for path in paths],
                key,
                num_moe_layers=moe.num_moe_layers,
                expert_layers=moe.expert_layers,
                sequence_share=moe.sequence_share,
                router_stddev=stddev,
                place=place,
            )
        if recipe.reinitialize:
            params = reinitialize_experts(params, jax.random.fold_in(key, 1), place=place)
        save_model(folder, architecture, params)
        return {
            "parameters": trees.count_parameters(params),
            "active_parameters": count_active_parameters(params, architecture),
        }

    run.make(run.workdir / recipe.upcycled_folder, inputs_of_upcycling(run, recipe), build)


def _train(run: Run, recipe: Recipe, start: epath.Path) -> bool:
    """Trains a recipe's model from the one in the folder `start`, unless it is there."""
    inputs, num_steps = inputs_of(run, recipe), None
    if recipe.num_steps is not None:
        num_steps = recipe.num_steps(budget_of(run), recipe)
        phases.check_steps(run.config, recipe, num_steps)
        inputs |= {"num_steps": num_steps}
    clusters = None
    if recipe.sampler == "clusters":
        folder = run.workdir / f"stage_{recipe.number}" / "clusters"
        clusters = artifacts.require(folder, f"cluster_{recipe.number}")

    def build(folder: epath.Path) -> dict:
        section = recipe.hyperparameters(run.config)
        report: dict[str, int] = {}
        if clusters is None:
            sampler = shuffled(run, recipe)
        else:
            sampler = samplers.ClusterSampler(
                ClusterIndex.open(clusters),
                section.batch_size,
                run.seed,
                labels_per_stage=run.config.cluster.num_clusters**2,
                small_clusters=section.small_clusters,
                shares=_shares(run),
            )
            report = sampler.report()
        load = run.load if recipe.is_moe(run.config) else run.load_dense
        architecture, params = load(start)
        return _fit(run, recipe, architecture, params, folder, sampler, num_steps) | report

    return run.make(run.workdir / recipe.folder, inputs, build)


def shuffled(run: Run, recipe: Recipe) -> samplers.ShuffledSampler:
    """Returns what draws ordinary batches of the training pairs for a recipe's phase."""
    batch_size = recipe.hyperparameters(run.config).batch_size
    return samplers.ShuffledSampler(len(run.records("train")), batch_size, run.seed, _shares(run))


def _shares(run: Run) -> samplers.Shares | None:
    """The shares in which phases draw from the sources of data.train, None for every pair once an epoch."""
    weights = run.config.data.weights
    if not weights:
        return None
    sizes = run.once("sizes of sources", lambda: run.records("train").source_sizes(len(weights)))
    return samplers.Shares(sizes, weights)


def budget_of(run: Run) -> Budget:
    """Returns what the models of a run took, as far as they are made."""

    def steps(name: str) -> int:
        return artifacts.measured(model_path(run, name))["num_steps"]

    return phases.budget(run.config, steps, len(run.records("train")))


def settings_of(
    run: Run,
    recipe: Recipe,
    architecture: ClipConfig,
    sampler: loader.Sampler,
    num_steps: int | None = None,
    read: Callable[[epath.Path], Any] = load_array,
) -> dict[str, Any]:
    """Returns those arguments of `fit` on which a recipe's steps depend, but params and their types.

    read: returns what is in a file of targets.
    """
    config, loss = run.config, loss_config(run.config, recipe)
    phase = configs.phase_config(recipe.hyperparameters(config))
    if num_steps is not None:
        phase = dataclasses.replace(phase, num_steps=num_steps)
    data = "base" if recipe.group == "base" else "train"
    return dict(
        model=Clip(architecture, phases.compute_of(config, recipe, sharding.platform())),
        trainable_rules=recipe.rules(config),
        pairs=run.pairs(data, short_captions=loss.short_caption_weight > 0),
        sampler=sampler,
        phase=phase,
        loss=loss,
        mesh=run.mesh,
        rehearsal=_rehearsal(run, recipe, loss, read),
    )


def _fit(
    run: Run,
    recipe: Recipe,
    architecture: ClipConfig,
    params: dict[str, Any],
    folder: epath.Path,
    sampler: loader.Sampler,
    num_steps: int | None = None,
) -> dict:
    """Trains what the recipe says; writes the model to `folder`, beside its checkpoints."""
    config, first_epoch = run.config, _epochs_before(run, recipe)
    settings = settings_of(run, recipe, architecture, sampler, num_steps)
    if any(adapters := recipe.adapters(config)):
        params = _with_adapters(run, adapters, params)
    params, measured = fit(
        recipe.name,
        params=params,
        caption_turns=loader.CaptionTurns(run.seed, first_epoch),
        seed=run.seed,
        metrics=run.metrics,
        loop=LoopConfig(
            checkpoints=folder / artifacts.CHECKPOINTS,
            checkpoint_every=config.checkpoint.every_steps,
            max_to_keep=config.checkpoint.max_to_keep,
            log_every=config.log_every,
            num_workers=config.data.num_workers,
            frozen_dtype=frozen_dtype(config, settings["model"].compute),
        ),
        teacher=run.load(model_path(run, recipe.teacher))[1] if recipe.teacher else None,
        validation=_validation(run, recipe, architecture, folder),
        **settings,
    )
    save_model(folder, architecture, jax.jit(fold_adapters)(params) if any(adapters) else params)
    if recipe.group != "base":
        num_steps, rehearsal = int(measured["num_steps"]), settings["rehearsal"]
        own_steps = num_steps - (rehearsal.before(num_steps) if rehearsal else 0)
        measured[EPOCHS] = first_epoch + math.ceil(own_steps / sampler.num_steps)
    return measured


def _validation(run: Run, recipe: Recipe, architecture: ClipConfig, folder: epath.Path) -> Validation | None:
    """The measuring of a recipe's phase while it trains, if the config asks for it."""
    settings = run.config.validation
    if not settings.every_steps or recipe.group == "base":
        return None

    def measure(params: dict[str, Any]) -> dict[str, float]:
        if any(recipe.adapters(run.config)):
            params = jax.jit(fold_adapters)(params)
        subject = run.subject(run.encoder_of(architecture, params))
        records, captions = run.records("validation"), run.captions("validation")
        recall = retrieval_recall(*retrieval_features(subject, records, captions))
        return {name: recall[name] for name in RECALL_AT_1}

    best = folder / artifacts.CHECKPOINTS / "best" if settings.keep_best else None
    return Validation(settings.every_steps, measure, best)


def _with_adapters(run: Run, adapters: Adapters, params: dict[str, Any]) -> dict[str, Any]:
    """The params with adapters; low-rank ones are drawn by the seed alone."""
    leaves = trees.flatten(params)

    def changed(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        added = add_adapters(trees.unflatten(leaves), jax.random.key(run.seed), adapters)
        return {
            name: leaf
            for name, leaf in trees.flatten(added).items()
            if name not in leaves or leaf.shape != leaves[name].shape
        }

    where = sharding.param_shardings(run.mesh, trees.unflatten(jax.eval_shape(changed, leaves)))
    return trees.unflatten(leaves | jax.jit(changed, out_shardings=trees.flatten(where))(leaves))


def rehearsal_datasets(run: Run) -> tuple[str, str]:
    """Returns the names of the data sets that images and captions of a rehearsal that distills come from."""
    return "rehearsal", "rehearsal_captions" if "rehearsal_captions" in run.datasets else "rehearsal"


def _rehearsal(
    run: Run, recipe: Recipe, loss: LossConfig, read: Callable[[epath.Path], Any]
) -> Rehearsal | None:
    """The rehearsal of a recipe's phase, if it has one."""
    section = recipe.hyperparameters(run.config)
    fraction, kind = recipe.rehearsal_of(run.config)
    if not fraction:
        return None

    def drawn(name: str, seed: int) -> Drawn:
        pairs = run.pairs(name, short_captions=kind == "pairs" and loss.short_caption_weight > 0)
        return Drawn(pairs, samplers.ShuffledSampler(len(pairs), section.batch_size, seed))

    if kind == "pairs":
        return Rehearsal(drawn("rehearsal", run.seed), fraction, loss)
    images, captions = rehearsal_datasets(run)
    others = drawn(captions, run.seed + 1) if captions != images else None
    if recipe.teacher:
        return Rehearsal(drawn(images, run.seed), fraction, loss, captions=others)
    imitates = "features" if loss.imitates == "features" else "similarities"
    folder = artifacts.require(run.workdir / REHEARSAL_FOLDER, REHEARSAL_STAGE)
    loss = dataclasses.replace(loss, imitates=imitates, teacher=None, short_caption_weight=0.0)
    targets = Targets(read(folder / "image.npy"), read(folder / "text.npy"))
    return Rehearsal(drawn(images, run.seed), fraction, loss, targets, others)


def _epochs_before(run: Run, recipe: Recipe) -> int:
    """Returns how many epochs of the training pairs the run has seen when a recipe's phase begins.

    Stages follow each other whatever they start from; a baseline follows the models that it is made from.
    """
    if recipe.is_baseline:
        earlier = recipe.experts(run.config)
    else:
        names = [row.name for row in recipes.recipes(run.config).values() if row.group in ("stage", "moe")]
        earlier = names[: names.index(recipe.name)] if recipe.name in names else ()
    return max((artifacts.measured(model_path(run, name)).get(EPOCHS, 0) for name in earlier), default=0)
