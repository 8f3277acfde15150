"""Chooses the share of a device's peak that a training step is planned to have: measured, or assumed."""

from typing import NamedTuple

from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.transformer import ComputeConfig

ASSUMED = 0.4
# Of what a step computes, with what it computes again, by accelerator, whether the model has experts, and
# remat: steps of ViT-L/14 with 100 pairs of 248 tokens in bfloat16 (benchmarks/results/h100.jsonl).
MEASURED = {
    ("h100", False, "dots"): 0.343,
    ("h100", False, "none"): 0.396,
    ("h100", True, "dots"): 0.2365,
}
OF_LAYERS = 1024, 24  # width and number of ViT-L/14's vision tower


class Mfu(NamedTuple):
    """The share of the peak that the model's products have, and whether it was "given", "measured" or
    "assumed"."""

    share: float
    source: str


def mfu_of(
    accelerator: str, config: ClipConfig, compute: ComputeConfig, computed: float, given: float | None
) -> Mfu:
    """Returns the MFU of a step of a model on an accelerator of ACCELERATORS; what is given comes first.

    computed: how many times what MFU counts the step computes.
    """
    if given is not None:
        return Mfu(given, "given")
    measured = MEASURED.get((accelerator, config.moe is not None, compute.remat))
    if measured is None or (config.vision.width, config.vision.num_layers) != OF_LAYERS:
        return Mfu(ASSUMED, "assumed")
    return Mfu(measured / computed, "measured")
