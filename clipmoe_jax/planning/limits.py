"""Batch sizes that a run's pairs, clusters, warm-up and devices allow.

Letters: B pairs of a global batch.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from clipmoe_jax.dmu.phases import PlannedPhase
from clipmoe_jax.planning.memory import USABLE_MEMORY, Memory


class Limit(NamedTuple):
    """The largest batch of a stage before `effect` sets in; batch_size is the config's."""

    stage: str
    batch_size: int
    largest: int
    effect: str

    @property
    def exceeded(self) -> bool:
        """Returns whether the config's batch is larger."""
        return self.batch_size > self.largest


def cluster_limit(config: ConfigDict, phase: PlannedPhase, number: int, num_pairs: int) -> Limit:
    """Returns the mean cluster of MCL stage `number`: larger batches are not filled from one cluster."""
    num_clusters = config.cluster.num_clusters ** (2 * number)
    drops = config.mcl.small_clusters == "drop"
    fate = "such clusters are left out" if drops else "parent clusters do"
    effect = f"the mean of {num_clusters:,} clusters does not fill it: {fate}"
    return Limit(phase.name, phase.hyperparameters.batch_size, num_pairs // num_clusters, effect)


def warmup_limit(phase: PlannedPhase, num_pairs: int) -> list[Limit]:
    """Returns the largest batch with which an epoch outlasts the warm-up; [] if the number of steps is fixed.

    num_epochs * (num_pairs // B) <= warmup_steps holds from the first B on of which an epoch has fewer than
    `least` batches.
    """
    settings = phase.hyperparameters
    if settings.num_steps:
        return []
    least = settings.warmup_steps // settings.num_epochs + 1
    effect = (
        f"{settings.num_epochs} epoch(s) end within the warm-up of {settings.warmup_steps} steps: refused"
    )
    return [Limit(phase.name, settings.batch_size, num_pairs // least, effect)]


def memory_limit(phase: PlannedPhase, memory: Memory, device_bytes: float, num_devices: int) -> Limit:
    """Returns the largest batch that fits into nine tenths of the memory of as many devices.

    Activations grow with B and the similarity matrix with its square, so that B / b solves
    loss (B / b)^2 + activations (B / b) = the bytes that all else leaves, where b is the config's batch.
    """
    batch_size = phase.hyperparameters.batch_size
    left = USABLE_MEMORY * device_bytes - (sum(memory) - memory.activations - memory.loss)
    times = 0.0
    if left > 0:
        times = 2 * left / (memory.activations + math.sqrt(memory.activations**2 + 4 * memory.loss * left))
    split = num_devices * phase.hyperparameters.accumulation_steps
    largest = math.floor(times * batch_size / split) * split
    effect = "activations and similarity matrix exceed a device's memory"
    return Limit(phase.name, batch_size, largest, effect)
