"""Rehearsal: batches of what a model knew before, among those of a phase.

Letters: N records, B pairs of this process's rows of a batch, f the share of a phase's steps that rehearse.
"""

import contextlib
import dataclasses
import fractions
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmoe_jax.data import loader
from clipmoe_jax.train.step import LossConfig


class Targets(NamedTuple):
    """Unit features of a model that is to be imitated, (N, embed) float32 each, of every record."""

    images: np.ndarray
    texts: np.ndarray


class Drawn(NamedTuple):
    """Records, and which of them a rehearsing step uses: the sampler counts these steps alone."""

    pairs: loader.Pairs
    sampler: loader.Sampler


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """Which steps of a phase rehearse, on what, by which loss.

    Attributes:
        records: the images, and their captions where there are no others.
        fraction: f. Step s rehearses where the whole part of (s + 1) f is above that of s f: evenly spread.
        loss: of these steps.
        targets: for a loss that distills; the texts are those of `captions` where there are such.
        captions: of other records, for a loss that distills: images and captions then do not belong together.
    """

    records: Drawn
    fraction: float
    loss: LossConfig
    targets: Targets | None = None
    captions: Drawn | None = None

    @property
    def drawn(self) -> tuple[Drawn, ...]:
        """Returns what images come from, and what captions do if that is another."""
        return (self.records, self.captions) if self.captions else (self.records,)

    def before(self, step: int) -> int:
        """Returns how many of the steps before this one rehearse."""
        return int(step * fractions.Fraction(self.fraction).limit_denominator(10**6))

    def rehearses(self, step: int) -> bool:
        """Returns whether a step rehearses."""
        return self.before(step + 1) > self.before(step)


def rows_of_phase(
    pairs: loader.Pairs,
    sampler: loader.Sampler,
    rehearsal: Rehearsal | None,
    *,
    num_steps: int,
    num_text_shards: int,
    row_cost: float,
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Returns the numbers of rows, as `loader.rows_of_batches` does, of a phase's own batches, and of those
    of each data set that it rehearses. num_steps: of the phase, all batches counted."""

    def rows(pairs, sampler, num_steps):
        return loader.rows_of_batches(pairs, sampler, num_steps, num_text_shards, row_cost)

    count = rehearsal.before(num_steps) if rehearsal else 0
    return rows(pairs, sampler, num_steps - count), [
        rows(*drawn, count) for drawn in (rehearsal.drawn if rehearsal else ())
    ]


@contextlib.contextmanager
def open_batches(
    pairs: loader.Pairs,
    sampler: loader.Sampler,
    rehearsal: Rehearsal | None,
    *,
    start_step: int,
    num_steps: int,
    caption_turns: loader.CaptionTurns,
    num_text_shards: int,
    row_cost: float,
    **options: Any,
) -> Iterator[Iterator[tuple[bool, loader.Batch]]]:
    """Opens an iterator over (whether it rehearses, batch) of a phase's last steps; arguments as of
    `loader.batches` and, row_cost, of `loader.rows_of_batches`."""

    own_rows, rehearsed_rows = rows_of_phase(
        pairs,
        sampler,
        rehearsal,
        num_steps=start_step + num_steps,
        num_text_shards=num_text_shards,
        row_cost=row_cost,
    )
    first = rehearsal.before(start_step) if rehearsal else 0
    count = rehearsal.before(start_step + num_steps) - first if rehearsal else 0
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(
            loader.batches(
                pairs,
                sampler,
                start_step=start_step - first,
                num_steps=num_steps - count,
                caption_turns=caption_turns,
                num_text_shards=num_text_shards,
                rows=own_rows,
                **options,
            )
        )
        if rehearsal is None:
            yield ((False, batch) for batch in own)
            return
        rehearsed = [
            stack.enter_context(
                loader.batches(
                    *drawn,
                    start_step=first,
                    num_steps=count,
                    caption_turns=None if rehearsal.targets else loader.CaptionTurns(caption_turns.seed),
                    num_text_shards=num_text_shards,
                    rows=rows,
                    **options,
                )
            )
            for drawn, rows in zip(rehearsal.drawn, rehearsed_rows, strict=True)
        ]
        yield _in_turn(own, rehearsed, rehearsal, range(start_step, start_step + num_steps))


def _in_turn(
    own: Iterator[loader.Batch],
    rehearsed: Sequence[Iterator[loader.Batch]],
    rehearsal: Rehearsal,
    steps: range,
) -> Iterator[tuple[bool, loader.Batch]]:
    """rehearsed: batches of the records, and those of the captions if they are others."""
    for step in steps:
        if not rehearsal.rehearses(step):
            yield False, next(own)
            continue
        drawn = [next(batches) for batches in rehearsed]
        batch = drawn[0] | {"text": drawn[-1]["text"]}
        if rehearsal.targets is not None:
            batch["target_images"] = rehearsal.targets.images[drawn[0]["index"]]
            batch["target_texts"] = rehearsal.targets.texts[drawn[-1]["index"]]
        yield True, batch
