"""Chooses the share of a device's peak that a training step is planned to have: measured, predicted or
assumed."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.models.clip import VARIANTS, ClipConfig
from clipmoe_jax.models.transformer import ComputeConfig

ASSUMED = 0.4
# Of what a step computes, by accelerator, kind of step, and remat (cuDNN's attention is not computed again):
# steps of ViT-L/14 with 100 pairs of 248 tokens in bfloat16 (benchmarks/results/h100.jsonl, h200.jsonl).
MEASURED = {
    ("h100", "dense", "dots"): 0.377,
    ("h100", "dense", "none"): 0.405,
    ("h100", "experts", "dots"): 0.345,
    ("h100", "experts", "none"): 0.340,
    ("h100", "experts of attention too, all of them", "dots"): 0.402,
    ("h200", "dense", "none"): 0.430,
    ("h200", "experts", "none"): 0.361,
}
TABLE = pathlib.Path(__file__).with_name("roofline.json")


class Mfu(NamedTuple):
    """The share of the peak that the model's products have, and whether it was "given", "measured",
    "predicted" or "assumed"."""

    share: float
    source: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A step that roofline.py predicted, in bfloat16.

    step: as of `step_of`. mfu: as defined, for a step that computes `computed` times what it counts.
    assumed: of the milliseconds those of kernels that nobody measured.
    """

    accelerator: str
    variant: str
    step: str
    remat: str
    pairs: int
    milliseconds: float
    assumed: float
    mfu: float
    computed: float
    jax: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Returns what there is one row of."""
        return self.accelerator, self.variant, self.step, self.remat


def mfu_of(
    accelerator: str, config: ClipConfig, compute: ComputeConfig, computed: float, given: float | None
) -> Mfu:
    """Returns the MFU of a step of a model on an accelerator of ACCELERATORS: what is given, else measured,
    else predicted, else assumed.

    computed: how many times what MFU counts the step computes.
    """
    if given is not None:
        return Mfu(given, "given")
    step = step_of(config, compute)
    measured = MEASURED.get((accelerator, step, compute.remat))
    if measured is not None and config.vision == VARIANTS["ViT-L/14"].vision:
        return Mfu(measured / computed, "measured")
    if row := read_rows().get((accelerator, variant_of(config), step, compute.remat)):
        return Mfu(row.mfu * row.computed / computed, "predicted")
    return Mfu(ASSUMED, "assumed")


def step_of(config: ClipConfig, compute: ComputeConfig) -> str:
    """Returns "dense", "experts" (of feed-forward layers) or "experts of attention too", which either may be
    followed by ", all of them": a token of the step visits every expert."""
    if config.moe is None:
        return "dense"
    step = "experts of attention too" if config.moe.has_attention else "experts"
    return f"{step}, all of them" if compute.router_gradient == "all" else step


def variant_of(config: ClipConfig) -> str:
    """Returns the name that an architecture has in VARIANTS, with the length of its captions; "" if none."""
    for name, variant in VARIANTS.items():
        assert variant.text is not None
        if config.text and config.vision == variant.vision:
            text = dataclasses.replace(variant.text, context_length=config.text.context_length)
            if config.text == text:
                return f"{name}, {text.context_length} tokens"
    return ""


@functools.cache
def read_rows() -> dict[tuple[str, str, str, str], Row]:
    """Returns the table of predicted steps."""
    rows = [Row(**row) for row in read_json(TABLE, list)]
    return {row.key: row for row in rows}


def write_rows(rows: Iterable[Row]) -> None:
    """Puts rows into the table, each in place of the one with its key."""
    merged = read_rows() | {row.key: row for row in rows}
    lines = [json.dumps(dataclasses.asdict(merged[key])) for key in sorted(merged)]
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    read_rows.cache_clear()
