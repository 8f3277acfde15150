"""Times whole training steps with AdamW beside PyTorch's on the same device.

    python -m benchmarks.steps --rounds=3 --caption_tokens=60             # half of docs/benchmarks.md's table
    python -m benchmarks.steps --variant=tiny --batch=4 --text=32 --rounds=1     # to try the command

Kinds: product (of two square matrices), mcl, everything, router. Both sides take turns; a time is the median
of the rounds, "times as fast" the median of each round's ratio. Where one device's memory does not hold both,
one is measured after the other. FLOPs are those of the model (clipmoe_jax/models/flops.py): padding and what
is computed again do not count. MFU is the share of the vendor's peak, where it is known.

PyTorch's side is transformers' CLIPModel (SDPA attention, not compiled, fused AdamW) on the same weights, and
as mixture a CLIPModel with a masked loop over the experts, as the released code has it; its captions are
padded to the context length, and it computes nothing again. Its parameters are held in --dtype; ours are
float32 and cast in each call, but for frozen ones, as in a run.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.timing import Side, Worker
from clipmoe_jax.core.accelerators import of_kind

KINDS = ("product", "mcl", "everything", "router")
OURS, THEIRS = "clipmoe_jax", "PyTorch"
SIDES = {
    OURS: Side("benchmarks.ours", {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),  # PyTorch wants memory, too
    THEIRS: Side("benchmarks.peers", {"JAX_PLATFORMS": "cpu"}),  # where JAX makes parameters alone
}


def measure(kind: str, sizes: dict[str, Any], rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a row for each side, and {"sizes", "device"}.

    A side that fails beside ours, as where one device's memory does not hold both, is measured alone after
    it. One that fails then too has an "error" in its row.
    """
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    told: dict[str, Any] = {"sizes": sizes, "device": {}}
    for side, process in SIDES.items():
        try:
            workers[side] = Worker(process, kind, told["sizes"])
        except RuntimeError as error:
            if side == OURS:
                raise SystemExit(f"{kind}: {error}") from error
            errors[side] = str(error)
            continue
        of_side = workers[side].told
        told = {"sizes": of_side["sizes"], "device": told["device"] | of_side["device"]}
        print(f"{kind}: {side} is warm after {of_side['first_call_s']:.1f} s", file=sys.stderr)
    seconds: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(1, rounds + 1):
        for side in list(seconds):
            try:
                seconds[side].append(workers[side].seconds())
            except RuntimeError as error:
                errors[side] = str(error)
                del seconds[side]
        print(f"{kind}: round {number} of {rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    for side, error in list(errors.items()):
        print(f"{kind}: {side} alone, since beside ours: {error}", file=sys.stderr)
        try:
            workers[side] = Worker(SIDES[side], kind, told["sizes"])
            seconds[side] = [workers[side].seconds() for _ in range(rounds)]
        except RuntimeError as again:
            errors[side] = str(again)
            continue
        workers[side].close()
        told["device"] |= workers[side].told["device"]
        del errors[side]
    accelerator = of_kind(told["device"]["device_kind"])
    in_half = told["sizes"]["dtype"] == "bfloat16"
    peak_flops = accelerator.peak_flops if accelerator and in_half else None
    rows = make_rows(seconds, {side: worker.told for side, worker in workers.items()}, peak_flops)
    rows += [{"program": side, "error": error} for side, error in errors.items()]
    return [{"kind": kind, **row} for row in rows], told


def make_rows(
    seconds: Mapping[str, Sequence[float]], told: Mapping[str, dict[str, Any]], peak_flops: float | None
) -> list[dict[str, Any]]:
    """Returns what follows from each side's seconds, a number for each round."""
    rows = []
    for side, times in seconds.items():
        median, of_side = statistics.median(times), told[side]
        row = {"program": side, "milliseconds": 1e3 * median, "seconds": times}
        row |= {"first_call_s": of_side["first_call_s"], "tflops": of_side["flops"] / median / 1e12}
        if of_side["pairs"]:
            row["pairs_per_second"] = of_side["pairs"] / median
        if peak_flops:
            row["mfu"] = of_side["flops"] / median / peak_flops
        if side == OURS and THEIRS in seconds:
            ratios = [theirs / ours for ours, theirs in zip(times, seconds[THEIRS], strict=True)]
            row["times_as_fast"] = statistics.median(ratios)
        rows.append(row)
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a line for each row."""
    columns = {
        "milliseconds": ("ms", "{:,.2f}"),
        "pairs_per_second": ("pairs/s", "{:,.1f}"),
        "tflops": ("TFLOP/s", "{:.3f}"),
        "mfu": ("MFU", "{:.1%}"),
        "times_as_fast": ("times as fast", "{:.2f}"),
    }
    lines = [f"{'':24}" + "".join(f"{title:>15}" for title, _ in columns.values())]
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for key, (_, form) in columns.items()]
        name = f"{row['kind']}: {row['program']}"
        numbers = "".join(f"{cell:>15}" for cell in cells).rstrip()
        lines.append(f"{name:24}" + (f"  not measured: {row['error']}" if "error" in row else numbers))
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas between")
    parser.add_argument("--variant", default="", help="ViT-B/32 on CPU, else ViT-L/14")
    parser.add_argument("--batch", type=int, default=0, help="pairs; 32 on CPU, else 100")
    parser.add_argument("--text", type=int, default=248, help="context length")
    parser.add_argument("--dtype", default="", help="float32 on CPU, else bfloat16")
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"), help="of our steps")
    parser.add_argument("--caption_tokens", type=int, default=0, help="their mean; 0 is the context length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="a JSON file for all of it, each round's seconds too")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"--kinds: {unknown[0]!r} is not a kind of step: choose among {', '.join(KINDS)}")
    fields = ("variant", "batch", "text", "dtype", "remat", "caption_tokens")
    sizes, rows = {name: getattr(args, name) for name in fields}, []
    machine = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    for kind in kinds:
        measured, told = measure(kind, sizes, args.rounds)
        rows += measured
        if args.out:
            everything = {"arguments": vars(args), **machine, **told, "rows": rows}
            pathlib.Path(args.out).write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(machine | told))
    print(format_rows(rows))


if __name__ == "__main__":
    main()
