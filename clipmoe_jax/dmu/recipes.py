"""The recipe table: how every model of a run is made, from what, by which losses and for how long.

One row is one model. The runner makes it, the plan predicts it, evaluation, tables and report show it; a
further baseline or stage is a further row here and nothing elsewhere. Recipes of baselines follow their
papers in what trains and by which losses. Data, batches and learning rates are the run's own, so that rows
compare; `config.baseline_settings` changes those of one baseline.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.core import trees
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.models.transformer import MoeConfig
from clipmoe_jax.train.adapters import Adapters

TRAIN_EVERYTHING = [(r".*", True)]
TRAIN_TOWERS = [(r"logit_scale", False), (r".*", True)]
TRAIN_FFN = [(r"(visual|text)/resblocks_\d+/mlp/.*", True), (r".*", False)]
TRAIN_BLOCKS = [(r"(visual|text)/resblocks_\d+/(mlp|attn)/.*", True), (r".*", False)]
TRAIN_ROUTERS = [(r".*/moe/router/kernel", True), (r".*", False)]
TRAIN_NEW_COLUMNS = [(r".*/moe/router/new_columns", True), (r".*", False)]
TRAIN_ADAPTERS = [(r".*/lora_[ab]", True), (r".*", False)]
TRAIN_MOE = [(r".*/moe/.*", True), (r".*", False)]

Results = dict[str, dict[str, Any]]  # {title of a model: its numbers}, as eval/results.json holds them

BASE_NAME, ROUTER_NAME, CLIP_MOE = "base", "router", "CLIP-MoE"
CONSOLIDATION = "consolidation"
BASELINES_STAGE, REHEARSAL_STAGE = "baselines", "rehearsal"
REHEARSAL_FOLDER = "rehearsal/features"
ADAPTER_RANK = 8
BALANCE_COEFFICIENT = 0.01  # the paper's, where the config has none
ROUTER_STDDEV = 0.02  # of a baseline's initial routers
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


class Budget(NamedTuple):
    """The cost of training models, as made or as planned, for rows that may cost as much as another.

    Attributes:
        steps: from the name of a recipe to its steps.
        flops_of_pair: from the name of a recipe to the FLOPs of one pair in its training.
        flops_of_encoding: of all training pairs, which each stage needs for its clusters.
    """

    config: ConfigDict
    steps: Callable[[str], int]
    flops_of_pair: Callable[[str], float]
    flops_of_encoding: float


class Cost(NamedTuple):
    """Pairs trained on and FLOPs after the base, for a model and all that it is made from."""

    pairs: int
    flops: float


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


Steps = Callable[[Budget, "Recipe"], int]


def one_stage(budget: Budget, recipe: "Recipe") -> int:
    """Returns the steps of the first stage."""
    del recipe
    return budget.steps("mcl_1")


def same_pairs(budget: Budget, recipe: "Recipe") -> int:
    """Returns the steps with which a model has seen as many pairs as the CLIP-MoE and all it is made from."""
    left = cost_of(budget, [ROUTER_NAME]).pairs - cost_of(budget, recipe.experts(budget.config)).pairs
    return math.ceil(left / recipe.hyperparameters(budget.config).batch_size)


def same_flops(budget: Budget, recipe: "Recipe") -> int:
    """Returns the most steps with which a model takes no more FLOPs than the CLIP-MoE."""
    left = cost_of(budget, [ROUTER_NAME]).flops - cost_of(budget, recipe.experts(budget.config)).flops
    of_step = recipe.hyperparameters(budget.config).batch_size * budget.flops_of_pair(recipe.name)
    return math.floor(left / of_step)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table: the making of one model.

    Attributes:
        name: of its phase in metrics and, but for baselines, of the stage that trains it.
        title: of its row in tables.
        group: where it belongs in tables and reports; a "baseline" is made if `config.baselines` names it. An
            "ensemble" trains nothing: its features are those of `experts`, joined. A "part" is made for
            another row alone and stands in no table.
        experts: names of the models it is made from, given the config. One is trained as it is; the
            feed-forward layers of several become the experts of an MoE with random routers. None at all: the
            base, imported or initialised. Where the base is an MoE, one that is trained as it is starts from
            `config.base.expert`, and the CLIP-MoE has the base's experts and routers, to which it adds.
        trains: rules of what trains. Where experts have attention too, so do feed-forward layers that train
            to become experts or to be compared with these, and of a router only the columns of experts
            that are added to the base's (`rules`).
        section: the group of config fields with its hyperparameters.
        sampler: "clusters" draws each batch from one cluster of what the model before encodes.
        num_steps: None is as long as the section says.
        rehearsal: how it rehearses what the base knew. "section": as its section says. "pairs" and "distill":
            that, where routers rehearse.
        rehearsal_share: of its steps, for "pairs" and "distill"; 0 is `router.rehearsal_fraction`.
        losses: fields of `train.step.LossConfig` that differ from the config's, given the config.
        teacher: the model whose features it learns to give, by cosine, on new and on rehearsed pairs; "" for
            none.
        adapter_rank: of the low-rank adapters that train (arXiv 2106.09685) and are folded in at the end; 0
            for none.
        reinitialize: whether half of each expert's hidden units are drawn anew (arXiv 2502.19261).
        ignores: config fields that change nothing in it, though its inputs name their group.
        number: of an MCL stage, or of that whose clusters it is trained on, from 1; 0 for all others.
        parts: rows that are made for this one alone, in order, given the config.
    """

    name: str
    title: str
    group: Literal["base", "baseline", "part", "stage", "ensemble", "moe"]
    experts: Callable[[ConfigDict], tuple[str, ...]]
    trains: trees.Rules = ()
    section: str = "mcl"
    sampler: Literal["shuffled", "clusters"] = "shuffled"
    num_steps: Steps | None = None
    rehearsal: Literal["section", "none", "pairs", "distill"] = "section"
    rehearsal_share: float = 0.0
    losses: Callable[[ConfigDict], Mapping[str, float]] = lambda config: {}
    teacher: str = ""
    adapter_rank: int = 0
    reinitialize: bool = False
    ignores: tuple[str, ...] = ()
    number: int = 0
    parts: Callable[[ConfigDict], Sequence["Recipe"]] = lambda config: ()

    @property
    def is_baseline(self) -> bool:
        """Returns whether it is a baseline or a part of one."""
        return self.group in ("baseline", "part")

    @property
    def stage(self) -> str:
        """Returns the name of the stage that makes it; all baselines are one."""
        return BASELINES_STAGE if self.is_baseline else self.name

    @property
    def folder(self) -> str:
        """Returns its model folder in the workdir."""
        if self.is_baseline:
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

    def extends(self, config: ConfigDict) -> bool:
        """Returns whether it adds experts to a base that is an MoE."""
        return self.group == "moe" and configs.extends(config)

    def router_stddev(self, config: ConfigDict) -> float:
        """Returns the standard deviation of its initial routers."""
        return config.moe.router_stddev if self.group == "moe" else ROUTER_STDDEV

    def router_gradient(self, config: ConfigDict) -> str:
        """Returns which experts the gradient of its routers reaches."""
        return config.router.gradient if self.group == "moe" else "chosen"

    def rules(self, config: ConfigDict) -> trees.Rules:
        """Returns the rules of what trains."""
        if self.extends(config):
            return TRAIN_NEW_COLUMNS
        if self.trains is TRAIN_FFN and config.moe.expert_layers == "attention_and_feed_forward":
            return TRAIN_BLOCKS
        return self.trains

    def adapters(self, config: ConfigDict) -> Adapters:
        """Returns the adapters that it trains with."""
        return Adapters(self.adapter_rank, len(self.experts(config)) - 1 if self.extends(config) else 0)

    def fields(self, config: ConfigDict) -> str:
        """Returns the name of the config fields with its hyperparameters, for errors."""
        return f"baseline_settings.{self.name}" if self.name in config.baseline_settings else self.section

    def hyperparameters(self, config: ConfigDict) -> ConfigDict:
        """Returns its section of the config, with what `config.baseline_settings` has for it."""
        section: Any = config
        for part in self.section.split("."):
            section = section[part]
        if self.name in config.baseline_settings:
            section = ConfigDict(section.to_dict() | config.baseline_settings[self.name].to_dict())
        return section

    def rehearsal_of(self, config: ConfigDict) -> tuple[float, str]:
        """Returns the share of its steps that rehearse, and whether by "pairs" or to "distill"."""
        if self.group == "base" or self.rehearsal == "none":
            return 0.0, "pairs"
        if self.rehearsal == "section":
            section = self.hyperparameters(config)
            return section.rehearsal_fraction, section.rehearsal
        fraction = config.router.rehearsal_fraction
        return fraction and (self.rehearsal_share or fraction), self.rehearsal


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
