"""Predicts the time of a training step from the program that an accelerator's compiler makes of it.

    python -m clipmoe_jax.planning.roofline --target=h100 --config=configs/vit_l14_sharegpt4v.py --devices=8

compiles the steps for one device that need not be here (`pip install "jax[tpu]"` or `"jax[cuda13]"`), with
its part of the batch and without what devices send each other. A product takes its FLOPs by the rate of
products, but no less than its bytes by the rate of memory; attention has rates of its own; every other kernel
takes its bytes. A loop takes as many times as much as it has turns. The sum is the step's time: nothing runs
at the same time, and a launch takes none. --write keeps the results in roofline.json, from which the plan
takes its MFU (mfu.py).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
from absl import flags, logging

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.core import accelerators, cli, sharding
from clipmoe_jax.core.accelerators import ACCELERATORS
from clipmoe_jax.dmu.phases import PlannedPhase, check_mesh, phases_of
from clipmoe_jax.models.clip import VARIANTS
from clipmoe_jax.planning import mfu
from clipmoe_jax.planning.hlo import ALLOCATIONS, FREE, Instruction, Program, parse
from clipmoe_jax.planning.memory import choose_remat
from clipmoe_jax.planning.plan import step_flops
from clipmoe_jax.planning.targets import compile_step

NUM_PAIRS = 10**7  # of a training set; a step does not depend on it
NUM_LARGEST = 10
ATTENTION = "__cudnn$fmha"
PRODUCT_KERNELS = "__cublas$", "mosaic_gpu"  # kernels whose rate is that of products


class Rates(NamedTuple):
    """A target's speeds, by the second: FLOPs of products, also within loops, bytes of memory, and FLOPs of
    attention where it is a kernel, forward and backward. source: in words."""

    products: float
    products_in_loops: float
    memory: float
    attention: float
    attention_backward: float
    source: str


def _of_vendor(products: float, memory: float) -> Rates:
    """Returns nine tenths of a vendor's figures: assumed, nothing was measured."""
    of_products = 0.9 * products
    attention = of_products, of_products
    return Rates(of_products, of_products, 0.9 * memory, *attention, "assumed, nine tenths of the vendor's")


# One H100 then had 724e12 in a large product, 3.02e12, and 80e12 to 117e12 in attention forward, one H200
# 709e12 and 4.27e12 (benchmarks/results). TPUs' memory: the pages that core/accelerators.py names.
H100 = Rates(620e12, 550e12, 2.9e12, 130e12, 97e12, "set before one was measured")
RATES = {
    "h100": H100,
    "h200": H100._replace(memory=4.1e12, source="an H100's, but for the memory"),
    "v5e": _of_vendor(ACCELERATORS["v5e"].peak_flops, 819e9),
    "v5p": _of_vendor(ACCELERATORS["v5p"].peak_flops, 2765e9),
    "v6e": _of_vendor(ACCELERATORS["v6e"].peak_flops, 1640e9),
}


@dataclasses.dataclass
class Item:
    """Kernels that are alike. limit: what their time depends on. amount: FLOPs, or bytes for "memory".
    assumed: nobody has measured such a kernel, or how many turns its loop takes."""

    name: str
    limit: str
    assumed: bool
    amount: float = 0.0
    seconds: float = 0.0
    launches: int = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A predicted step on one device. flops: of the model, as in the definition of MFU."""

    phase: PlannedPhase
    target: str
    items: list[Item]
    flops: float
    computed: float

    @property
    def seconds(self) -> float:
        """Returns the predicted time."""
        return sum(item.seconds for item in self.items)

    @property
    def mfu(self) -> float:
        """Returns the share of the vendor's peak."""
        return self.flops / (self.seconds * ACCELERATORS[self.target].peak_flops)


def estimate(text: str, rates: Rates) -> list[Item]:
    """Returns the kernels of an optimised HLO text, the longest first."""
    program, items = parse(text), {}
    for instruction, of, turns, in_loop, assumed in _kernels(program, program.entry):
        limit, amount, seconds, unknown = _cost(program, instruction, of, rates, in_loop)
        key = _name(instruction), limit, assumed or unknown
        item = items.setdefault(key, Item(*key))
        item.amount += turns * amount
        item.seconds += turns * seconds
        item.launches += turns
    return sorted(items.values(), key=lambda item: -item.seconds)


def _kernels(
    program: Program, computation: str, turns: int = 1, in_loop: bool = False, assumed: bool = False
) -> Iterator[tuple[Instruction, dict[str, Instruction], int, bool, bool]]:
    """Yields (kernel, its computation, turns, in_loop, assumed) of what a computation runs. A loop whose
    turns are not known counts once; of a conditional's branches all count."""
    of = program.computations[computation]
    for instruction in of.values():
        if instruction.opcode == "while":
            known = instruction.trip_count
            for callee in instruction.callees:
                yield from _kernels(program, callee, turns * (known or 1), True, assumed or not known)
        elif instruction.opcode in ("call", "conditional", "async-start"):
            for callee in instruction.callees:
                yield from _kernels(program, callee, turns, in_loop, assumed)
        elif instruction.opcode not in FREE and instruction.target not in ALLOCATIONS:
            yield instruction, of, turns, in_loop, assumed


def _cost(
    program: Program, instruction: Instruction, of: dict[str, Instruction], rates: Rates, in_loop: bool
) -> tuple[str, float, float, bool]:
    """Returns (limit, amount, seconds, assumed) of one kernel, once."""
    num_bytes = program.traffic(instruction, of)
    if instruction.target.startswith(ATTENTION):
        products = (
            4.0
            * math.prod(instruction.numbers("intermediate_tensor_shape.*?dimensions"))
            * instruction.arrays[0].dims[-1]
        )
        if "Backward" not in instruction.target:
            return "attention", products, products / rates.attention, False
        return "attention", 2.5 * products, 2.5 * products / rates.attention_backward, False
    unknown = instruction.opcode == "custom-call" and not instruction.target.startswith(PRODUCT_KERNELS)
    product = program.flops(instruction, of)
    seconds = product / (rates.products_in_loops if in_loop else rates.products)
    if seconds >= num_bytes / rates.memory and product:
        return "product", product, seconds, unknown
    return "memory", num_bytes, num_bytes / rates.memory, unknown


def _name(instruction: Instruction) -> str:
    """Returns the first result and the origin of a kernel, alike for all blocks of a tower."""
    shapes = [f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in instruction.arrays[:1]]
    origin = re.sub(r"jit\(\w+\)/", "", instruction.op_name) or instruction.target or instruction.opcode
    return " ".join([*shapes, re.sub(r"\d+", "*", origin)])


def predict(target: str, phase: PlannedPhase, num_devices: int) -> Estimate:
    """Compiles the step of a phase for one of `num_devices` and returns its estimate.

    Raises ValueError if the batch does not split over as many.
    """
    settings = phase.hyperparameters
    check_mesh(sharding.make_abstract_mesh(num_devices, 1, 1, num_devices=num_devices), [phase])
    pairs = settings.batch_size // num_devices
    phase = dataclasses.replace(phase, hyperparameters=dataclasses.replace(settings, batch_size=pairs))
    items = estimate(compile_step(target, phase).as_text(), RATES[target])
    of_pair, computed = step_flops(sharding.make_abstract_mesh(1, 1, 1, num_devices=1), phase)
    return Estimate(phase, target, items, pairs * of_pair, computed)


def format_estimate(of: Estimate) -> str:
    """Returns an estimate as a table: the sums of each limit, then the items that take longest."""
    device, pairs = ACCELERATORS[of.target].name, of.phase.hyperparameters.batch_size
    lines = [
        f"{of.phase.name} on one {device}, {pairs} pairs, remat {of.phase.compute.remat}: "
        f"predicted {1e3 * of.seconds:.1f} ms, MFU {of.mfu:.1%}, "
        f"{sum(item.launches for item in of.items):,} launches"
    ]
    lines.append(f"rates: {RATES[of.target].source}")
    for limit, unit in (("product", "TFLOP"), ("attention", "TFLOP"), ("memory", "TB")):
        items = [item for item in of.items if item.limit == limit]
        amount, seconds = sum(item.amount for item in items), sum(item.seconds for item in items)
        lines.append(f"{1e3 * seconds:9.2f} ms  {limit:10}{amount / 1e12:8.3f} {unit}")
    if assumed := sum(item.seconds for item in of.items if item.assumed):
        lines.append(f"{1e3 * assumed:9.2f} ms  of these assumed: not measured, or a loop of unknown length")
    lines.append(f"{'ms':>9}{'share':>7}{'launches':>10}  the largest")
    for item in of.items[:NUM_LARGEST]:
        told = f"{item.limit}{', assumed' * item.assumed}: {item.name}"
        lines.append(f"{1e3 * item.seconds:9.2f}{item.seconds / of.seconds:7.1%}{item.launches:10,}  {told}")
    return "\n".join(lines)


def table_row(of: Estimate) -> mfu.Row:
    """Returns the row of roofline.json that an estimate makes. Raises ValueError for sizes without a name."""
    variant = mfu.variant_of(of.phase.architecture)
    if not variant:
        raise ValueError(
            f"--write: the table has steps of {', '.join(VARIANTS)} alone: choose one, or no --write"
        )
    return mfu.Row(
        accelerator=of.target,
        variant=variant,
        step=mfu.step_of(of.phase.architecture, of.phase.compute),
        remat=of.phase.compute.remat,
        pairs=of.phase.hyperparameters.batch_size,
        milliseconds=round(1e3 * of.seconds, 1),
        assumed=round(1e3 * sum(item.seconds for item in of.items if item.assumed), 1),
        mfu=round(of.mfu, 4),
        computed=round(of.computed, 4),
        jax=jax.__version__,
    )


def main(argv: list[str]) -> str:
    """Returns the tables of the steps; the command prints them."""
    del argv
    logging.set_verbosity(logging.ERROR)
    accelerators.take_none()
    jax.config.update("jax_enable_compilation_cache", False)
    given = flags.FLAGS
    config_checks.validate(given.config, paths=False)
    device = ACCELERATORS[given.target]
    planned = phases_of(given.config, device.platform, NUM_PAIRS)
    mesh = sharding.make_abstract_mesh(given.devices, 1, 1, num_devices=given.devices)
    remat = choose_remat(given.config.compute.remat, mesh, planned, device.memory)
    phases = {phase.name: phase.with_remat(remat) for phase in planned}
    if unknown := [name for name in given.steps if name not in phases]:
        raise ValueError(
            f"--steps: {unknown[0]!r} is none of this config's: choose among {', '.join(phases)}"
        )
    estimates = [predict(given.target, phases[name], given.devices) for name in given.steps]
    if given.write:
        mfu.write_rows(table_row(one) for one in estimates)
    return "\n\n".join(map(format_estimate, estimates))


def _define_flags() -> None:
    cli.define_config_flag()
    flags.DEFINE_enum("target", "h100", list(RATES), "Which accelerator to compile for.")
    flags.DEFINE_integer("devices", 1, "Over how many of them the batch is split.", lower_bound=1)
    flags.DEFINE_list("steps", ["mcl_1", "router"], "Names of stages or baselines, with commas between.")
    flags.DEFINE_bool("write", False, "Keeps the results where the plan takes its MFU from.")


if __name__ == "__main__":
    _define_flags()
    cli.run(main, renamed=configs.RENAMED)
