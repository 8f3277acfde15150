"""ViT-B/32 as a CLIP-MoE: the recipe at a size for one GPU.

    python -m clipmoe_jax.main --config=configs/vit_b32.py:keep --workdir=runs/b32 \\
        --config.base.checkpoint=hf-hub:openai/clip-vit-base-patch32 --config.data.train=data/train \\
        --config.data.test=data/test --config.data.rehearsal=data/general
    python -m clipmoe_jax.main --config=configs/vit_b32.py --workdir=runs/published \\
        --config.base.checkpoint=hf-hub:openai/clip-vit-base-patch32 --config.data.train=data/train \\
        --config.data.test=data/test

`:keep` is the recipe of docs/keeping.md, for the new detail and what the base knew; data/general holds
images and captions of the kind that the base knows, at least one batch of the routers. Without `:keep`, the
published recipe, whose routers see the new data alone. The folders are made by clipmoe_jax.prepare. Another
base of this size is another name, such as `open_clip:ViT-B-32/laion2b_s34b_b79k` (docs/interop.md); another
ViT: `vit_b32.py:variant=ViT-B/16`. Hardware: meant for one GPU: the batch of 800 in eight parts (not
measured yet).

Arguments: keep; variant; init_from=previous (the default here: chained stages) or base; baselines trains the
dense models of docs/keeping.md beside it, for about twice as long, without keep those of published recipes;
runlocal.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, keep_old, parse_arg, run_locally, set_architecture
from clipmoe_jax.dmu.recipes import OF_PAPERS


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe on a smaller tower, stages chained; arguments as above."""
    arg = parse_arg(
        arg, keep=False, variant="ViT-B/32", init_from="previous", baselines=False, runlocal=False
    )
    config = default_config()
    set_architecture(config, arg.variant)
    baselines = OF_PAPERS
    if arg.keep:
        keep_old(config)
        config.consolidation.num_epochs = 1
        config.router.learning_rate = 1e-3
        baselines = ("direct_ft_same_pairs", "curriculum_distilled_same_pairs")
    config.mcl.init_from = arg.init_from
    for section in (config.mcl, config.consolidation, config.router):
        section.accumulation_steps = 8
    config.baselines = baselines if arg.baselines else ()
    if arg.runlocal:
        run_locally(config)
    return config
