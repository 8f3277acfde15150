"""Plans as tables for a terminal."""

from collections.abc import Sequence

from clipmoe_jax.planning.plan import Memory, Plan, Stage
from clipmoe_jax.planning.scaling import Row, Scaling
from clipmoe_jax.planning.transfers import transfer_seconds


def format_plan(plan: Plan) -> str:
    """Tables for a terminal. GB are 10^9 bytes."""
    device, mesh, num_devices = plan.accelerator, plan.mesh, plan.mesh.size
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"{num_devices} × {device.name}: {device.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{device.memory / 1e9:.0f} GB each; mesh {axes}; {plan.num_pairs:,} pairs; MFU {plan.mfu:.2f}",
        "",
        f"{'parameters':<26}{'total':>12}{'active':>12}{'per device':>12}",
    ]
    for name, counts in plan.models.items():
        lines.append(f"{name:<26}" + "".join(f"{count / 1e6:>10.1f} M" for count in counts))

    lines += ["", f"{'stage':<26}{'pairs':>14}{'GFLOP/pair':>12}{'time':>12}{'device-hours':>14}"]
    for stage in [*plan.stages, _total(plan.stages)]:
        of_pair = f"{stage.flops / 1e9:.1f}" if stage.flops else ""
        hours = stage.seconds * num_devices / 3600
        lines.append(
            f"{stage.name:<26}{stage.num_pairs:>14,}{of_pair:>12}{_time(stage.seconds):>12}{hours:>14.2f}"
        )

    fields = Memory._fields
    lines += ["", f"{'GB on each device':<26}" + "".join(f"{name:>13}" for name in fields) + f"{'sum':>9}"]
    for name, (_, step) in plan.steps.items():
        row = "".join(f"{size / 1e9:>13.2f}" for size in step.memory)
        total = sum(step.memory)
        fits = "" if total < 0.9 * device.memory else f"  does not fit into {device.memory / 1e9:.0f} GB"
        lines.append(f"{name:<26}{row}{total / 1e9:>9.2f}{fits}")

    for name, (training, step) in plan.steps.items():
        pairs = training.phase.batch_size
        milliseconds = 1e3 * pairs * step.flops / (device.peak_flops * plan.mfu * num_devices)
        lines += [
            "",
            f"a step of {name}: {pairs} pairs, {pairs / num_devices:g} a device, {milliseconds:.1f} ms "
            f"(computed {step.again:.2f} times); each device sends",
        ]
        for transfer in step.transfers:
            milliseconds = 1e3 * transfer_seconds(device, mesh, transfer)
            lines.append(
                f"  {' × '.join(transfer.axes):<22}{transfer.operation:<16}{transfer.what:<34}"
                f"{transfer.num_bytes / 1e6:>10.2f} MB{milliseconds:>9.2f} ms"
            )
        if not step.transfers:
            lines.append("  nothing")
    lines += [
        "",
        "Time is at the stated MFU, without k-means (on the CPU of process 0), compilation and reading.",
        "Activations are an upper bound. Transfers are at the vendor's bandwidth; docs/scaling.md says which",
        "of them run under the computation.",
    ]
    return "\n".join(lines)


def format_scaling(scaling: Scaling) -> str:
    """Tables for a terminal and what breaks first. MB are 10^6 bytes."""
    device = scaling.accelerator
    lines = [
        f"Weak scaling predicted for {device.name}: {scaling.pairs_of_device} pairs a device, "
        f"{scaling.num_pairs:,} in all; MFU {scaling.mfu:.2f}; {device.link / 2e9:.0f} GB/s each way among "
        f"{device.domain:,}, {device.network / 2e9:.4g} GB/s a device beyond",
    ]
    for name, kind in scaling.kinds.items():
        axes = sorted({transfer.axes for row in kind.rows for transfer in row.transfers})
        titles = "".join(f"{_title(names):>{_width(names)}}" for names in axes)
        lines += [
            "",
            f"a step of {name}",
            f"{'devices':>8}{'batch':>9}{'model':>11}{'similarity':>21}{titles}{'transfers':>12}"
            f"{'efficiency':>12}{'overlapped':>12}",
            *(_scaling_line(row, axes) for row in kind.rows),
            f"What breaks first: {kind.limits[0]}.",
            *(f"then: {limit}." for limit in kind.limits[1:]),
        ]
    lines += [
        "",
        "Nothing here is measured. Efficiency is the model's share of a step if nothing that travels hides",
        "under computation; overlapped, if all of it does. MB are what a device sends, and its rows of the",
        "similarity matrix.",
    ]
    return "\n".join(lines)


def _scaling_line(row: Row, axes: Sequence[tuple[str, ...]]) -> str:
    sent = ""
    for names in axes:
        num_bytes = sum(transfer.num_bytes for transfer in row.transfers if transfer.axes == names)
        sent += f"{num_bytes / 1e6:>{_width(names)}.1f}"
    similarity = f"{1e3 * row.similarity:.2f} ms {row.similarity_bytes / 1e6:.1f} MB"
    return (
        f"{row.num_devices:>8}{row.batch_size:>9,}{1e3 * row.model:>8.1f} ms{similarity:>21}{sent}"
        f"{1e3 * row.travel:>9.2f} ms{row.efficiency:>12.3f}{row.overlapped:>12.3f}"
    )


def _title(axes: tuple[str, ...]) -> str:
    return f"MB {' × '.join(axes)}"


def _width(axes: tuple[str, ...]) -> int:
    return 3 + max(8, len(_title(axes)))


def _total(stages: Sequence[Stage]) -> Stage:
    return Stage("all", sum(s.num_pairs for s in stages), 0, sum(s.seconds for s in stages))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
