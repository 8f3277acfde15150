"""The smallest run that has every kind of stage: the config of the tests beside it, also for the commands.

python -m clipmoe_jax.main --config=tests/pipeline/tiny_config.py:whole --workdir=WORKDIR
"""

from clipmoe_jax.config import default_config, parse_arg, set_architecture
from clipmoe_jax.dmu.recipes import BASELINES
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig


def get_config(arg=""):
    """One stage and consolidation, a handful of steps of each phase, a checkpoint every other step.

    Arguments: `whole` adds a second stage, a dense, an upcycled and a distilled baseline, an evaluation,
    retention, a blend, validation, and captions of their own for what is distilled;
    `baselines` is `whole` with every baseline but those that differ from others in their length alone.
    """
    arg = parse_arg(arg, whole=False, baselines=False)
    config = default_config()
    config.data.train = "digit_scenes:train?pairs=64"
    config.data.test = "digit_scenes:test?pairs=8"
    config.data.base = "digit_scenes:train?pairs=64&captions=coarse"
    config.data.in_memory = True
    architecture = ClipConfig(
        embed_dim=16,
        vision=VisionConfig(image_size=32, patch_size=16, width=16, num_layers=1, head_width=8),
        text=TextConfig(context_length=32, width=16, num_layers=1, head_width=8),
    )
    set_architecture(config, architecture)
    for section in (config.base.train, config.mcl, config.consolidation, config.router):
        # A large eps: Adam would make a step of what is rounding alone, and that differs between meshes.
        section.update(batch_size=16, num_steps=7, warmup_steps=1, learning_rate=1e-2, eps=1e-3)
    config.mcl.num_stages = 1
    config.moe.experts = ("base", "base", "last_stage", "consolidation")
    config.moe.routing = "token_and_sequence"
    if not arg.baselines:  # one of which is of feed-forward layers
        config.moe.expert_layers = "attention_and_feed_forward"
    config.data.rehearsal = "digit_scenes:test?pairs=16&captions=coarse&seed=1"
    config.consolidation.rehearsal_fraction, config.router.rehearsal_fraction = 0.3, 0.3
    config.router.update(rehearsal="distill", loss="features", gradient="all")
    config.embed.batch_size = 16
    config.checkpoint.every_steps = 2
    config.log_every = 1
    config.moe.expert_dropout_rate = 0.0  # whose masks depend on the mesh
    if arg.whole or arg.baselines:
        config.mcl.num_stages = 2
        every = tuple(row.name for row in BASELINES if not row.name.endswith("_same_flops"))
        few = ("long_clip", "clip_up", "distilled", "feature_ensemble")
        config.baselines = every if arg.baselines else few
        config.blends = ("consolidation",)
        config.data.rehearsal_captions = "glyphs:train?pairs=20"
        config.evaluations = ("attributes:data.test",)
        config.data.validation, config.validation.every_steps = "digit_scenes:test?pairs=8&seed=2", 4
        config.data.retention, config.retention = "glyphs:test?pairs=16", "zero_shot:data.retention"
    return config
