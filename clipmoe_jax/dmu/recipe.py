"""Defines a row of the recipe table: how one model is made, from what, by which losses and for how long.

`recipes.py` has the rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import trees
from clipmoe_jax.train.adapters import Adapters

# What trains: trees.Rules over the names of parameters.
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
ROUTER_STDDEV = 0.02  # of a baseline's initial routers


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


Steps = Callable[[Budget, "Recipe"], int]


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
