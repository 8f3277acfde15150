"""ViT-B/32 as a CLIP-MoE: the recipe at a size for one GPU, with every baseline of published recipes.

    python -m clipmoe_jax.main --config=configs/vit_b32.py --workdir=runs/b32 \\
        --config.base.checkpoint=hf-hub:openai/clip-vit-base-patch32 --config.data.train=data/train \\
        --config.data.test=data/test

`data/train` and `data/test` are made by clipmoe_jax.prepare. Another base of this size is another name, such
as `open_clip:ViT-B-32/laion2b_s34b_b79k` (docs/interop.md); another ViT: `vit_b32.py:variant=ViT-B/16`.
Hardware: meant for one GPU: remat, and the batch of 800 in eight parts (not measured yet). The paper has no
numbers at this size, so every baseline is trained beside it.

Arguments: variant; init_from=previous (the default here: chained stages) or base; runlocal.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, parse_arg, run_locally, set_architecture
from clipmoe_jax.dmu.recipes import OF_PAPERS


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe on a smaller tower, stages chained."""
    arg = parse_arg(arg, variant="ViT-B/32", init_from="previous", runlocal=False)
    config = default_config()
    set_architecture(config, arg.variant)
    config.mcl.init_from = arg.init_from
    config.compute.remat = "dots"
    config.mcl.accumulation_steps = config.router.accumulation_steps = 8
    config.baselines = OF_PAPERS
    if arg.runlocal:
        run_locally(config)
    return config
