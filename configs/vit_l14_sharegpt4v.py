"""The paper's run (arXiv 2409.19291): OpenAI's ViT-L/14 and ShareGPT4V become a CLIP-MoE of four experts.

    python -m clipmoe_jax.prepare --source=sharegpt4v:share-captioner_coco_lcs_sam_1246k_1107.json \\
        --images=DATA --out=data/sharegpt4v
    python -m clipmoe_jax.prepare --source=coco:annotations/captions_val2017.json --images=val2017 \\
        --out=data/coco_val --split=test
    python -m clipmoe_jax.main --config=configs/vit_l14_sharegpt4v.py --workdir=runs/l14 \\
        --config.base.checkpoint=clip-vit-large-patch14 --config.data.train=data/sharegpt4v \\
        --config.data.test=data/coco_val

The base is a Hugging Face CLIPModel folder, a state dict in OpenAI's names or a dense checkpoint of the
released code; 77 text positions are stretched to 248.

Hardware: the paper used 8 A100 (80 GB), half an hour for each of the three stages and half an hour for the
routers, 64 GiB a GPU at batch 100 each. Here one H100 takes 131 ms for an MCL step of 100 pairs and 192 ms
for a router step, in 26.8 and 27.3 GiB; on smaller devices the backward pass computes norms and activations
again (`compute.remat`): 141 and 190 ms in 18.8 and 24.1 GiB (benchmarks/gpu.py). On one GPU add
`--config.mcl.accumulation_steps=8 --config.router.accumulation_steps=8`: the same global batch in eight
parts.

To expect (the paper, recall@1 %): COCO 5k image-to-text 65.0, text-to-image 46.8; the base 56.1 and 35.4;
direct fine-tuning 63.3 and 44.5. Not yet reproduced with this code.

Arguments: init_from=previous chains the stages, as `:keep` does, and base starts each from the base;
runlocal takes 64 pairs and a few steps of small batches, so that a laptop can try the machinery on any
prepared data set.

`:keep` is the recipe of docs/keeping.md, for the new detail and what the base knew, with its dense controls:

    python -m clipmoe_jax.main --config=configs/vit_l14_sharegpt4v.py:keep --workdir=runs/l14_keep \\
        --config.base.checkpoint=clip-vit-large-patch14 --config.data.train=data/sharegpt4v \\
        --config.data.test=data/coco_val --config.data.rehearsal=data/web \\
        --config.retention='zero_shot:data/imagenet?classes=imagenet'

data/web holds some thousand images and short captions of the kind that the base was trained on, prepared
from img2dataset's output, say; data/imagenet is ImageNet's validation set, prepared from classes:DIR. The
routers' rate is not the paper's 1e-6, at which an epoch of Adam moves a weight by at most 0.0016: here they
begin at zero and have to learn. Planned for 8 H100: 31 minutes, with both controls 58 (clipmoe_jax.plan).
With `compute.remat=dots` one H100 takes 173 ms for an MCL step of 100 pairs (MFU 0.35) and 390 ms for a
router step (0.40), in 20.4 and 39.9 GiB. Nobody has trained it at this size.
"""

from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, keep_old, parse_arg, run_locally


def get_config(arg: str = "") -> ConfigDict:
    """The defaults of `default_config` are this run, but for baselines."""
    arg = parse_arg(arg, init_from="", runlocal=False, keep=False)
    config = default_config()
    config.baselines = ("direct_ft", "feature_ensemble")
    if arg.keep:
        keep_old(config)
        config.consolidation.num_epochs = 1
        config.router.learning_rate = 1e-3
        config.baselines = ("direct_ft_same_pairs", "curriculum_distilled_same_pairs")
    if arg.init_from:
        config.mcl.init_from = arg.init_from
    if arg.runlocal:
        run_locally(config)
    return config
