"""The recipe table: how every model of a run is made, from what, by which losses and for how long.

One row is one model. The runner makes it, the plan predicts it, evaluation, tables and report show it; a
further baseline or stage is a further row here and nothing elsewhere. Recipes of baselines follow their
papers in what trains and by which losses. Data, batches and learning rates are the run's own, so that rows
compare; `config.baseline_settings` changes those of one baseline.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.dmu.recipe import (
    BASE_NAME,
    CLIP_MOE,
    CONSOLIDATION,
    ROUTER_NAME,
    TRAIN_ADAPTERS,
    TRAIN_EVERYTHING,
    TRAIN_FFN,
    TRAIN_MOE,
    TRAIN_ROUTERS,
    TRAIN_TOWERS,
    Budget,
    Cost,
    Recipe,
    base_and_stages,
    base_copies,
    chosen_experts,
    from_base,
    from_nothing,
    last_stage,
)
from clipmoe_jax.models.transformer import MoeConfig

ADAPTER_RANK = 8
BALANCE_COEFFICIENT = 0.01  # the paper's, where the config has none
Z_LOSS_COEFFICIENT = 1e-3  # ST-MoE's (arXiv 2202.08906), where the config has none

# Config fields, by prefix, that an artifact depends on.
BASE_FIELDS = ("base.", "compute.dtype", "data.max_caption_tokens")
FIRST_STAGE_FIELDS = (*BASE_FIELDS, "data.train")
STAGE_FIELDS = (
    *FIRST_STAGE_FIELDS,
    *("cluster.", "mcl.", "loss.", "compute.frozen_dtype", "moe.expert_layers"),
    *("data.weights", "validation."),
)
ROUTING_FIELDS = ("moe.routing", "moe.sequence_share")  # of the CLIP-MoE alone; baselines route by token
OF_CLIP_MOE = (*ROUTING_FIELDS, "router.loss", "router.gradient")
UPCYCLED_FIELDS = (
    *(*STAGE_FIELDS, *ROUTING_FIELDS),
    *("moe.experts", "moe.num_selected_experts", "moe.num_moe_layers", "moe.router_stddev"),
)
MOE_FIELDS = (*STAGE_FIELDS, "moe.", "router.")
# Some of these fields change nothing: a stage does not depend on how many stages follow it, and a model that
# trains on ordinary batches from the base does not depend on how stages start and cluster.
STAGE_COUNT = ("mcl.num_stages",)
STAGES_ALONE = ("mcl.init_from", "mcl.small_clusters", "cluster.num_clusters", "cluster.max_fit_pairs")


def cost_of(budget: Budget, names: Sequence[str]) -> Cost:
    """Returns the cost of the models of these names and of all that they are made from, each once."""
    made, waiting = recipes(budget.config), list(names)
    pairs, flops, seen = 0, 0.0, {BASE_NAME}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        recipe = made[name]
        waiting += recipe.experts(budget.config)
        if recipe.teacher:
            waiting.append(recipe.teacher)
        if recipe.group == "ensemble":
            continue
        own = budget.steps(name) * recipe.hyperparameters(budget.config).batch_size
        pairs, flops = pairs + own, flops + own * budget.flops_of_pair(name)
        if recipe.sampler == "clusters":
            flops += budget.flops_of_encoding
            if recipe.group == "stage" and recipe.number > 1:
                waiting.append(f"mcl_{recipe.number - 1}")  # whose features it clusters
    return Cost(pairs, flops)


def one_stage(budget: Budget, recipe: Recipe) -> int:
    """Returns the steps of the first stage."""
    del recipe
    return budget.steps("mcl_1")


def same_pairs(budget: Budget, recipe: Recipe) -> int:
    """Returns the steps with which a model has seen as many pairs as the CLIP-MoE and all it is made from."""
    left = cost_of(budget, [ROUTER_NAME]).pairs - cost_of(budget, recipe.experts(budget.config)).pairs
    return math.ceil(left / recipe.hyperparameters(budget.config).batch_size)


def same_flops(budget: Budget, recipe: Recipe) -> int:
    """Returns the most steps with which a model takes no more FLOPs than the CLIP-MoE."""
    left = cost_of(budget, [ROUTER_NAME]).flops - cost_of(budget, recipe.experts(budget.config)).flops
    of_step = recipe.hyperparameters(budget.config).batch_size * budget.flops_of_pair(recipe.name)
    return math.floor(left / of_step)


def rehearses(config: ConfigDict) -> bool:
    """Returns whether some phase rehearses what the base knew."""
    return any(config[section].rehearsal_fraction for section in configs.FINE_TUNING_SECTIONS)


def distills(config: ConfigDict) -> bool:
    """Returns whether some model of a config rehearses by distillation."""
    return any(_distills(row, config) for row in recipes(config).values())


def imitates_base(config: ConfigDict) -> bool:
    """Returns whether some model rehearses by distillation from the base, and not from a teacher."""
    return any(_distills(row, config) and not row.teacher for row in recipes(config).values())


def _distills(row: Recipe, config: ConfigDict) -> bool:
    fraction, kind = row.rehearsal_of(config) if row.trains else (0.0, "")
    return bool(fraction) and kind == "distill"


def mcl_recipe(number: int, start: str) -> Recipe:
    """Returns the row of an MCL stage (arXiv 2409.19291, section 3.1). start: the model that it trains."""
    return Recipe(
        f"mcl_{number}",
        f"stage {number} alone",
        "stage",
        lambda config: (start,),
        TRAIN_FFN,
        sampler="clusters",
        # The first stage starts from the base either way.
        ignores=(*STAGE_COUNT, *(("mcl.init_from",) if number == 1 else ())),
        number=number,
    )


def _mcl_recipes(config: ConfigDict) -> list[Recipe]:
    chained = config.mcl.init_from == "previous"
    numbers = range(1, config.mcl.num_stages + 1)
    return [mcl_recipe(n, f"mcl_{n - 1}" if chained and n > 1 else BASE_NAME) for n in numbers]


def _consolidation(config: ConfigDict) -> list[Recipe]:
    """Hard clusters, then all pairs: a curriculum whose result is a dense model of its own."""
    return [CONSOLIDATED] if configs.consolidates(config) else []


BASE = Recipe(BASE_NAME, "base", "base", from_nothing, TRAIN_EVERYTHING, "base.train")
CONSOLIDATED = Recipe(CONSOLIDATION, "dense curriculum", "stage", last_stage, TRAIN_FFN, CONSOLIDATION)
ROUTERS = Recipe(ROUTER_NAME, CLIP_MOE, "moe", chosen_experts, TRAIN_ROUTERS, "router")

# An MoE of copies of the base, routers and experts trained (arXiv 2212.05055).
SPARSE_UPCYCLING = Recipe(
    "sparse_upcycling", "sparse upcycling", "baseline", base_copies, TRAIN_MOE, ignores=STAGES_ALONE
)
DROP_UPCYCLING = dataclasses.replace(
    SPARSE_UPCYCLING, name="drop_upcycling", title="Drop-Upcycling", reinitialize=True
)

# In the order they run; a function gives the rows that depend on the config.
Rows = Recipe | Callable[[ConfigDict], list[Recipe]]
STAGES: Sequence[Rows] = (BASE, _mcl_recipes, _consolidation, ROUTERS)

ORDINARY = (*STAGE_COUNT, *STAGES_ALONE)  # ignored by a dense model that trains on ordinary batches
OF_NO_EXPERTS = (*ORDINARY, "moe.expert_layers")  # and by one that trains the same whatever experts are


def _rehearsed_stages(config: ConfigDict) -> list[Recipe]:
    """The MCL stages with rehearsal in each, on the clusters of those without, whose cost is not counted."""
    rows: list[Recipe] = []
    for n in range(1, config.mcl.num_stages + 1):
        chained = config.mcl.init_from == "previous" and rows
        row = mcl_recipe(n, rows[-1].name if chained else BASE_NAME)
        rows.append(dataclasses.replace(row, name=f"rehearsed_{n}", group="part", rehearsal="pairs"))
    return rows


def _controls() -> list[Recipe]:
    """Models that cost as much as the CLIP-MoE: by pairs, and by FLOPs.

    Dense ones, from the base on ordinary batches, or from the last stage (the dense curriculum); plain, and
    with what there is against forgetting: rehearsal of the base's pairs, or of its similarities ("distilled":
    learning without forgetting, arXiv 1606.09282). And mixtures of copies of the base.
    """
    rehearsals = {"": "none", "_rehearsed": "pairs", "_distilled": "distill"}
    curriculum = Recipe("curriculum", "dense curriculum", "baseline", last_stage, TRAIN_FFN, CONSOLIDATION)
    direct = Recipe("direct_ft", "direct fine-tuning", "baseline", from_base, TRAIN_FFN, ignores=ORDINARY)
    full = dataclasses.replace(
        direct,
        name="full_ft",
        title="full fine-tuning",
        trains=TRAIN_EVERYTHING,
        ignores=OF_NO_EXPERTS,
    )
    lora = dataclasses.replace(
        full, name="lora", title="LoRA", trains=TRAIN_ADAPTERS, adapter_rank=ADAPTER_RANK
    )
    rows = [
        dataclasses.replace(
            row,
            name=row.name + suffix,
            title=row.title + suffix.replace("_", ", "),
            rehearsal=rehearsals[suffix],
        )
        for row, suffixes in (
            (direct, ("", "_rehearsed")),
            (full, ("", "_rehearsed")),
            (lora, ("", "_rehearsed")),
            (curriculum, ("", "_rehearsed", "_distilled")),
        )
        for suffix in suffixes
    ]
    rows.append(
        dataclasses.replace(
            curriculum,
            name="curriculum_rehearsed_throughout",
            title="dense curriculum, rehearsed throughout",
            experts=lambda config: (f"rehearsed_{config.mcl.num_stages}",),
            rehearsal="pairs",
            parts=_rehearsed_stages,
        )
    )
    rows += [dataclasses.replace(row, rehearsal="none") for row in (SPARSE_UPCYCLING, DROP_UPCYCLING)]
    budgets = {"pairs": ("same total pairs", same_pairs), "flops": ("same FLOPs", same_flops)}
    return [
        dataclasses.replace(
            row, name=f"{row.name}_same_{budget}", title=f"{row.title}, {of_title}", num_steps=num_steps
        )
        for row in rows
        for budget, (of_title, num_steps) in budgets.items()
    ]


CONTROLS = _controls()

# In the order of the tables. Where every parameter trains, logit_scale does too, as in Long-CLIP's code.
# Blocks that have experts are those of `moe.num_moe_layers` for all.
BASELINES: Sequence[Recipe] = (
    # The base's feed-forward layers on ordinary batches.
    Recipe(
        "direct_ft",
        "direct fine-tuning, one stage's steps",
        "baseline",
        from_base,
        TRAIN_FFN,
        num_steps=one_stage,
        ignores=ORDINARY,
    ),
    *CONTROLS,
    Recipe(
        "full_ft",
        "full fine-tuning, one stage's steps",
        "baseline",
        from_base,
        TRAIN_EVERYTHING,
        num_steps=one_stage,
        ignores=OF_NO_EXPERTS,
    ),
    # Full fine-tuning with Long-CLIP's second loss, of short captions (arXiv 2403.15378).
    Recipe(
        "long_clip",
        "Long-CLIP's recipe",
        "baseline",
        from_base,
        TRAIN_EVERYTHING,
        num_steps=one_stage,
        losses=lambda config: {"short_caption_weight": config.loss.short_caption_weight or 1.0},
        ignores=OF_NO_EXPERTS,
    ),
    SPARSE_UPCYCLING,
    DROP_UPCYCLING,
    # Sparse upcycling with every parameter trained and the routers' z-loss (arXiv 2502.00965).
    Recipe(
        "clip_up",
        "CLIP-UP's recipe",
        "baseline",
        base_copies,
        TRAIN_EVERYTHING,
        losses=lambda config: {"z_loss_coefficient": config.router.z_loss_coefficient or Z_LOSS_COEFFICIENT},
        ignores=STAGES_ALONE,
    ),
    # Upcycling without the stages: an MoE of the base and one fine-tuned model, routers trained.
    Recipe(
        "base_ft_moe",
        "base + FT MoE",
        "baseline",
        lambda config: (BASE_NAME, "direct_ft"),
        TRAIN_ROUTERS,
        "router",
    ),
    # The CLIP-MoE of the paper beside the config's own: the base and every stage, routers that see a token.
    Recipe(
        "published_moe",
        "CLIP-MoE as published",
        "baseline",
        base_and_stages,
        TRAIN_ROUTERS,
        "router",
        losses=lambda config: {
            "balance_coefficient": config.router.balance_coefficient or BALANCE_COEFFICIENT
        },
        rehearsal="none",
        ignores=("moe.experts", "router.rehearsal_fraction", "router.rehearsal"),
    ),
    # The CLIP-MoE distilled into a dense model, which any program loads. `logit_scale` multiplies the loss,
    # and would fall if it trained.
    Recipe(
        "distilled",
        "dense, distilled from CLIP-MoE",
        "baseline",
        from_base,
        TRAIN_TOWERS,
        rehearsal="distill",
        rehearsal_share=0.5,
        teacher=ROUTER_NAME,
    ),
    # Several dense models, features side by side: as many times the encoding.
    Recipe("feature_ensemble", "feature ensemble", "ensemble", base_and_stages),
    Recipe(
        "base_curriculum_ensemble",
        "feature ensemble of base and dense curriculum",
        "ensemble",
        lambda config: (BASE_NAME, CONSOLIDATION),
    ),
    Recipe(
        "base_rehearsed_ensemble",
        "feature ensemble of base and rehearsed curriculum",
        "ensemble",
        lambda config: (BASE_NAME, "curriculum_rehearsed_same_pairs"),
    ),
)


# Those that papers compare with, for a run of the published recipe.
OF_PAPERS = (
    *("direct_ft", "direct_ft_same_pairs", "full_ft", "long_clip", "sparse_upcycling", "drop_upcycling"),
    *("clip_up", "base_ft_moe", "feature_ensemble"),
)


def check_baselines(config: ConfigDict) -> None:
    """Raises ValueError naming the baselines that there are not, or that lack what they are made from."""
    known, errors = {row.name: row for row in BASELINES}, Errors()
    for name in config.baselines:
        if name not in known:
            errors.add(f"baselines={name!r}: choose one of {', '.join(known)}")
            continue
        row = known[name]
        for needed in row.experts(config):
            if needed in known and needed not in config.baselines:
                errors.add(f"baselines: {name!r} is made from {needed!r}: add it")
        if CONSOLIDATION in (row.section, *row.experts(config)) and not configs.consolidates(config):
            errors.add(f"baselines: {name!r} needs consolidation: set consolidation.num_epochs or .num_steps")
        if name == "published_moe" and config.moe.expert_layers != "feed_forward":
            errors.add(f"baselines: {name!r} is of feed-forward layers: set moe.expert_layers=feed_forward")
        as_routers = row.rehearsal in ("pairs", "distill") and not row.rehearsal_share
        if as_routers and not config.router.rehearsal_fraction:
            errors.add(
                f"baselines: {name!r} rehearses as often as the routers do: set router.rehearsal_fraction"
            )
    for name, settings in config.baseline_settings.items():
        row = known.get(name)  # one that the run leaves out is no fault: `--config.baselines="()"`
        if row is None or not row.trains:
            trained = ", ".join(row.name for row in BASELINES if row.trains)
            errors.add(f"baseline_settings.{name}: no baseline {name!r} trains: choose one of {trained}")
        elif row.num_steps and (fixed := {"num_steps", "num_epochs"}.intersection(settings)):
            errors.add(f"baseline_settings.{name}.{fixed.pop()}: the length follows from other models'")
    errors.raise_all()


def recipes(config: ConfigDict) -> dict[str, Recipe]:
    """Returns {name: recipe} of what a config makes, each after those it is made from.

    Raises ValueError as `check_baselines` and `config_checks.check_selected` do, and naming an expert that no
    stage makes, a blend of what is no dense model, and what does not go with a base that is an MoE.
    """
    check_baselines(config)
    config_checks.check_selected(config)
    stages = [row for rows in STAGES for row in ([rows] if isinstance(rows, Recipe) else rows(config))]
    names = [row.name for row in stages if row.group != "moe"]
    for expert in chosen_experts(config):
        if expert not in names:
            raise ValueError(
                f"moe.experts: {expert!r} is not made: choose among last_stage, {', '.join(names)}"
            )
    if configs.extends(config):
        _check_extension(config)
    wanted = [part for row in BASELINES if row.name in config.baselines for part in (*row.parts(config), row)]
    made = {row.name: row for row in [*stages, *_in_order(wanted, config)]}
    dense = [
        name
        for name, row in made.items()
        if row.group in ("stage", "baseline") and row.trains and not row.is_moe(config)
    ]
    for name in config.blends:
        if name not in dense:
            choices = ", ".join(dense)
            raise ValueError(f"blends: {name!r} is no dense model of this run: choose among {choices}")
    return made


def _check_extension(config: ConfigDict) -> None:
    """Raises ValueError for all that does not go with a base that is an MoE."""
    errors, base = Errors(), MoeConfig(**config.base.architecture.moe)
    routing = f"token_and_sequence moe.sequence_share={base.sequence_share:g}"
    settings = {
        "num_selected_experts": str(base.num_selected_experts),
        "num_moe_layers": str(base.num_moe_layers or 0),
        "expert_layers": base.expert_layers,
        "routing": routing if base.sequence_share else "token",
    }
    wanted = configs.moe_config(config)
    for field, setting in settings.items():
        of_moe = "sequence_share" if field == "routing" else field
        if getattr(base, of_moe) != getattr(wanted, of_moe):
            errors.add(
                f"moe.{field}={config.moe[field]}: the base is a CLIP-MoE of another kind: set "
                f"moe.{field}={setting}"
            )
    named = chosen_experts(config)
    if named[0] != BASE_NAME or BASE_NAME in named[1:] or len(named) == 1:
        errors.add(
            f"moe.experts={named}: the base is a CLIP-MoE, whose experts come first and once: name 'base', "
            "then what is added"
        )
    if config.base.expert >= base.num_experts:
        errors.add(
            f"base.expert={config.base.expert} is none of the base's: choose one of 0 to "
            f"{base.num_experts - 1}"
        )
    if config.blends:
        errors.add("blends: the base is a CLIP-MoE, which has no single weights to average: leave it empty")
    for row in BASELINES:
        experts = row.experts(config)
        if row.name in config.baselines and row.is_moe(config) and {*experts} != {experts[0]}:
            errors.add(
                f"baselines: {row.name!r} has the base as one expert, and it is a CLIP-MoE: leave it out"
            )
    errors.raise_all()


def _in_order(rows: Sequence[Recipe], config: ConfigDict) -> list[Recipe]:
    """The rows, each behind those among them that it is made from."""
    names, ordered = {row.name for row in rows}, []
    waiting = list(rows)
    while waiting:
        ready = {row.name for row in ordered}
        row = next(row for row in waiting if names.intersection(row.experts(config)) <= ready)
        waiting.remove(row)
        ordered.append(row)
    return ordered


def table_rows(config: ConfigDict) -> list[Recipe]:
    """Returns the recipes in the order of tables: base, baselines, stages, ensemble, CLIP-MoE."""
    made = recipes(config)
    stages = [row for row in made.values() if row.group == "stage"]
    wanted = [row for row in BASELINES if row.name in made]
    return [
        made[BASE_NAME],
        *(row for row in wanted if row.group == "baseline"),
        *stages,
        *(row for row in wanted if row.group == "ensemble"),
        *(row for row in made.values() if row.group == "moe"),
    ]


def find_recipe(name: str) -> Recipe | None:
    """Returns the row of a phase's name, whatever config made it; None for one that there is not."""
    if match := re.fullmatch(r"mcl_(\d+)", name):
        return mcl_recipe(int(match[1]), BASE_NAME)
    rows = [row for row in (*STAGES, CONSOLIDATED, *BASELINES) if isinstance(row, Recipe)]
    return next((row for row in rows if row.name == name), None)


def title_of_folder(folder: str) -> str | None:
    """Returns the title of the model in a folder of a workdir, "moe/params"; None if no row makes that."""
    if match := re.fullmatch(r"stage_(\d+)/params", folder):
        return mcl_recipe(int(match[1]), BASE_NAME).title
    rows = [row for row in (*STAGES, CONSOLIDATED, *BASELINES) if isinstance(row, Recipe)]
    return next((row.title for row in rows if row.folder == folder), None)
