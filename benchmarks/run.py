"""How fast everything is: milliseconds, pairs/s, TFLOP/s, MFU, and PyTorch on the same device beside it.

    python -m benchmarks.run                                     # sizes for this platform, minutes to an hour
    python -m benchmarks.run --only=towers,steps --variant=ViT-B/32 --batch=32 --text=248 --dtype=float32
    python -m benchmarks.run --caption_tokens=60                 # captions of realistic length, not all full
    python -m benchmarks.run --only=settings,embed               # what to set on this device
    python -m benchmarks.run --variant=tiny --batch=4 --text=32 --rounds=1    # to try the command

Sections: peak (always), towers, attention, moe, steps (MCL, routers, everything trains), embed, start (of
processes), loader, demo; and only where it is asked for settings: steps with every exact dispatch and every
remat. Of settings and embed the fastest are named as flags for `clipmoe_jax.main`. Programs of a group take
turns; a time is the median of the rounds, a ratio the median of the ratios of each round: "2.00 x PyTorch" is
twice as fast. FLOPs are those of the model (clipmoe_jax/models/flops.py): padding and what is computed again
do not count.

PyTorch's side is transformers' CLIPModel (SDPA attention, not compiled) on the same weights, and as mixture a
CLIPModel with a masked loop over the experts, as the released code has it; its captions are padded to the
context length, and it computes nothing again. Its parameters are held in --dtype; ours are float32 and cast
in each call, but for what is frozen in steps, as in a run.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import commands
from benchmarks.sides import Row, Sides, say
from benchmarks.table import format_found
from benchmarks.worker import OURS
from clipmoe_jax.core.accelerators import of_kind

ON_DEVICE = ("peak", "towers", "attention", "moe", "steps", "settings", "embed")
SECTIONS = (*ON_DEVICE, *commands.SECTIONS)
PEAK_ROUNDS = 9  # of which the fastest is the peak
BEST = "fastest, "  # before the group of a batch
CLEARLY = 1.02  # settings: times as fast as the choice before
WORTH_IT = 1.03  # embed: a batch twice the size is tried while some program gains as much


def run(
    only: Sequence[str],
    sizes: Mapping[str, Any],
    rounds: int,
    among: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Everything found: device, workload, peak, rows, and what could not be had; `keep` gets it after each
    section. among: groups of the sections, all if empty. Raises SystemExit if no section has one of them."""
    machine = {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    found: dict[str, Any] = {**machine, "rounds": rounds, "rows": [], "not_measured": []}
    known: list[str] = []
    for section in SECTIONS:
        if section != "peak" and section not in only:
            continue
        if section in ON_DEVICE:
            known += _measure_on_device(section, sizes, rounds, among, found)
        else:
            _measure_commands(section, found)
        keep(found)
    if unknown := [name for name in among if name not in known]:
        raise SystemExit(f"--groups: {unknown[0]!r} is in none of --only: choose among {', '.join(known)}")
    return found


def _measure_on_device(
    section: str, sizes: Mapping[str, Any], rounds: int, among: Sequence[str], found: dict[str, Any]
) -> Sequence[str]:
    """Adds to `found`; the section's groups."""
    sides = Sides(section, sizes)
    try:
        if section == "embed":
            rows = embed(sides, rounds)
        else:
            rounds = max(rounds, PEAK_ROUNDS) if section == "peak" else rounds
            groups = [group for group in sides.groups if section == "peak" or group in (among or [group])]
            rows = [row for group in groups for row in sides.measure(group, rounds)]
    finally:
        sides.close()
    found |= {"device": sides.device, "workload": sides.workload} if "device" not in found else {}
    if section == "peak":
        found["peak"] = peak_of(rows, sides.device["device_kind"], sides.workload["dtype"])
    for row in rows:
        mfu = {"mfu": row["tflops"] / found["peak"]["tflops"]} if "tflops" in row and found["peak"] else {}
        found["rows"].append({"section": section, **row, **mfu})
    found["not_measured"] += [f"{section}: {side}: {why}" for side, why in sides.missing.items()]
    return sides.groups


def _measure_commands(section: str, found: dict[str, Any]) -> None:
    for measure in commands.SECTIONS[section]:
        say(f"{section}: {measure.__name__}")
        try:
            found["rows"] += [{"section": section, **row} for row in measure()]
        except (RuntimeError, OSError) as error:
            found["not_measured"].append(f"{section}: {measure.__name__}: {error}")


def embed(sides: Sides, rounds: int) -> list[Row]:
    """Doubles the batch while that pays."""
    rows: list[Row] = []
    rates: dict[str, float] = {}
    for group in sides.groups:
        measured = sides.measure(group, rounds)
        rows += [row | {"group": f"batch {group}"} for row in measured]
        now = {row["program"]: row["pairs_per_second"] for row in measured if "pairs_per_second" in row}
        if not any(rate > WORTH_IT * rates.get(name, 0) for name, rate in now.items()):
            break
        rates |= {name: max(rate, rates.get(name, 0)) for name, rate in now.items()}
    return rows + best_batches(rows)


def best_batches(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of `embed`, each program's with the most pairs/s; its ratios are to the others' bests."""
    best: dict[str, Row] = {}
    for row in sorted((row for row in rows if "error" not in row), key=lambda row: row["pairs_per_second"]):
        best[row["program"]] = row
    return [
        row
        | {
            "group": f"{BEST}{row['group']}",
            "times_as_fast_as": {
                other: row["pairs_per_second"] / best[other]["pairs_per_second"]
                for other in row["times_as_fast_as"]
                if other in best
            },
        }
        for row in best.values()
    ]


def fastest_settings(rows: Sequence[Row]) -> list[str]:
    """Flags for `clipmoe_jax.main`: choices with the fastest steps, and the best batch to embed. The first
    choice of a group, the platform's own, gives way only to what is clearly faster."""
    rows = [row for row in rows if "error" not in row]
    fastest: dict[str, Row] = {}
    for row in (row for row in rows if row["section"] == "settings"):
        before = fastest.get(row["group"])
        if before is None or row["milliseconds"] * CLEARLY < before["milliseconds"]:
            fastest[row["group"]] = row
    flags = [f"--config.{setting}" for row in fastest.values() for setting in row["program"].split()]
    ours = [row for row in rows if row["section"] == "embed" and row["program"] == OURS]
    batches = [row["group"].split()[-1] for row in ours if row["group"].startswith(BEST)]
    return [*flags, *(f"--config.embed.batch_size={batch}" for batch in batches)]


def peak_of(rows: Sequence[Row], device_kind: str, dtype: str) -> dict[str, Any]:
    """What MFU is a share of: the vendor's peak where it is known, else the fastest square product.

    Returns "tflops" and "of", empty if there is neither.
    """
    accelerator = of_kind(device_kind)
    if accelerator and dtype in ("bfloat16", "float16"):
        return {"tflops": accelerator.peak_flops / 1e12, "of": f"the vendor's peak of {accelerator.name}"}
    measured = {row["program"]: row["flops"] / min(row["seconds"]) / 1e12 for row in rows if "flops" in row}
    if not measured:
        return {}
    name = max(measured, key=measured.get)
    return {"tflops": measured[name], "of": f"the fastest square product measured here, that of {name}"}


def main() -> None:
    """Measures, prints the table, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    usual = ",".join(name for name in SECTIONS if name != "settings")
    parser.add_argument("--only", default=usual, help="sections, with commas between")
    parser.add_argument("--groups", default="", help="of the sections: --only=steps --groups=mcl,router")
    parser.add_argument("--variant", default="", help="ViT-B/32 on CPU, else ViT-L/14")
    parser.add_argument("--batch", type=int, default=0, help="pairs; 32 on CPU, else 100")
    parser.add_argument("--text", type=int, default=248, help="context length")
    parser.add_argument("--dtype", default="", help="float32 on CPU, else bfloat16")
    parser.add_argument(
        "--remat", default="", choices=("none", "dots", "full"), help="of our steps; none on CPU, else dots"
    )
    parser.add_argument("--caption_tokens", type=int, default=0, help="their mean; 0 is the context length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", action="store_true", help="the table's form")
    parser.add_argument("--out", default="", help="a JSON file for all of it, each round's seconds too")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := [name for name in only if name not in SECTIONS]:
        raise SystemExit(f"--only: {unknown[0]!r} is no section: choose among {', '.join(SECTIONS)}")
    names = ("variant", "batch", "text", "dtype", "remat", "caption_tokens")

    def keep(found: dict[str, Any]) -> None:
        if args.out:
            path = pathlib.Path(args.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            arguments = {name: value for name, value in vars(args).items() if name != "out"}
            path.write_text(json.dumps({"arguments": arguments, **found}, indent=1) + "\n")

    among = list(filter(None, args.groups.split(",")))
    found = run(only, {name: getattr(args, name) for name in names}, args.rounds, among, keep)
    print(format_found(found, args.markdown))
    if flags := fastest_settings(found["rows"]):
        print(f"fastest: {' '.join(flags)}")


if __name__ == "__main__":
    main()
