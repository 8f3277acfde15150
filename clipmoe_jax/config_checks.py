"""Checks of the values of a config's fields, made before any device time is spent."""

import math
from typing import Any

from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.models.transformer import EXPERT_LAYERS, REMAT

_MANY = 10**12
_PHASE_RANGES = {
    "batch_size": (1, _MANY),
    "accumulation_steps": (1, _MANY),
    "num_epochs": (1, _MANY),
    "num_steps": (0, _MANY),
    "warmup_steps": (0, _MANY),
    "learning_rate": (0.0, 1e3),
    "weight_decay": (0.0, 1e3),
    "label_smoothing": (0.0, 1.0),
    "clip_norm": (0.0, 1e9),
    "b1": (0.0, 1 - 1e-9),
    "b2": (0.0, 1 - 1e-9),
    "eps": (0.0, 1.0),
}
RANGES = {
    **{f"{s}.{n}": r for s in configs.PHASE_SECTIONS for n, r in _PHASE_RANGES.items()},
    "consolidation.num_epochs": (0, _MANY),
    **{f"{s}.rehearsal_fraction": (0.0, 0.9) for s in configs.FINE_TUNING_SECTIONS},
    "base.logit_scale": (0.0, 1e3),
    "base.expert": (0, 999),
    "mesh.fsdp": (1, _MANY),
    "mesh.expert": (1, _MANY),
    "cluster.num_clusters": (1, 1000),
    "cluster.max_fit_pairs": (1, _MANY),
    "embed.batch_size": (1, _MANY),
    "mcl.num_stages": (1, 9),
    "moe.num_moe_layers": (0, 1000),
    "moe.expert_dropout_rate": (0.0, 0.99),
    "moe.sequence_share": (1e-3, 1e3),
    "moe.capacity_factor": (1e-3, 1e3),
    "router.balance_coefficient": (0.0, 1e3),
    "router.z_loss_coefficient": (0.0, 1e3),
    "checkpoint.every_steps": (1, _MANY),
    "checkpoint.max_to_keep": (1, 1000),
    "data.num_workers": (0, 1000),
    "data.max_caption_tokens": (0, _MANY),
    "data.max_bad_fraction": (0.0, 1.0),
    "loss.short_caption_weight": (0.0, 1e3),
    "validation.every_steps": (0, _MANY),
    "log_every": (1, _MANY),
}


CHOICES = {
    "moe.dispatch": ("ragged", "dense", "capacity"),
    "compute.remat": ("auto", *REMAT),
    # Not float16: gradients of a mean over a batch would vanish in it.
    "compute.dtype": ("", "float32", "bfloat16"),
    "compute.frozen_dtype": ("", "float32", "bfloat16"),
    "mcl.init_from": ("base", "previous"),
    "mcl.small_clusters": ("backoff", "drop"),
    "moe.expert_layers": EXPERT_LAYERS,
    "moe.routing": ("token", "token_and_sequence"),
    "router.balance": ("paper", "released"),
    "router.loss": ("contrastive", "features"),
    "router.gradient": ("chosen", "all"),
    **{f"{s}.rehearsal": ("pairs", "distill") for s in configs.FINE_TUNING_SECTIONS},
}


def validate(config: ConfigDict, paths: bool = True) -> None:
    """Raises ValueError, or SeveralErrors, naming every field whose value cannot work.

    paths: whether the data and the base's checkpoint must be named, which a plan can do without.
    """
    errors = Errors()
    _check_fields(config, configs.default_config(), errors)
    errors.raise_all()  # what follows needs the fields to be there
    with errors.of():
        _check_architecture(config)
    if not config.base.checkpoint:  # which may bring experts
        with errors.of():
            check_selected(config)
    if config.cluster.num_clusters ** (2 * config.mcl.num_stages) >= 2**63:
        errors.add(
            f"cluster.num_clusters={config.cluster.num_clusters} makes more than 2^63 clusters in "
            f"mcl.num_stages={config.mcl.num_stages}: choose fewer"
        )
    if config.cluster.max_fit_pairs < config.cluster.num_clusters:
        errors.add(
            f"cluster.max_fit_pairs={config.cluster.max_fit_pairs} is fewer than cluster.num_clusters="
            f"{config.cluster.num_clusters}: a centre needs a pair of its own"
        )
    for name, choices in CHOICES.items():
        if (value := _value(config, name)) not in choices:
            errors.add(f"{name}={value!r}: choose one of {', '.join(choices)}")
    for section in configs.FINE_TUNING_SECTIONS:
        if paths and (fraction := config[section].rehearsal_fraction) and not config.data.rehearsal:
            errors.add(
                f"{section}.rehearsal_fraction={fraction} needs data.rehearsal: set it to some hundred pairs "
                "of what the base knows, a prepared data set or a source such as folder:DIR"
            )
    if config.router.loss == "features":
        if config.router.rehearsal_fraction and config.router.rehearsal != "distill":
            errors.add("router.loss=features has no loss for rehearsal=pairs: set router.rehearsal=distill")
        if tuple(config.moe.experts)[-1:] == ("base",):
            errors.add(
                "router.loss=features: the last of moe.experts teaches, and it is 'base': put another last"
            )
    if config.validation.keep_best and not config.validation.every_steps:
        errors.add("validation.keep_best=True measures nothing: set validation.every_steps")
    if paths and bool(config.data.validation) != bool(config.validation.every_steps):
        errors.add(
            f"validation.every_steps={config.validation.every_steps} and data.validation="
            f"{config.data.validation!r} go together: set both or neither"
        )
    weights = config.data.weights
    if not all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights):
        errors.add(
            f"data.weights={tuple(weights)} must be positive numbers, one for each source of data.train"
        )
    if 0 < config.data.max_caption_tokens < 3:
        errors.add(
            f"data.max_caption_tokens={config.data.max_caption_tokens} leaves no room for start, a word and "
            "end: use 3 or more, or 0 for the context length"
        )
    if not config.seeds:
        errors.add("seeds=() runs nothing: give at least one")
    if len(set(config.seeds)) < len(config.seeds) or not all(
        isinstance(seed, int) and 0 <= seed < 2**32 for seed in config.seeds
    ):
        errors.add(f"seeds={tuple(config.seeds)} must be whole numbers from 0, each once")
    if paths and not config.data.train:
        errors.add(
            "data.train is empty: set it to a folder made by python -m clipmoe_jax.prepare, or to a source, "
            "KIND:PATH"
        )
    if paths and not config.base.checkpoint and not config.data.base:
        errors.add(
            "base.checkpoint is empty: set it to the dense CLIP to start from, or data.base to the pairs to "
            "train one on"
        )
    for name, limits in RANGES.items():
        with errors.of():
            _check_range(name, _value(config, name), *limits)
    _check_settings(config, errors)
    errors.raise_all()


def check_selected(config: ConfigDict) -> None:
    """Raises ValueError for more selected experts than there are; a checkpoint's architecture is taken."""
    if not 1 <= config.moe.num_selected_experts <= configs.num_experts(config):
        named = "moe.experts" if config.moe.experts else "mcl.num_stages + 1"
        raise ValueError(
            f"moe.num_selected_experts={config.moe.num_selected_experts} must lie between 1 and the number "
            f"of experts, {configs.num_experts(config)} ({named})"
        )


def _value(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def _check_fields(config: ConfigDict, known: ConfigDict, errors: Errors, prefix: str = "") -> None:
    for name, value in config.items():
        if name not in known:
            errors.add(f"config field {prefix}{name} does not exist; there are {sorted(known)}")
        elif isinstance(known[name], ConfigDict):
            if not isinstance(value, ConfigDict):
                errors.add(f"config field {prefix}{name}={value!r} must be a group of fields")
            elif known[name]:
                _check_fields(value, known[name], errors, f"{prefix}{name}.")


def _check_settings(config: ConfigDict, errors: Errors) -> None:
    for baseline, settings in config.baseline_settings.items():
        for name, value in settings.items():
            field = f"baseline_settings.{baseline}.{name}"
            if name not in _PHASE_RANGES:
                errors.add(f"config field {field} does not exist; there are {sorted(_PHASE_RANGES)}")
                continue
            with errors.of():
                configs.check_type(field, value, config.mcl.get_type(name))
                _check_range(field, value, *_PHASE_RANGES[name])


def _check_architecture(config: ConfigDict) -> None:
    if configs.architecture(config).moe is not None and not config.base.checkpoint:
        raise ValueError(
            "base.architecture.moe must be None, as a base that is trained is dense: the fields of the "
            "CLIP-MoE are moe.num_selected_experts and those beside it"
        )


def _check_range(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{field}={value} must lie between {least} and {most}")
