"""ViT-L/14 at 336 pixels on ShareGPT4V: the tower that LLaVA-1.5 uses, as a CLIP-MoE.

    python -m clipmoe_jax.main --config=configs/vit_l14_336_sharegpt4v.py --workdir=runs/l14_336 \\
        --config.base.checkpoint=clip-vit-large-patch14-336 --config.data.train=data/sharegpt4v \\
        --config.data.test=data/coco_val

Data as in vit_l14_sharegpt4v.py. Hardware: meant for 8 GPUs of 80 GB; 577 image tokens in place
of 257, so more than twice its time (not measured yet). Expected numbers: the paper gives none for retrieval
at this size. Arguments: init_from and runlocal
as in vit_l14_sharegpt4v.py.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, parse_arg, run_locally, set_architecture


def get_config(arg: str = "") -> ConfigDict:
    """vit_l14_sharegpt4v with larger images."""
    arg = parse_arg(arg, init_from="base", runlocal=False)
    config = default_config()
    set_architecture(config, "ViT-L/14@336", context_length=248)
    config.mcl.init_from = arg.init_from
    config.baselines = ("direct_ft", "feature_ensemble")
    if arg.runlocal:
        run_locally(config)
    return config
