"""ViT-L/14 on one million pairs of Recap-DataComp: the paper's second data set.

    python -m clipmoe_jax.main --config=configs/vit_l14_recap_datacomp.py --workdir=runs/l14_recap \\
        --config.base.checkpoint=clip-vit-large-patch14 --config.data.train=data/recap_datacomp_1m \\
        --config.data.test=data/coco_val

`data/recap_datacomp_1m` is made by clipmoe_jax.prepare, of what img2dataset downloaded (docs/data.md), and
has a million good pairs or more; for fewer set --config.data.train_split=train. Hardware and time as
vit_l14_sharegpt4v.py, whose recipe this is.

To expect (the paper, recall@1 %): COCO 5k image-to-text 64.0, text-to-image 45.2; Flickr30k (all 31k images)
56.8 and 40.8; ImageNet 74.3. Not yet reproduced with this code. Arguments: init_from and runlocal
as in vit_l14_sharegpt4v.py.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, parse_arg, run_locally


def get_config(arg: str = "") -> ConfigDict:
    """The paper's recipe on the first million pairs of the prepared set."""
    arg = parse_arg(arg, init_from="base", runlocal=False)
    config = default_config()
    config.data.train_split = "train[:1000000]"
    config.mcl.init_from = arg.init_from
    config.baselines = ("direct_ft", "feature_ensemble")
    if arg.runlocal:
        run_locally(config)
    return config
