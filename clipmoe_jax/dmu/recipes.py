"""The recipe table: how every model of a run is made, from what, by which losses and for how long.

One row is one model. The runner makes it, the plan predicts it, evaluation, tables and report show it; a
further baseline or stage is a further row here and nothing elsewhere. Recipes of baselines follow their
papers in what trains and by which losses. Data, batches and learning rates are the run's own, so that rows
compare.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import trees
from clipmoe_jax.core.errors import Errors

TRAIN_EVERYTHING = [(r".*", True)]
TRAIN_FFN = [(r"(visual|text)/resblocks_\d+/mlp/.*", True), (r".*", False)]
TRAIN_ROUTERS = [(r".*/moe/router/kernel", True), (r".*", False)]
TRAIN_MOE = [(r".*/moe/.*", True), (r".*", False)]

Results = dict[str, dict[str, Any]]  # {title of a model: its numbers}, as eval/results.json holds them

BASE_NAME, ROUTER_NAME, CLIP_MOE = "base", "router", "CLIP-MoE"
CONSOLIDATION = "consolidation"
REHEARSAL_FOLDER = "rehearsal/features"
Z_LOSS_COEFFICIENT = 1e-3  # ST-MoE's (arXiv 2202.08906), where the config has none

# Config fields, by prefix, that an artifact depends on.
BASE_FIELDS = ("base.", "compute.dtype", "data.max_caption_tokens")
FIRST_STAGE_FIELDS = (*BASE_FIELDS, "data.train")
STAGE_FIELDS = (*FIRST_STAGE_FIELDS, "cluster.", "mcl.", "loss.", "compute.frozen_dtype")
ROUTING_FIELDS = ("moe.routing", "moe.sequence_share")  # of the CLIP-MoE alone; baselines route by token
UPCYCLED_FIELDS = (
    *(*STAGE_FIELDS, *ROUTING_FIELDS),
    *("moe.experts", "moe.num_selected_experts", "moe.num_moe_layers", "moe.router_stddev"),
)
MOE_FIELDS = (*STAGE_FIELDS, "moe.", "router.")
# Some of these fields change nothing: a stage does not depend on how many stages follow it, and a model that
# trains on ordinary batches from the base does not depend on how stages start and cluster.
STAGE_COUNT = ("mcl.num_stages",)
STAGES_ALONE = ("mcl.init_from", "mcl.small_clusters", "cluster.num_clusters", "cluster.max_fit_pairs")


class StepCounts(NamedTuple):
    """Steps that stages take. steps: from a stage's name to its steps, as made or as planned."""

    config: ConfigDict
    steps: Callable[[str], int]


def one_stage(counts: StepCounts) -> int:
    """Returns the steps of the first stage."""
    return counts.steps("mcl_1")


def same_pairs(counts: StepCounts) -> int:
    """Returns the steps of `mcl.batch_size` that see as many pairs as all stages and the routers together."""
    config = counts.config
    pairs = counts.steps(ROUTER_NAME) * config.router.batch_size
    for stage in range(1, config.mcl.num_stages + 1):
        pairs += counts.steps(f"mcl_{stage}") * config.mcl.batch_size
    if configs.consolidates(config):
        pairs += counts.steps(CONSOLIDATION) * config.consolidation.batch_size
    return math.ceil(pairs / config.mcl.batch_size)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table: the making of one model.

    Attributes:
        name: of its phase in metrics and, but for baselines, of the stage that trains it.
        title: of its row in tables.
        group: where it belongs in tables and reports; a "baseline" is made if `config.baselines` names it. An
            "ensemble" trains nothing: its features are those of `experts`, joined.
        experts: names of the models it is made from, given the config. One is trained as it is; the
            feed-forward layers of several become the experts of an MoE with random routers. None at all: the
            base, imported or initialised.
        trains: rules of what trains.
        section: the group of config fields with its hyperparameters.
        sampler: "clusters" draws each batch from one cluster of what the model before encodes.
        num_steps: None is as long as the section says.
        losses: fields of `train.step.LossConfig` that differ from the config's, given the config.
        reinitialize: whether half of each expert's hidden units are drawn anew (arXiv 2502.19261).
        ignores: config fields that change nothing in it, though its inputs name their group.
        number: of an MCL stage, from 1; 0 for all others.
    """

    name: str
    title: str
    group: Literal["base", "baseline", "stage", "ensemble", "moe"]
    experts: Callable[[ConfigDict], tuple[str, ...]]
    trains: trees.Rules = ()
    section: str = "mcl"
    sampler: Literal["shuffled", "clusters"] = "shuffled"
    num_steps: Callable[[StepCounts], int] | None = None
    losses: Callable[[ConfigDict], Mapping[str, float]] = lambda config: {}
    reinitialize: bool = False
    ignores: tuple[str, ...] = ()
    number: int = 0

    @property
    def stage(self) -> str:
        """Returns the name of the stage that makes it; all baselines are one."""
        return "baselines" if self.group == "baseline" else self.name

    @property
    def folder(self) -> str:
        """Returns its model folder in the workdir."""
        if self.group == "baseline":
            return f"baselines/{self.name}"
        if self.number:
            return f"stage_{self.number}/params"
        folders = {BASE_NAME: "base", ROUTER_NAME: "moe/params", CONSOLIDATION: "dense/params"}
        return folders.get(self.name, f"{self.name}/params")

    @property
    def upcycled_folder(self) -> str:
        """Returns the model folder of an MoE before it is trained."""
        return "moe/upcycled" if self.name == ROUTER_NAME else f"{self.folder}_upcycled"

    def is_moe(self, config: ConfigDict) -> bool:
        """Returns whether it is stacked from several models."""
        return self.group != "ensemble" and len(self.experts(config)) > 1

    def hyperparameters(self, config: ConfigDict) -> ConfigDict:
        """Returns its section of the config."""
        section: Any = config
        for part in self.section.split("."):
            section = section[part]
        return section


def rehearses(config: ConfigDict) -> bool:
    """Returns whether some phase rehearses what the base knew."""
    return any(config[section].rehearsal_fraction for section in configs.FINE_TUNING_SECTIONS)


def from_base(config: ConfigDict) -> tuple[str, ...]:
    """Returns the base alone."""
    del config
    return (BASE_NAME,)


def base_copies(config: ConfigDict) -> tuple[str, ...]:
    """Returns as many copies of the base as CLIP-MoE has experts."""
    return (BASE_NAME,) * configs.num_experts(config)


def chosen_experts(config: ConfigDict) -> tuple[str, ...]:
    """Returns the models that `moe.experts` names, by default `base_and_stages`."""
    (last,) = last_stage(config)
    named = tuple(last if name == "last_stage" else name for name in config.moe.experts)
    return named or base_and_stages(config)


def last_stage(config: ConfigDict) -> tuple[str, ...]:
    """Returns the last MCL stage alone."""
    return (f"mcl_{config.mcl.num_stages}",)


def base_and_stages(config: ConfigDict) -> tuple[str, ...]:
    """Returns the base and every stage, the experts of the published CLIP-MoE."""
    return (BASE_NAME, *(f"mcl_{stage}" for stage in range(1, config.mcl.num_stages + 1)))


def from_nothing(config: ConfigDict) -> tuple[str, ...]:
    """Returns no model: the base is imported or initialised."""
    del config
    return ()


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

# In the order they run; a function gives the rows that depend on the config.
Rows = Recipe | Callable[[ConfigDict], list[Recipe]]
STAGES: Sequence[Rows] = (BASE, _mcl_recipes, _consolidation, ROUTERS)

ORDINARY = (*STAGE_COUNT, *STAGES_ALONE)  # ignored by a dense model that trains on ordinary batches

# In the order of the tables. Where every parameter trains, logit_scale does too, as in Long-CLIP's code.
# Blocks that have experts are those of `moe.num_moe_layers` for all.
BASELINES: Sequence[Recipe] = (
    # The base's feed-forward layers on ordinary batches, for one stage's steps, then for all stages' pairs.
    Recipe(
        "direct_ft",
        "direct fine-tuning, one stage's steps",
        "baseline",
        from_base,
        TRAIN_FFN,
        num_steps=one_stage,
        ignores=ORDINARY,
    ),
    Recipe(
        "direct_ft_same_pairs",
        "direct fine-tuning, same total pairs",
        "baseline",
        from_base,
        TRAIN_FFN,
        num_steps=same_pairs,
        ignores=ORDINARY,
    ),
    Recipe(
        "full_ft",
        "full fine-tuning, one stage's steps",
        "baseline",
        from_base,
        TRAIN_EVERYTHING,
        num_steps=one_stage,
        ignores=ORDINARY,
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
        ignores=ORDINARY,
    ),
    # An MoE of copies of the base, routers and experts trained (arXiv 2212.05055).
    Recipe("sparse_upcycling", "sparse upcycling", "baseline", base_copies, TRAIN_MOE, ignores=STAGES_ALONE),
    Recipe(
        "drop_upcycling",
        "Drop-Upcycling",
        "baseline",
        base_copies,
        TRAIN_MOE,
        reinitialize=True,
        ignores=STAGES_ALONE,
    ),
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
    # Every dense model that CLIP-MoE is made from, features side by side: as many times the encoding.
    Recipe("feature_ensemble", "feature ensemble", "ensemble", base_and_stages),
)


def baseline_names() -> tuple[str, ...]:
    """Returns every name that `config.baselines` may have."""
    return tuple(row.name for row in BASELINES)


def check_baselines(config: ConfigDict) -> None:
    """Raises ValueError naming the baselines that there are not, or that lack the one they are made from."""
    known, errors = {row.name: row for row in BASELINES}, Errors()
    for name in config.baselines:
        if name not in known:
            errors.add(f"baselines={name!r}: choose one of {', '.join(known)}")
            continue
        for needed in known[name].experts(config):
            if needed in known and needed not in config.baselines:
                errors.add(f"baselines: {name!r} is made from {needed!r}: add it")
    errors.raise_all()


def recipes(config: ConfigDict) -> dict[str, Recipe]:
    """Returns {name: recipe} of what a config makes, each after those it is made from.

    Raises ValueError as `check_baselines` does, and naming an expert that no stage makes.
    """
    check_baselines(config)
    stages = [row for rows in STAGES for row in ([rows] if isinstance(rows, Recipe) else rows(config))]
    names = [row.name for row in stages if row.group != "moe"]
    for expert in chosen_experts(config):
        if expert not in names:
            raise ValueError(
                f"moe.experts: {expert!r} is not made: choose among last_stage, {', '.join(names)}"
            )
    wanted = [row for row in BASELINES if row.name in config.baselines]
    return {row.name: row for row in [*stages, *_in_order(wanted, config)]}


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
