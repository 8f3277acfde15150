"""Weak scaling, predicted: a fixed number of pairs on each device, ever more devices, and what breaks first.

Of a step three things grow with the number of devices: the features that every device needs of all captions,
a device's rows of the similarity matrix, and the global batch itself, which clusters and warm-up must allow.

Letters: n devices, b pairs of a device, B = b n pairs of a global batch, D embedding width.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from clipmoe_jax.core import sharding
from clipmoe_jax.core.accelerators import ACCELERATORS, Accelerator
from clipmoe_jax.planning.plan import Memory, plan_step, similarity_bytes
from clipmoe_jax.planning.trainings import Training, trainings
from clipmoe_jax.planning.transfers import Transfer, plan_transfers, transfer_seconds

NUM_DEVICES = tuple(2**k for k in range(10))
FURTHER = tuple(2**k for k in range(10, 18))  # looked at to find what breaks, not shown
# The similarity matrix is a float32 product: six bfloat16 ones on a TPU (jax.lax.Precision.HIGHEST); on a GPU
# without tensor cores, a 15th (H100) or 16th (A100) of their bfloat16 rate by the data sheets.
FLOAT32_COST = {"tpu": 6, "cuda": 16}


class Row(NamedTuple):
    """A step on n devices. Seconds: model, similarity (its products) and travel (of all transfers).
    similarity_bytes: of a device's rows of the matrix."""

    num_devices: int
    batch_size: int
    model: float
    similarity: float
    similarity_bytes: float
    transfers: list[Transfer]
    travels: list[float]

    @property
    def travel(self) -> float:
        """Seconds of all transfers, one after the other."""
        return sum(self.travels)

    @property
    def efficiency(self) -> float:
        """The model's share of a step in which nothing overlaps."""
        return self.model / (self.model + self.similarity + self.travel)

    @property
    def overlapped(self) -> float:
        """The same where all that travels does so under computation."""
        return self.model / max(self.model + self.similarity, self.travel)


class Kind(NamedTuple):
    """A kind of training step. limits: what breaks, in words, that with the fewest devices first."""

    rows: list[Row]
    limits: list[str]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """All of it; format.py makes it readable."""

    accelerator: Accelerator
    mfu: float
    num_pairs: int
    pairs_of_device: int
    kinds: dict[str, Kind]  # name of the first stage of a kind -> its steps


def weak_scaling(
    config: ConfigDict, accelerator: str, mfu: float, num_pairs: int, pairs_of_device: int
) -> Scaling:
    """Predicts the steps of a config on up to 512 devices. fsdp and expert stay as in config.mesh.

    num_pairs: of the training set. Raises ValueError where b does not split into the accumulation steps or
    parameters do not split over the mesh.
    """
    device, kinds = ACCELERATORS[accelerator], {}
    same: dict[tuple, list[Training]] = {}
    for training in trainings(config, device.platform, num_pairs):
        same.setdefault(training.kind, []).append(training)
    smallest = config.mesh.fsdp * config.mesh.expert
    for stages in same.values():
        first = stages[0]
        mesh, training = on_devices(config, first, smallest, pairs_of_device)
        sharding.check_batch(mesh, training.phase.batch_size, training.phase.accumulation_steps)
        step = plan_step(mesh, training)
        seconds = pairs_of_device * step.flops / (device.peak_flops * mfu)

        def row(num_devices: int, first=first, seconds=seconds) -> Row:
            mesh, training = on_devices(config, first, num_devices, pairs_of_device)
            return make_row(device, mesh, training, mfu, seconds)

        rows = [row(n) for n in NUM_DEVICES if n >= smallest and n % smallest == 0]
        limits = [
            *batch_limits(config, stages, num_pairs, pairs_of_device),
            *memory_limit(device, step.memory, pairs_of_device, smallest),
            *time_limits(rows, (n for n in FURTHER if n % smallest == 0), row),
        ]
        limits = [(-(-n // smallest) * smallest, what) for n, what in limits]
        kinds[first.name] = Kind(rows, [f"from {n:,} devices on, {what}" for n, what in sorted(limits)])
    return Scaling(device, mfu, num_pairs, pairs_of_device, kinds)


def on_devices(
    config: ConfigDict, training: Training, num_devices: int, pairs_of_device: int
) -> tuple[AbstractMesh, Training]:
    """The mesh of so many devices, and a training whose batches fill it."""
    mesh = sharding.make_abstract_mesh(-1, config.mesh.fsdp, config.mesh.expert, num_devices=num_devices)
    phase = dataclasses.replace(training.phase, batch_size=pairs_of_device * num_devices)
    return mesh, dataclasses.replace(training, phase=phase)


def make_row(
    device: Accelerator, mesh: AbstractMesh, training: Training, mfu: float, model_seconds: float
) -> Row:
    """One step. Of the b × B similarities of a device there are three products, the logits and their
    gradients for images and captions: 6 b B D FLOPs; twice that with short captions."""
    batch_size = training.phase.batch_size
    products = 6 * (1 + (training.short_length > 0))
    num_flops = products * batch_size**2 / mesh.size * training.config.embed_dim
    transfers = plan_transfers(mesh, training)
    return Row(
        num_devices=mesh.size,
        batch_size=batch_size,
        model=model_seconds,
        similarity=num_flops * FLOAT32_COST[device.platform] / (device.peak_flops * mfu),
        similarity_bytes=similarity_bytes(batch_size, mesh.size),
        transfers=transfers,
        travels=[transfer_seconds(device, mesh, transfer) for transfer in transfers],
    )


def batch_limits(
    config: ConfigDict, stages: Sequence[Training], num_pairs: int, pairs_of_device: int
) -> Iterator[tuple[int, str]]:
    """(n, what): batches that clusters do not fill, and epochs that end in the warm-up."""
    drawn = [training.name for training in stages if training.name.startswith("mcl_")]
    if drawn:
        num_clusters = config.cluster.num_clusters ** (2 * int(drawn[-1].removeprefix("mcl_")))
        fits = num_pairs // num_clusters
        yield (
            fits // pairs_of_device + 1,
            f"a batch is larger than the mean cluster of {drawn[-1]} ({fits:,} pairs in each of "
            f"{num_clusters:,}): it comes from their parents, or from none under small_clusters=drop",
        )
    phase = stages[0].phase
    if not phase.num_steps:
        # num_epochs * (pairs // B) <= warmup_steps from the first B on of which fewer than `needed` fit.
        needed = phase.warmup_steps // phase.num_epochs + 1
        yield (
            num_pairs // needed // pairs_of_device + 1,
            f"{phase.num_epochs} epoch(s) have no more steps than the warm-up, {phase.warmup_steps}: "
            "the run is refused",
        )


def memory_limit(
    device: Accelerator, memory: Memory, pairs_of_device: int, smallest: int
) -> Iterator[tuple[int, str]]:
    """(n, what), where a step leaves less than a tenth of a device's memory."""
    fixed = sum(memory) - memory.loss
    room = 0.9 * device.memory - fixed
    of_one = similarity_bytes(pairs_of_device, 1)  # and n times that on n devices
    if room < of_one * smallest:
        yield smallest, f"{pairs_of_device} pairs a device do not fit ({fixed / 1e9:.1f} GB)"
    else:
        yield int(room // of_one) + 1, "the similarity matrix does not fit beside the model"


def time_limits(
    rows: Sequence[Row], further: Iterator[int], row: Callable[[int], Row]
) -> Iterator[tuple[int, str]]:
    """(n, what), n a power of two: less than nine tenths of a step are the model's, where nothing overlaps
    and where all that travels does."""
    rows = [*rows, *map(row, further)]
    for value, said in (
        ("efficiency", "less than 90 % of a step in which nothing overlaps is the model's"),
        ("overlapped", "less than 90 % of one in which all transfers overlap"),
    ):
        found = next((row for row in rows if getattr(row, value) < 0.9), None)
        if found:
            costs = {
                f"{transfer.operation} of {transfer.what} over {' × '.join(transfer.axes)}": seconds
                for transfer, seconds in zip(found.transfers, found.travels, strict=True)
            }
            costs["similarity matrix"] = found.similarity
            yield found.num_devices, f"{said}, mostly for the {max(costs, key=costs.get)}"
