"""All of CLIP-MoE on a laptop CPU in a few minutes: synthetic scenes, a tiny CLIP, DMU and its baselines.

    python -m clipmoe_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m clipmoe_jax.main --config=configs/demo.py:seeds=3 --workdir=runs/demo3
    python -m clipmoe_jax.main --config=configs/demo.py:all_baselines --workdir=runs/baselines
    python -m clipmoe_jax.main --config=configs/demo.py:small --workdir=runs/small

`seeds=3` runs seeds 1 to 3 and prints means, standard deviations and paired differences; `all_baselines` adds
full fine-tuning and the recipes of Long-CLIP, Drop-Upcycling and CLIP-UP (clipmoe_jax/dmu/recipes.py);
`small` is a quick check of the machinery, whose numbers mean nothing.

The scenes are real handwriting composed into 32 x 32 images with eight attributes; the base sees coarse
captions, so that it tells random batches apart by three easy attributes, and ordinary fine-tuning saturates
on them.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, parse_arg, set_architecture
from clipmoe_jax.dmu.recipes import baseline_names
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig

FIVE = ("direct_ft", "direct_ft_same_pairs", "base_ft_moe", "sparse_upcycling", "feature_ensemble")


def get_config(arg: str = "") -> ConfigDict:
    """Arguments: seeds=N runs seeds 1 to N; all_baselines; small shrinks everything."""
    arg = parse_arg(arg, seeds=0, small=False, all_baselines=False)
    config = default_config()
    config.seeds = tuple(range(1, arg.seeds + 1)) if arg.seeds else (0,)
    num_pairs = 800 if arg.small else 8000
    config.data.train = f"digit_scenes:train?pairs={num_pairs}"
    config.data.test = f"digit_scenes:test?pairs={num_pairs // 8}"
    config.data.base = f"digit_scenes:train?pairs={num_pairs}&captions=coarse"
    config.evaluations = ("attributes:data.test",)
    config.data.in_memory = True
    config.data.packing_steps = 4  # each number of rows is a step to compile: longer than they save
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
    config.baselines = baseline_names() if arg.all_baselines else FIVE
    config.checkpoint.every_steps = 100
    if arg.small:
        config.base.train.num_steps = 60
        config.mcl.num_steps = 24
        config.router.num_steps = 24
        config.checkpoint.every_steps = 10
        config.data.packing_steps = 2
    return config
