"""CLIP-MoE on a laptop CPU in a few minutes: new detail for a tiny CLIP that keeps all that it knew.

    python -m clipmoe_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m clipmoe_jax.main --config=configs/demo.py:controls,flops,seeds=51-60 --workdir=runs/keeping
    python -m clipmoe_jax.main --config=configs/demo.py:paper --workdir=runs/paper
    python -m clipmoe_jax.main --config=configs/demo.py:paper,all_baselines --workdir=runs/baselines
    python -m clipmoe_jax.main --config=configs/demo.py:extend=runs/demo --workdir=runs/extended
    python -m clipmoe_jax.main --config=configs/demo.py:small --workdir=runs/small

The base learns two worlds: scenes of real handwriting with eight attributes, of which its coarse captions
name three, and 400 glyphs with names. Fine-tuning sees scenes alone, with detailed captions. "R@1" on test
scenes is the new detail; "old", zero-shot accuracy over the glyphs' names, is what is left of what the base
knew (docs/keeping.md).

    seeds      N runs seeds 1 to N, 51-60 those: means, standard deviations and paired differences
    controls   what docs/keeping.md compares: models of as many pairs, ensembles, blends of dense ones
    flops      with controls: also models of as many FLOPs
    feed_forward   experts of feed-forward layers alone; with controls also the CLIP-MoE as published
    paper      the published recipe on scenes alone, with the baselines of the paper
    all_baselines  with paper: also full fine-tuning and the recipes of Long-CLIP, Drop-Upcycling and CLIP-UP
    extend     =WORKDIR of a run of this config: its CLIP-MoE learns 400 other glyphs (docs/extend.md)
    small      a quick check of the machinery, whose numbers mean nothing
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, keep_old, parse_arg, parse_seeds, set_architecture
from clipmoe_jax.dmu.recipes import OF_PAPERS
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig

SHOWN = ("direct_ft_same_pairs", "curriculum_distilled_same_pairs", "base_curriculum_ensemble")
DENSE = (
    *("direct_ft", "direct_ft_rehearsed", "full_ft", "full_ft_rehearsed", "lora", "lora_rehearsed"),
    *("curriculum", "curriculum_rehearsed", "curriculum_distilled", "curriculum_rehearsed_throughout"),
)
UPCYCLED = ("sparse_upcycling", "drop_upcycling")
OTHERS = ("base_curriculum_ensemble", "base_rehearsed_ensemble")
FROM_BASE = ("direct_ft", "full_ft", "lora", *UPCYCLED)
FIVE = ("direct_ft", "direct_ft_same_pairs", "base_ft_moe", "sparse_upcycling", "feature_ensemble")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the demo's config; arguments as above."""
    arg = parse_arg(
        arg,
        seeds="",
        small=False,
        controls=False,
        flops=False,
        feed_forward=False,
        paper=False,
        all_baselines=False,
        extend="",
    )
    if (arg.all_baselines and not arg.paper) or (arg.paper and arg.controls) or (arg.flops > arg.controls):
        raise ValueError("all_baselines goes with paper, flops with controls, and paper not with controls")
    config = default_config()
    config.seeds = parse_seeds(arg.seeds) or (0,)
    num_pairs = 800 if arg.small else 8000
    config.data.train = f"digit_scenes:train?pairs={num_pairs}"
    config.data.test = f"digit_scenes:test?pairs={num_pairs // 8}"
    config.data.base = f"digit_scenes:train?pairs={num_pairs}&captions=coarse"
    config.evaluations = ("attributes:data.test",)
    config.data.in_memory = True
    architecture = ClipConfig(
        embed_dim=64,
        vision=VisionConfig(image_size=32, patch_size=16, width=64, num_layers=2, head_width=32),
        text=TextConfig(context_length=32, width=64, num_layers=2, head_width=32),
    )
    set_architecture(config, architecture)

    common = dict(b2=0.98, clip_norm=1.0, warmup_steps=20, label_smoothing=0.0, learning_rate=2e-3)
    config.base.train.update(common, batch_size=128, num_steps=250, weight_decay=0.1)
    config.mcl.update(common, batch_size=32, num_steps=480, weight_decay=0.1)
    config.mcl.init_from = "previous"
    config.router.update(common, batch_size=128, num_steps=240, weight_decay=0.01)
    config.router.learning_rate = 1e-2
    config.moe.expert_dropout_rate = 0.0
    config.embed.batch_size = 500
    config.checkpoint.every_steps = 500  # a run lasts minutes
    config.baselines = OF_PAPERS if arg.all_baselines else FIVE
    if not arg.paper:
        published_routers = {name: config.router[name] for name in ("batch_size", "num_steps")}
        _keep(config, num_pairs)
        if arg.feed_forward:
            config.moe.expert_layers = "feed_forward"
        else:  # whole blocks: at twice the rate, consolidation's, hard clusters lead some seeds astray
            config.mcl.learning_rate = 1e-3
        config.baselines = SHOWN
        if arg.controls:
            budgets = ("pairs", "flops") if arg.flops else ("pairs",)
            names = (*DENSE, *UPCYCLED)
            config.baselines = (*(f"{name}_same_{budget}" for budget in budgets for name in names), *OTHERS)
            config.blends = (*(f"{name}_same_pairs" for name in DENSE), "consolidation")
        # What trains on ordinary batches from the base does so as consolidation does.
        from_base = [n for n in config.baselines if n.startswith(FROM_BASE)]
        ordinary = {field: config.consolidation[field] for field in ("batch_size", "learning_rate")}
        settings = {name: dict(ordinary) for name in (*from_base, "distilled")}
        for name in from_base:
            if name.startswith("lora"):  # chosen like the others' 2e-3, on the same seeds
                settings[name]["learning_rate"] = 8e-3
        if arg.controls and arg.feed_forward:
            config.baselines = (*config.baselines, "published_moe")
            # Its loss compares the pairs of a batch: routers as of the recipe for scenes alone.
            settings["published_moe"] = published_routers
        config.baseline_settings = ConfigDict(settings)
    if arg.extend:
        _extend(config, arg.extend, num_pairs)
    if arg.small:
        config.base.train.num_steps = 60
        for section in (config.mcl, config.router, config.consolidation):
            section.num_steps = 24 if section.num_steps else 0
        config.checkpoint.every_steps = 10
    return config


def _keep(config: ConfigDict, num_pairs: int) -> None:
    """What makes new detail and old knowledge one model."""
    config.data.base += f",glyphs:train?pairs={num_pairs * 3 // 4}"
    config.data.retention, config.retention = "glyphs:test?pairs=2000", "zero_shot:data.retention"
    config.base.train.num_steps = 1000
    consolidation = {name: config.mcl[name] for name in config.consolidation if name in config.mcl}
    config.consolidation.update(consolidation, batch_size=128, num_steps=240)
    keep_old(config)
    # Of what the base learned from, 500 glyphs. Scenes would teach images to be as the base has them, which
    # contradicts the new detail.
    config.data.rehearsal = "glyphs:train?pairs=500"
    # Each pair has a target of its own, so that small batches teach routers as much as large ones.
    config.router.update(batch_size=16, num_steps=480)


def _extend(config: ConfigDict, workdir: str, num_pairs: int) -> None:
    """What adds an expert of other glyphs to the CLIP-MoE that lies in another run's workdir."""
    config.base.checkpoint = f"{workdir}/moe/params"
    config.base.logit_scale = 0.0  # the checkpoint's
    config.data.train = f"glyphs:train?pairs={num_pairs * 3 // 4}&alphabet=1"
    config.data.test = "glyphs:train?pairs=400&alphabet=1&seed=1000"
    # Of all that the mixture learned: what the other run's base knew, and its new data.
    config.data.rehearsal = "glyphs:train?pairs=500,digit_scenes:train?pairs=500"
    config.router.rehearsal_fraction = 0.5
    config.evaluations = (f"retrieval:{workdir}/data/test",)
    config.mcl.num_stages, config.consolidation.num_steps = 1, 480
    config.moe.experts = ("base", "consolidation")
    config.baselines, config.baseline_settings = (), ConfigDict()
