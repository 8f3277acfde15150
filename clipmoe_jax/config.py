"""The fields of a run's config with their defaults, and the checks made before any device time is spent.

A config file starts from `default_config()` and changes fields; a field that does not exist raises at once,
since the config is locked. Times are in steps, rates per step, batch sizes global (over all hosts).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from clipmoe_jax.models.attention import default_implementation
from clipmoe_jax.models.clip import VARIANTS, ClipConfig
from clipmoe_jax.models.experts import GROUPED_MLPS
from clipmoe_jax.models.transformer import REMAT, ComputeConfig, MoeConfig
from clipmoe_jax.train.phase import PhaseConfig

# Fields that earlier versions had: {dotted name: what it is now}. Under a plain new name, artifacts that were
# made with the old one stay usable.
RENAMED = {
    "run": "compute",
    "run.dtype": "compute.dtype",
    "run.remat": "compute.remat",
    "run.frozen_dtype": "compute.frozen_dtype",
    "run.attention": "chosen by platform",
    "run.grouped_mlp": "chosen by platform",
    "data.digit_scenes": "data.train=digit_scenes:train?pairs=N (and data.test, data.base: configs/demo.py)",
}

# XLA's other schedule runs what it can as soon as it can: a quarter more memory, and no faster on 2 cores.
CPU_OPTIONS = (("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),)

# Fields that change nothing while they have a value; artifacts of versions without them stay usable:
# {field: (value, fields that change nothing then)}
NEUTRAL = {
    "moe.experts": ((), ()),
    "moe.routing": ("token", ("moe.sequence_share",)),
    **{f"{s}.rehearsal_fraction": (0.0, (f"{s}.rehearsal",)) for s in ("mcl", "consolidation", "router")},
}
PHASE_SECTIONS = ("base.train", "mcl", "consolidation", "router")  # whose fields are a `PhaseConfig`'s
REHEARSING_SECTIONS = PHASE_SECTIONS[1:]

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
    **{f"{s}.{n}": r for s in PHASE_SECTIONS for n, r in _PHASE_RANGES.items()},
    "consolidation.num_epochs": (0, _MANY),
    **{f"{s}.rehearsal_fraction": (0.0, 0.9) for s in REHEARSING_SECTIONS},
    "base.logit_scale": (0.0, 1e3),
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
    "data.packing_steps": (0, 1000),
    "data.max_bad_fraction": (0.0, 1.0),
    "loss.short_caption_weight": (0.0, 1e3),
    "log_every": (1, _MANY),
}


def default_config() -> ConfigDict:
    """Returns the paper's run: ViT-L/14 with 248 text positions (arXiv 2409.19291 and its released code)."""
    config = ConfigDict()
    config.seeds = (0,)  # each seed is a whole run; several go to WORKDIR/seed_N and into one table
    # {name: {dotted field: value}}: a sweep, each variant a run in WORKDIR/NAME (`set_variants`)
    config.variants = ConfigDict(allow_dotted_keys=True)

    config.data = ConfigDict()
    # A folder made by clipmoe_jax.prepare, or a source in its grammar (docs/data.md), which the run prepares
    # into WORKDIR/data once: "sharegpt4v:captions.json?images=DIR".
    config.data.train = ""
    config.data.train_split = "train"  # or a slice: "train[:1000]"
    config.data.test = ""  # for retrieval and to diagnose the CLIP-MoE on
    config.data.test_split = "test"
    config.data.max_bad_fraction = 1e-3  # of a source's records: the run stops if more are bad
    config.data.base = ""  # to train a base from scratch on, where base.checkpoint is empty
    config.data.retention = ""  # what config.retention calls data.retention
    config.data.rehearsal = ""  # what the base knew, some hundreds of pairs or more, not to be forgotten
    config.data.in_memory = False  # decode once and hold in memory: for small data sets
    config.data.packing_steps = 16  # captions share rows, of which a batch has one of so many numbers; 0: no
    config.data.max_caption_tokens = 0  # cuts captions, start and end counted; 0 is the context length
    config.data.num_workers = 0  # decoding processes; 0 decodes in threads

    config.base = ConfigDict()
    config.base.checkpoint = ""  # a file or folder `clipmoe_jax.load` takes; "" trains one from scratch
    set_architecture(config, "ViT-L/14", context_length=248)
    config.base.logit_scale = 100.0  # the checkpoint's is reset to its logarithm; 0 keeps it
    config.base.train = _phase(batch_size=128, learning_rate=2e-3, weight_decay=0.1)

    config.compute = ConfigDict()
    config.compute.dtype = ""  # "" is bfloat16 on TPU and GPU, float32 on CPU
    config.compute.remat = "none"  # "dots", "full": what the backward pass computes again (`ComputeConfig`)
    config.compute.frozen_dtype = (
        ""  # what frozen matrices are held in while a stage trains; "" is compute.dtype's
    )

    config.embed = ConfigDict({"batch_size": 1024})
    config.cluster = ConfigDict({"num_clusters": 3, "max_fit_pairs": 200_000})

    config.mcl = _phase(
        batch_size=800, learning_rate=1e-5, weight_decay=0.2, warmup_steps=200, label_smoothing=0.1
    )
    config.mcl.num_stages = 3  # E - 1
    config.mcl.init_from = "base"  # or "previous"
    config.mcl.small_clusters = "backoff"  # or "drop"

    # After the last stage, ordinary batches: "hard clusters, then all pairs". Off without steps and epochs.
    config.consolidation = _phase(
        batch_size=800, learning_rate=1e-5, weight_decay=0.2, warmup_steps=200, label_smoothing=0.1
    )
    config.consolidation.num_epochs = 0

    config.moe = ConfigDict()
    # Which models become experts: "base", "mcl_1", …, "last_stage", "consolidation", also several times; ()
    # is the base and every stage.
    config.moe.experts = ()
    config.moe.num_selected_experts = 2
    config.moe.num_moe_layers = 0  # of the last blocks of each tower; 0 is all
    config.moe.dispatch = "ragged"  # or "dense", exact too, or "capacity"
    config.moe.capacity_factor = 1.25  # for dispatch = "capacity"
    config.moe.expert_dropout_rate = 0.1  # in router training
    config.moe.router_stddev = 0.02
    config.moe.routing = "token"  # or "token_and_sequence": routers also see the mean over the sequence
    config.moe.sequence_share = 2.0  # how often it is added to the token

    config.router = _phase(
        batch_size=800, learning_rate=1e-6, weight_decay=1e-2, warmup_steps=200, label_smoothing=0.1
    )
    config.router.balance = "paper"  # or "released"
    config.router.balance_coefficient = 0.01
    config.router.z_loss_coefficient = 0.0  # ST-MoE's second loss of routers

    # Of each phase's batches, this share is of data.rehearsal: "pairs" by the contrastive loss, or "distill",
    # by the base's similarities of their images and captions, which need not belong together.
    for section in (config.mcl, config.consolidation, config.router):
        section.rehearsal_fraction = 0.0
        section.rehearsal = "pairs"

    # Above 0: Long-CLIP's second loss, of first sentences with the principal components of images.
    config.loss = ConfigDict({"short_caption_weight": 0.0})
    config.baselines = ()  # names of baselines in dmu/recipes.py
    config.evaluations = ()  # of each model: lines such as "zero_shot:data/imagenet?classes=imagenet"
    # One more line, of what the base knew: the column "old" beside the test set's recall.
    config.retention = ""  # such as "zero_shot:data.retention" or "zero_shot:data/imagenet?classes=imagenet"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "expert": 1})
    config.checkpoint = ConfigDict({"every_steps": 500, "max_to_keep": 2})
    config.log_every = 10
    config.lock()
    return config


def set_architecture(config: ConfigDict, variant: str, context_length: int = 248) -> None:
    """Makes a variant ("ViT-B/32", …) the dense base, its 77 text positions stretched to `context_length`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known: choose one of {', '.join(VARIANTS)}")
    config.base.architecture = ConfigDict(VARIANTS[variant].to_dict())
    config.base.architecture.text.context_length = context_length


def set_variants(config: ConfigDict, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes a config a sweep over {name: {dotted field: value}}; `variant_configs` checks it."""
    config.variants = ConfigDict({n: dict(fields) for n, fields in variants.items()}, allow_dotted_keys=True)


def variant_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns {name: config} of a sweep's variants, in order; of any other config {"": itself}.

    Raises ValueError naming variant and field where a field does not exist or its value is of another type.
    """
    if not config.variants:
        return {"": config}
    configs = {}
    for name, fields in config.variants.items():
        if not re.fullmatch(r"\w[\w.=+-]*", name):
            raise ValueError(f"variants: {name!r} must be the name of a folder: letters, digits and _.=+-")
        if name == "data":
            raise ValueError("variants: 'data' is the folder of the data sets: choose another name")
        variant = ConfigDict(config.to_dict() | {"variants": {}}).lock()
        for field, value in fields.items():
            _set_field(variant, field, value, f"variants.{name}")
        configs[name] = variant
    return configs


def _set_field(config: ConfigDict, field: str, value: Any, where: str) -> None:
    *groups, last = field.split(".")
    section = config
    for group in groups:
        section = section.get(group) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section or field in ("seeds", "variants"):
        raise ValueError(
            f"{where}: {field!r} is not a field that a variant can set, such as 'mcl.num_stages'"
        )
    kind, given = type(section[last]), list if isinstance(value, tuple) else type(value)
    kind = list if kind is tuple else kind
    if kind is ConfigDict:
        raise ValueError(f"{where}: {field!r} is a group of fields: set them one by one")
    if given is not kind and (given, kind) != (int, float):
        raise ValueError(f"{where}: {field}={value!r} must be of type {type(section[last]).__name__}")
    section[last] = value


def run_locally(config: ConfigDict) -> None:
    """Shrinks a config to a few small steps on 64 pairs, to see on a laptop that the full model runs."""
    config.data.train_split, config.data.test_split = "train[:64]", "test[:64]"
    for section in (config.mcl, config.consolidation, config.router):
        if section is config.consolidation and not consolidates(config):
            continue
        section.batch_size, section.num_steps, section.warmup_steps = 8, 4, 1
        section.accumulation_steps = 1
    config.embed.batch_size = 8
    config.log_every = 1


def _phase(**fields: Any) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(PhaseConfig(**fields)))


def phase_config(section: ConfigDict) -> PhaseConfig:
    """Returns the hyperparameters of a section, such as `config.mcl` or `config.base.train`."""
    return PhaseConfig(**{f.name: section[f.name] for f in dataclasses.fields(PhaseConfig)})


def architecture(config: ConfigDict) -> ClipConfig:
    """Returns the dense base's architecture."""
    return ClipConfig.from_dict(config.base.architecture.to_dict())


def moe_config(config: ConfigDict) -> MoeConfig:
    """Returns the CLIP-MoE's mixture."""
    return MoeConfig(
        num_experts=num_experts(config),
        num_selected_experts=config.moe.num_selected_experts,
        num_moe_layers=config.moe.num_moe_layers or None,
        sequence_share=config.moe.sequence_share if config.moe.routing == "token_and_sequence" else 0.0,
    )


def num_experts(config: ConfigDict) -> int:
    """Returns how many experts the CLIP-MoE has."""
    return len(config.moe.experts) or config.mcl.num_stages + 1


def consolidates(config: ConfigDict) -> bool:
    """Returns whether the last stage is trained on with ordinary batches."""
    return bool(config.consolidation.num_steps or config.consolidation.num_epochs)


def compute_config(config: ConfigDict, platform: str, *, training_routers: bool = False) -> ComputeConfig:
    """Returns how models are computed on a platform.

    platform: "cpu", "tpu", "gpu", or "cuda" for a GPU with cuDNN attention. It decides how attention and the
    experts run. Ragged dispatch is the exact one that computes least, and on CPU the fastest
    (benchmarks/moe_block.py); on accelerators nothing has been measured.
    """
    dtype = config.compute.dtype or ("float32" if platform == "cpu" else "bfloat16")
    return ComputeConfig(
        dtype=dtype,
        remat=config.compute.remat,
        dispatch=config.moe.dispatch,
        grouped_mlp=GROUPED_MLPS[platform],
        attention=default_implementation(platform, dtype),
        mlp_chunk_rows=1024 if platform == "cpu" else 0,
        capacity_factor=config.moe.capacity_factor,
        expert_dropout_rate=config.moe.expert_dropout_rate if training_routers else 0.0,
        compiler_options=CPU_OPTIONS if platform == "cpu" else (),
    )


def validate(config: ConfigDict, paths: bool = True) -> None:
    """Raises ValueError naming the first field whose value cannot work.

    paths: whether the data and the base's checkpoint must be named, which a plan can do without.
    """
    _check_fields(config, default_config())
    architecture(config)
    if not 1 <= config.moe.num_selected_experts <= num_experts(config):
        named = "moe.experts" if config.moe.experts else "mcl.num_stages + 1"
        raise ValueError(
            f"moe.num_selected_experts={config.moe.num_selected_experts} must lie between 1 and the number "
            f"of experts, {num_experts(config)} ({named})"
        )
    if config.cluster.num_clusters ** (2 * config.mcl.num_stages) >= 2**63:
        raise ValueError(
            f"cluster.num_clusters={config.cluster.num_clusters} makes more than 2^63 clusters in "
            f"mcl.num_stages={config.mcl.num_stages}: choose fewer"
        )
    _check_choice("moe.dispatch", config.moe.dispatch, ("ragged", "dense", "capacity"))
    _check_choice("compute.remat", config.compute.remat, REMAT)
    # Not float16: gradients of a mean over a batch would vanish in it.
    _check_choice("compute.dtype", config.compute.dtype, ("", "float32", "bfloat16"))
    _check_choice("compute.frozen_dtype", config.compute.frozen_dtype, ("", "float32", "bfloat16"))
    _check_choice("mcl.init_from", config.mcl.init_from, ("base", "previous"))
    _check_choice("mcl.small_clusters", config.mcl.small_clusters, ("backoff", "drop"))
    for section in REHEARSING_SECTIONS:
        _check_choice(f"{section}.rehearsal", config[section].rehearsal, ("pairs", "distill"))
        if paths and config[section].rehearsal_fraction and not config.data.rehearsal:
            fraction = config[section].rehearsal_fraction
            raise ValueError(
                f"{section}.rehearsal_fraction={fraction} needs data.rehearsal: set it to pairs of what the "
                "base knows"
            )
    _check_choice("moe.routing", config.moe.routing, ("token", "token_and_sequence"))
    _check_choice("router.balance", config.router.balance, ("paper", "released"))
    if 0 < config.data.max_caption_tokens < 3:
        raise ValueError(
            f"data.max_caption_tokens={config.data.max_caption_tokens} leaves no room for start, a word and "
            "end: use 3 or more, or 0 for the context length"
        )
    if not config.seeds:
        raise ValueError("seeds=() runs nothing: give at least one")
    if len(set(config.seeds)) < len(config.seeds) or not all(
        isinstance(seed, int) and 0 <= seed < 2**32 for seed in config.seeds
    ):
        raise ValueError(f"seeds={tuple(config.seeds)} must be whole numbers from 0, each once")
    if paths and not config.data.train:
        raise ValueError(
            "data.train is empty: set it to a folder made by python -m clipmoe_jax.prepare, or to a source, "
            "KIND:PATH"
        )
    if paths and not config.base.checkpoint and not config.data.base:
        raise ValueError(
            "base.checkpoint is empty: set it to the dense CLIP to start from, or data.base to the pairs to "
            "train one on"
        )
    for name, (least, most) in RANGES.items():
        value = config
        for part in name.split("."):
            value = value[part]
        if not least <= value <= most:
            raise ValueError(f"{name}={value} must lie between {least} and {most}")


def _check_fields(config: ConfigDict, known: ConfigDict, prefix: str = "") -> None:
    for name, value in config.items():
        if name not in known:
            raise ValueError(f"config field {prefix}{name} does not exist; there are {sorted(known)}")
        if isinstance(known[name], ConfigDict):
            if not isinstance(value, ConfigDict):
                raise ValueError(f"config field {prefix}{name}={value!r} must be a group of fields")
            if known[name]:
                _check_fields(value, known[name], f"{prefix}{name}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Returns the typed arguments after a config file's colon: `seeds=3,small` -> {seeds: 3, small: True}.

    Each value is converted to its default's type; a bare name is True.
    Raises ValueError naming an argument that the config does not have, or that is given twice.
    """
    parsed = {}
    for item in filter(None, arg.split(",")):
        name, _, value = item.partition("=")
        if name not in defaults:
            raise ValueError(f"config argument {name!r} does not exist; there are {', '.join(defaults)}")
        if name in parsed:
            raise ValueError(f"config argument {name!r} is given twice: give it once")
        kind = type(defaults[name])
        parsed[name] = value in ("", "True", "true", "1") if kind is bool else kind(value)
    return ConfigDict(defaults | parsed)


def upgrade_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an artifact's inputs ({dotted field: value}) with the names that fields have now.

    Raises ValueError naming a field that was set and is gone.
    """
    upgraded = {}
    for name, value in inputs.items():
        new = RENAMED.get(name, name)
        if name == "contents":  # of an evaluation's data sets: {option: hash}
            upgraded |= {f"contents of {option}": of_one for option, of_one in value.items()}
        elif name not in RENAMED or re.fullmatch(r"[\w.]+", new):
            upgraded[new] = value
        elif value:
            raise ValueError(
                f"made by an earlier version with {name}={value!r}, now {new}: choose another workdir"
            )
    return upgraded
