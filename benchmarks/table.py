"""What `benchmarks.run` found, as a person reads it."""

from collections.abc import Sequence
from typing import Any

HEAD = ("", "program", "ms", "pairs/s", "TFLOP/s", "MFU", "times as fast as")
NUMBERS = range(2, 6)  # columns


def format_found(found: dict[str, Any], markdown: bool) -> str:
    """Device, sizes, what MFU means, a line for each row, and what could not be had."""
    device, sizes, peak = found["device"], found["workload"], found["peak"]
    versions = [f"{name} {device[name]}" for name in ("jax", "torch", "transformers") if name in device]
    captions = f"captions of some {sizes['caption_tokens']} tokens in " if sizes["caption_tokens"] else ""
    lines = [
        f"{device['device_kind']}, {found['cores']} cores, load average {found['load_before']} before; "
        f"{', '.join(versions)}",
        f"{sizes['variant']}, batch {sizes['batch']}, {captions}{sizes['text']} text positions, "
        f"{sizes['dtype']}, remat {sizes['remat']}; medians of {found['rounds']} rounds",
        f"MFU is the share of {peak['tflops']:,.3f} TFLOP/s, {peak['of']}" if peak else "MFU: not measured",
        "",
        format_rows(found["rows"], markdown),
        *(f"not measured: {line}" for line in found["not_measured"]),
    ]
    return "\n".join(lines)


def format_rows(rows: Sequence[dict[str, Any]], markdown: bool) -> str:
    """A line for each row."""
    lines = [HEAD, *map(_cells, rows)]
    if markdown:
        head, *others = ("| " + " | ".join(line) + " |" for line in lines)
        ruler = "|".join(["", *("---:" if i in NUMBERS else "---" for i in range(len(HEAD))), ""])
        return "\n".join([head, ruler, *others])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(map(_pad, range(len(HEAD)), line, widths)).rstrip() for line in lines)


def _pad(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column in NUMBERS else cell.ljust(width)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name, ratios = f"{row['section']}: {row['group']}", row.get("times_as_fast_as", {})
    beside = ", ".join(f"{ratio:.2f} x {other}" for other, ratio in ratios.items())
    if "error" in row:
        beside = f"not measured: {row['error']}"
    return (
        name,
        row["program"],
        f"{row['milliseconds']:,.2f}" if "milliseconds" in row else "",
        f"{row['pairs_per_second']:,.1f}" if "pairs_per_second" in row else "",
        f"{row['tflops']:,.3f}" if "tflops" in row else "",
        f"{row['mfu']:.1%}" if "mfu" in row else "",
        beside,
    )
