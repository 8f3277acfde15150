"""What trains in each kind of phase, and what the models are called in tables."""

TRAIN_EVERYTHING = [(r".*", True)]
TRAIN_FFN = [(r"(visual|text)/resblocks_\d+/mlp/.*", True), (r".*", False)]
TRAIN_ROUTERS = [(r".*/moe/router/kernel", True), (r".*", False)]
TRAIN_MOE = [(r".*/moe/.*", True), (r".*", False)]

CLIP_MOE, ENSEMBLE = "CLIP-MoE", "feature ensemble"
BASELINE_TITLES = {
    "direct_ft": "direct fine-tuning, one stage's steps",
    "direct_ft_same_pairs": "direct fine-tuning, same total pairs",
    "full_ft": "full fine-tuning, one stage's steps",
    "long_clip": "Long-CLIP's recipe",
    "sparse_upcycling": "sparse upcycling",
    "drop_upcycling": "Drop-Upcycling",
    "clip_up": "CLIP-UP's recipe",
    "base_ft_moe": "base + FT MoE",
}
