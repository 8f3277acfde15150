"""Plans as tables for a terminal. GB are 10^9 bytes."""

from collections.abc import Sequence

from clipmoe_jax.planning.limits import Limit
from clipmoe_jax.planning.memory import USABLE_MEMORY, Memory
from clipmoe_jax.planning.plan import Plan, Stage
from clipmoe_jax.planning.transfers import transfer_seconds
from clipmoe_jax.reporting.text_tables import shares_in_words

FOOTNOTE = """\
MFU is given (--mfu), measured (ViT-L/14's steps on one such device), predicted (by the roofline of a compiled
step) or assumed; embedding has that of an MCL step. Time is without k-means (on the CPU of process 0),
compilation and reading.
Batch sizes: the config's, and the largest before what the last column says sets in.
Activations are an upper bound. Transfers are at the vendor's bandwidth; docs/scaling.md says which
of them run under the computation."""


def format_plan(plan: Plan) -> str:
    """Returns the tables of a plan."""
    device, mesh = plan.accelerator, plan.mesh
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    head = (
        f"{mesh.size} × {device.name}: {device.peak_flops / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{device.memory / 1e9:.0f} GB each; mesh {axes}; {plan.num_pairs:,} pairs"
    )
    if plan.weights:
        head += f"\nSources are drawn from in the shares {shares_in_words(plan.weights)}."
    width = max(26, *(len(stage.name) + 1 for stage in plan.stages))  # of the first column
    tables = [
        _parameters(plan, width),
        _timetable(plan, width),
        _memory(plan, width),
        *(_step(plan, name) for name in plan.steps),
        _batch_sizes(plan.limits, width),
    ]
    return "\n\n".join([head, *("\n".join(lines) for lines in tables), FOOTNOTE])


def _parameters(plan: Plan, width: int) -> list[str]:
    lines = [f"{'parameters':<{width}}{'total':>12}{'active':>12}{'per device':>12}"]
    for name, counts in plan.models.items():
        lines.append(f"{name:<{width}}" + "".join(f"{count / 1e6:>10.1f} M" for count in counts))
    return lines


def _timetable(plan: Plan, width: int) -> list[str]:
    head = f"{'pairs':>14}{'GFLOP/pair':>12}{'MFU':>15}{'time':>12}{'device-hours':>14}"
    lines = [f"{'stage':<{width}}{head}"]
    for stage in [*plan.stages, _total(plan.stages)]:
        of_pair = f"{stage.flops / 1e9:.1f}" if stage.flops else ""
        mfu = f"{stage.mfu.share:.2f} {stage.mfu.source}" if stage.mfu else ""
        hours = stage.seconds * plan.mesh.size / 3600
        lines.append(
            f"{stage.name:<{width}}{stage.num_pairs:>14,}{of_pair:>12}{mfu:>15}{_time(stage.seconds):>12}"
            f"{hours:>14.2f}"
        )
    if plan.bounds:
        lines.append(
            f"At most: mcl.small_clusters=drop leaves pairs out of {', '.join(plan.bounds)}; how many is "
            "known after clustering."
        )
    return lines


def _memory(plan: Plan, width: int) -> list[str]:
    available = plan.accelerator.memory
    head = "".join(f"{field:>13}" for field in Memory._fields)
    lines = [f"{'GB on each device':<{width}}{head}{'sum':>9}"]
    for name, (_, step, _) in plan.steps.items():
        row = "".join(f"{size / 1e9:>13.2f}" for size in step.memory)
        total = sum(step.memory)
        fits = total < USABLE_MEMORY * available
        remark = "" if fits else f"  does not fit into {available / 1e9:.0f} GB"
        lines.append(f"{name:<{width}}{row}{total / 1e9:>9.2f}{remark}")
    return lines


def _step(plan: Plan, name: str) -> list[str]:
    phase, step, mfu = plan.steps[name]
    device, mesh, pairs = plan.accelerator, plan.mesh, phase.hyperparameters.batch_size
    milliseconds = 1e3 * pairs * step.flops / (device.peak_flops * mfu.share * mesh.size)
    lines = [
        f"a step of {name}: {pairs} pairs, {pairs / mesh.size:g} a device, {milliseconds:.1f} ms "
        f"(remat {phase.compute.remat}, computed {step.computed:.2f} times); each device sends"
    ]
    for transfer in step.transfers:
        milliseconds = 1e3 * transfer_seconds(device, mesh, transfer)
        lines.append(
            f"  {' × '.join(transfer.axes):<22}{transfer.operation:<16}{transfer.what:<34}"
            f"{transfer.num_bytes / 1e6:>10.2f} MB{milliseconds:>9.2f} ms"
        )
    return lines if step.transfers else [*lines, "  nothing"]


def _batch_sizes(limits: Sequence[Limit], width: int) -> list[str]:
    lines = [f"{'batch sizes':<{width}}{'config':>10}{'largest':>12}  what a larger one does"]
    for limit in limits:
        remark = " (so here)" if limit.exceeded else ""
        lines.append(
            f"{limit.stage:<{width}}{limit.batch_size:>10,}{limit.largest:>12,}  {limit.effect}{remark}"
        )
    return lines


def _total(stages: Sequence[Stage]) -> Stage:
    return Stage("all", sum(s.num_pairs for s in stages), 0, None, sum(s.seconds for s in stages))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
