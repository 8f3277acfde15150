"""The fields of a run's config with their defaults, and what follows from them.

A config file starts from `default_config()` and changes fields; a field that does not exist raises at once,
since the config is locked. Times are in steps, rates per step, batch sizes global (over all hosts).
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from clipmoe_jax.core.errors import Errors
from clipmoe_jax.interop import hub
from clipmoe_jax.models.attention import default_implementation
from clipmoe_jax.models.clip import VARIANTS, ClipConfig
from clipmoe_jax.models.experts import default_grouped_mlp
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig
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
    "data.packing_steps": "chosen by the program",
    "data.digit_scenes": "data.train=digit_scenes:train?pairs=N (and data.test, data.base: configs/demo.py)",
}

# Fields of base.architecture that may be None, with the type that they have otherwise: a run takes them from
# the base's checkpoint. (So they do `moe`, that of a base that is to be extended.)
OPTIONAL = {"activation": str, "vision.mlp_width": int, "text.mlp_width": int, "text.eos_token_id": int}

# XLA's other schedule runs what it can as soon as it can: a quarter more memory, and no faster on 2 cores.
CPU_OPTIONS = (("xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"),)

# Towers up to so wide have small experts (`_has_small_experts`). Of width 64 a router step compiles in 13
# instead of 23 CPU seconds.
SMALL_WIDTH = 128

# Of the residual stream while a CPU encodes: 34 images of ViT-B/32, 8 of ViT-B/16 and 4 of ViT-L/14. More
# fall out of its cache (benchmarks/LOG.md).
ENCODED_VALUES = 5 << 18

# Sections whose fields are a `PhaseConfig`'s: of the base, and of the phases that come after it.
FINE_TUNING_SECTIONS = ("mcl", "consolidation", "router")
PHASE_SECTIONS = ("base.train", *FINE_TUNING_SECTIONS)

# Fields that change nothing while they have a value; artifacts of versions without them stay usable:
# {field: (value, fields that change nothing then)}
NEUTRAL = {
    "moe.experts": ((), ()),
    "moe.expert_layers": ("feed_forward", ()),
    "base.expert": (0, ()),
    "data.rehearsal_captions": ("", ()),
    "data.weights": ((), ()),
    "validation.keep_best": (False, ("validation.every_steps",)),
    "router.loss": ("contrastive", ()),
    "router.gradient": ("chosen", ()),
    "moe.routing": ("token", ("moe.sequence_share",)),
    **{f"{s}.rehearsal_fraction": (0.0, (f"{s}.rehearsal",)) for s in FINE_TUNING_SECTIONS},
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
    # Of the sources of data.train, which commas join: epochs draw from them in these shares, such as (3, 1);
    # () draws every pair once.
    config.data.weights = ()
    config.data.test = ""  # for retrieval and to diagnose the CLIP-MoE on
    config.data.test_split = "test"  # or a slice, as above
    config.data.max_bad_fraction = 1e-3  # of a source's records: the run stops if more are bad
    # Held-out pairs to measure stages, baselines and routers on while they train.
    config.data.validation = ""
    config.data.base = ""  # to train a base from scratch on, where base.checkpoint is empty
    config.data.retention = ""  # what config.retention calls data.retention
    config.data.rehearsal = ""  # what the base knew, some hundreds of pairs or more, not to be forgotten
    # To distill: captions that need not belong to the images of data.rehearsal; "" is its own.
    config.data.rehearsal_captions = ""
    config.data.in_memory = False  # decode once and hold in memory: for small data sets
    config.data.max_caption_tokens = 0  # cuts captions, start and end counted; 0 is the context length
    config.data.num_workers = 0  # decoding processes; 0 decodes in threads

    config.base = ConfigDict()
    # What `clipmoe_jax.load` takes: a file, a folder, "hf-hub:OWNER/NAME"; "" trains a base from scratch.
    config.base.checkpoint = ""
    set_architecture(config, "ViT-L/14", context_length=248)
    config.base.logit_scale = 100.0  # the checkpoint's is reset to its logarithm; 0 keeps it
    # Of a checkpoint that is a CLIP-MoE, which the run extends (docs/extend.md): the expert that stages and
    # dense baselines start from, as the dense model that it came from.
    config.base.expert = 0
    # Of the base's training from scratch, where base.checkpoint is empty.
    config.base.train = _phase(batch_size=128, learning_rate=2e-3, weight_decay=0.1)

    config.compute = ConfigDict()
    config.compute.dtype = ""  # "" is bfloat16 on TPU and GPU, float32 on CPU
    # What the backward pass computes again (`ComputeConfig`): "none", "dots", "full", or "auto": "none" where
    # the steps then fit into a device's memory (`planning.memory.choose_remat`) and on CPUs, else "dots".
    config.compute.remat = "auto"
    # What frozen matrices are held in while a stage trains; "" is compute.dtype's.
    config.compute.frozen_dtype = ""

    config.embed = ConfigDict()
    config.embed.batch_size = 1024  # pairs that are encoded at a time, for clusters and evaluation
    config.cluster = ConfigDict()
    config.cluster.num_clusters = 3  # of each stage, for images and for captions: 3 x 3 cells
    config.cluster.max_fit_pairs = 200_000  # pairs drawn to find the centres from

    ffn = dict(batch_size=800, learning_rate=1e-5, weight_decay=0.2, warmup_steps=200, label_smoothing=0.1)
    config.mcl = _phase(**ffn)
    config.mcl.num_stages = 3  # E - 1
    config.mcl.init_from = "base"  # what a stage starts from: or "previous", the model of the stage before
    # A cluster that does not fill a batch: "backoff" takes the rest from its parent, "drop" leaves it out.
    config.mcl.small_clusters = "backoff"

    # After the last stage, ordinary batches: "hard clusters, then all pairs". Off without steps and epochs.
    config.consolidation = _phase(**ffn, num_epochs=0)

    config.moe = ConfigDict()
    # Which models become experts: "base", "mcl_1", …, "last_stage", "consolidation", also several times; ()
    # is the base and every stage. A base that is a CLIP-MoE comes first and brings all of its experts.
    config.moe.experts = ()
    # What of a model becomes an expert, and what the stages before train: each block's feed-forward layer, or
    # "attention_and_feed_forward".
    config.moe.expert_layers = "feed_forward"
    config.moe.num_selected_experts = 2  # K: experts that each token uses
    config.moe.num_moe_layers = 0  # of the last blocks of each tower; 0 is all
    # How tokens reach their experts: "ragged" or "dense", both exact, or "capacity", which drops what is too
    # much for an expert.
    # On CPU small towers use "dense" in place of "ragged" (`_has_small_experts`).
    config.moe.dispatch = "ragged"
    config.moe.capacity_factor = 1.25  # room of an expert by dispatch = "capacity", times its even share
    config.moe.expert_dropout_rate = 0.1  # in router training
    # Of the CLIP-MoE's initial routers. 0: all tokens begin with the first experts, as many as are selected.
    config.moe.router_stddev = 0.02
    config.moe.routing = "token"  # or "token_and_sequence": routers also see the mean over the sequence
    config.moe.sequence_share = 4.0  # how often it is added to the token

    config.router = _phase(
        batch_size=800, learning_rate=1e-6, weight_decay=1e-2, warmup_steps=200, label_smoothing=0.1
    )
    # Or "features": routers learn to encode new pairs as the last of moe.experts, in the blocks that have
    # experts, and what they rehearse to "distill" as the base does.
    config.router.loss = "contrastive"
    # Experts whose gates get a gradient: those that a token chose, or "all", so that a router learns what it
    # missed. All then run on every token of a step; outputs are those of the chosen ones either way.
    config.router.gradient = "chosen"
    config.router.balance = "paper"  # the load-balance loss of the paper, or of the "released" code
    config.router.balance_coefficient = 0.01  # its weight
    config.router.z_loss_coefficient = 0.0  # weight of ST-MoE's loss, which keeps logits small

    for section in FINE_TUNING_SECTIONS:
        config[section].rehearsal_fraction = 0.0  # this share of a phase's batches is of data.rehearsal
        # Learned by the contrastive loss, or "distill": by the base's similarities of their images and
        # captions, which need not belong together.
        config[section].rehearsal = "pairs"

    config.loss = ConfigDict()
    # Above 0: Long-CLIP's second loss, of first sentences with the principal components of images.
    config.loss.short_caption_weight = 0.0
    config.baselines = ()  # names of baselines in dmu/recipes.py
    # {name of a baseline: {field: value}}: hyperparameters in place of its section's, such as "batch_size"
    config.baseline_settings = ConfigDict()
    # Models that are also measured blended with the base, weight by weight: names of dense ones among
    # "mcl_1", …, "consolidation" and the baselines.
    config.blends = ()
    config.evaluations = ()  # of each model: lines such as "zero_shot:data/imagenet?classes=imagenet"
    # One more line, of what the base knew: the column "old" beside the test set's recall.
    config.retention = ""  # such as "zero_shot:data.retention" or "zero_shot:data/imagenet?classes=imagenet"
    config.mesh = ConfigDict()
    config.mesh.data = -1  # over how many devices batches are split; -1 is all that are left
    config.mesh.fsdp = 1  # over how many parameters are
    config.mesh.expert = 1  # over how many experts are
    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # what a kill can cost
    config.checkpoint.max_to_keep = 2  # of a phase
    config.validation = ConfigDict()
    config.validation.every_steps = 0  # steps between measurements of recall on data.validation; 0 is never
    config.validation.keep_best = False  # ends each phase with the params that had the highest recall
    config.log_every = 10  # steps between lines of metrics.jsonl
    config.wandb = ""  # a project of Weights & Biases (pip install wandb); "" sends nothing there
    config.lock()
    return config


def set_architecture(config: ConfigDict, variant: str | ClipConfig, context_length: int = 248) -> None:
    """Makes a variant ("ViT-B/32", …) the dense base, its 77 text positions stretched to `context_length`.

    The activation of a variant is left to the base's checkpoint: LAION's models have another than OpenAI's.
    An architecture in place of a variant's name is taken as it is.
    """
    if isinstance(variant, ClipConfig):
        architecture = ConfigDict(variant.to_dict())
    elif variant in VARIANTS:
        architecture = ConfigDict(VARIANTS[variant].to_dict() | {"activation": None})
        architecture.text.context_length = context_length
    else:
        raise ValueError(f"variant {variant!r} is not known: choose one of {', '.join(VARIANTS)}")
    _type_optional(architecture)
    config.base.architecture = architecture


def config_of_model(architecture: ClipConfig) -> ConfigDict:
    """Returns the default config with an architecture as its base: by it a loaded model computes."""
    config = default_config()
    set_architecture(config, architecture)
    return config


def _type_optional(architecture: ConfigDict) -> None:
    """Gives fields that are None their type, without which no flag could set them."""
    for field, kind in OPTIONAL.items():
        tower, _, name = field.rpartition(".")
        section = architecture[tower] if tower else architecture
        if section is not None:
            section[name] = FieldReference(section[name], field_type=kind)


def set_variants(config: ConfigDict, variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes a config a sweep over {name: {dotted field: value}}; `variant_configs` checks it."""
    config.variants = ConfigDict({n: dict(fields) for n, fields in variants.items()}, allow_dotted_keys=True)


def variant_configs(config: ConfigDict, errors: Errors | None = None) -> dict[str, ConfigDict]:
    """Returns {name: config} of a sweep's variants, in order; of any other config {"": itself}.

    errors: collects what is wrong. Without it, raises ValueError naming each variant and field where a name
    is no folder's, a field does not exist, or its value is of another type.
    """
    if not config.variants:
        return {"": config}
    configs, found = {}, Errors() if errors is None else errors
    for name, fields in config.variants.items():
        if not re.fullmatch(r"\w[\w.=+-]*", name):
            found.add(f"variants: {name!r} must be the name of a folder: letters, digits and _.=+-")
        if name == "data":
            found.add("variants: 'data' is the folder of the data sets: choose another name")
        variant = ConfigDict(config.to_dict() | {"variants": {}})
        _type_optional(variant.base.architecture)
        variant.lock()
        for field, value in fields.items():
            with found.of(label(name)):
                _set_field(variant, field, value)
        configs[name] = variant
    if errors is None:
        found.raise_all()
    return configs


def label(variant: str) -> str:
    """Returns what errors call a variant; "" is a config without variants, which needs no name."""
    return f"variants.{variant}" if variant else ""


def _set_field(config: ConfigDict, field: str, value: Any) -> None:
    *groups, last = field.split(".")
    section = config
    for group in groups:
        section = section.get(group) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section or field in ("seeds", "variants"):
        raise ValueError(f"{field!r} is not a field that a variant can set, such as 'mcl.num_stages'")
    kind = section.get_type(last)
    if kind is ConfigDict:
        raise ValueError(f"{field!r} is a group of fields: set them one by one")
    check_type(field, value, kind)
    section[last] = value


def check_type(field: str, value: Any, kind: type) -> None:
    """Raises ValueError for a value that is not of a field's type; a list may stand for a tuple, an int for
    a float."""
    given = list if isinstance(value, tuple) else type(value)
    if given is not (list if kind is tuple else kind) and (given, kind) != (int, float):
        raise ValueError(f"{field}={value!r} must be of type {kind.__name__}")


def keep_old(config: ConfigDict) -> None:
    """Sets the recipe of docs/keeping.md, for new detail and what the base knew in one model.

    `data.rehearsal`, rates and the length of consolidation are left to the config.
    """
    config.mcl.init_from = "previous"
    # Routers begin at zero, where all tokens go to the first two experts: one of the old, one of the new. A
    # block may still come to send all tokens to the two of the new: gradients for the experts that were not
    # chosen lead it back.
    config.moe.experts = ("base", "last_stage", "base", "consolidation")
    config.moe.expert_layers = "attention_and_feed_forward"
    config.moe.router_stddev = 0.0
    config.moe.routing = "token_and_sequence"
    config.router.update(loss="features", gradient="all", balance_coefficient=0.0)
    config.router.update(rehearsal="distill", rehearsal_fraction=0.25)


def run_locally(config: ConfigDict) -> None:
    """Shrinks a config to a few small steps on 64 pairs, to see on a laptop that the full model runs."""
    config.data.train_split, config.data.test_split = "train[:64]", "test[:64]"
    for section in map(config.get, FINE_TUNING_SECTIONS):
        if not (section.num_steps or section.num_epochs):  # off
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
    """Returns the base's architecture; an activation that is not known yet is OpenAI's."""
    fields = config.base.architecture.to_dict()
    return ClipConfig.from_dict(fields | {"activation": fields["activation"] or ClipConfig.activation})


def base_checkpoint(config: ConfigDict) -> str:
    """Returns the path of the base's checkpoint, "" if there is none.

    The field may begin with `~`, or be a name of `hub.local_path`, which raises for what is not there.
    """
    return hub.local_path(os.path.expanduser(config.base.checkpoint))


def moe_config(config: ConfigDict) -> MoeConfig:
    """Returns the CLIP-MoE's mixture."""
    return MoeConfig(
        num_experts=num_experts(config),
        num_selected_experts=config.moe.num_selected_experts,
        num_moe_layers=config.moe.num_moe_layers or None,
        expert_layers=config.moe.expert_layers,
        sequence_share=config.moe.sequence_share if config.moe.routing == "token_and_sequence" else 0.0,
    )


def num_experts(config: ConfigDict) -> int:
    """Returns how many experts the CLIP-MoE has."""
    return (len(config.moe.experts) or config.mcl.num_stages + 1) - 1 + num_base_experts(config)


def num_base_experts(config: ConfigDict) -> int:
    """Returns how many experts the base brings: 1 if it is dense."""
    return config.base.architecture.moe.num_experts if extends(config) else 1


def extends(config: ConfigDict) -> bool:
    """Returns whether the base is a CLIP-MoE, which the run extends: the checkpoint says so."""
    return config.base.architecture.moe is not None


def consolidates(config: ConfigDict) -> bool:
    """Returns whether the last stage is trained on with ordinary batches."""
    return bool(config.consolidation.num_steps or config.consolidation.num_epochs)


def compute_config(
    config: ConfigDict, platform: str, *, training_routers: bool = False, router_gradient: str = "chosen"
) -> ComputeConfig:
    """Returns how models are computed on a platform.

    platform: as `sharding.platform`. It decides how attention and the experts run. Ragged dispatch is the
    exact one that computes least, unless every token visits every expert (router_gradient="all"): then there
    is nothing to sort. So it is on CPU where experts are small. compute.remat="auto" is "none" here:
    who trains chooses first (`planning.memory.choose_remat`).
    """
    dtype = config.compute.dtype or ("float32" if platform == "cpu" else "bfloat16")
    dispatch = config.moe.dispatch
    if dispatch == "ragged" and (router_gradient == "all" or _has_small_experts(config, platform)):
        dispatch = "dense"
    return ComputeConfig(
        dtype=dtype,
        remat="none" if config.compute.remat == "auto" else config.compute.remat,
        dispatch=dispatch,
        grouped_mlp=default_grouped_mlp(platform, dtype),
        attention=default_implementation(platform, dtype),
        mlp_chunk_rows=1024 if platform == "cpu" else 0,
        encoded_values=ENCODED_VALUES if platform == "cpu" else 0,
        capacity_factor=config.moe.capacity_factor,
        expert_dropout_rate=config.moe.expert_dropout_rate if training_routers else 0.0,
        router_gradient=router_gradient,
        compiler_options=CPU_OPTIONS if platform == "cpu" else (),
    )


def _has_small_experts(config: ConfigDict, platform: str) -> bool:
    """Returns whether "ragged" is "dense" here: on CPU, where all experts of small towers run on all tokens
    sooner than the loops of "ragged" compile."""
    architecture = config.base.architecture
    widest = max(tower.width for tower in (architecture.vision, architecture.text) if tower is not None)
    return platform == "cpu" and widest <= SMALL_WIDTH


def parse_seeds(arg: str) -> tuple[int, ...]:
    """Returns the seeds of a config's argument: "3" is 1 to 3, "21-30" is 21 to 30, "" is none.

    Raises ValueError for anything else.
    """
    if not arg:
        return ()
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)", arg)
    seeds = tuple(range(int(match[1] or 1), int(match[2]) + 1)) if match else ()
    if not seeds:
        raise ValueError(
            f"seeds={arg!r}: give a number, 3 for seeds 1 to 3, or the first and the last, 21-30"
        )
    return seeds


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
    return without_effectless(upgraded)


def without_effectless(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an artifact's inputs ({dotted field: value}) without fields that change no result.

    The gradient of a batch is the same in any number of microbatches, and a base from a checkpoint is not
    trained.
    """
    is_imported = bool(inputs.get("base.checkpoint"))
    return {
        name: value
        for name, value in inputs.items()
        if not name.endswith(".accumulation_steps") and not (is_imported and name.startswith("base.train."))
    }
