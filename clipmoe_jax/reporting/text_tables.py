"""The results of one run, or of several seeds, as tables for a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipmoe_jax.data.digit_scenes import ATTRIBUTES
from clipmoe_jax.dmu.recipes import CLIP_MOE

Results = dict[str, dict[str, Any]]
COLUMNS = {
    "i2t R@1": "image_to_text_r1",
    "i2t R@5": "image_to_text_r5",
    "t2i R@1": "text_to_image_r1",
    "t2i R@5": "text_to_image_r5",
}
RECALL_AT_1 = COLUMNS["i2t R@1"], COLUMNS["t2i R@1"]
HOW_TO_READ = (
    "R@k: per cent of queries whose right answer is among the first k; i2t asks with an image, t2i with a "
    "caption. Active: what one token uses."
)


def format_results(seeds: Sequence[Results]) -> str:
    """All tables of one run, or of several seeds."""
    tables = [format_table(seeds), format_attributes(seeds), format_evaluations(seeds)]
    if len(seeds) > 1 and has_retrieval(seeds):
        tables.append(format_differences(seeds))
    return "\n\n".join(filter(None, tables))


def has_retrieval(seeds: Sequence[Results]) -> bool:
    """Whether there was a test set for retrieval."""
    return all(
        key in numbers for results in seeds for numbers in results.values() for key in COLUMNS.values()
    )


def format_table(seeds: Sequence[Results]) -> str:
    """One row a model: recall if there is any (mean ± standard deviation over seeds), parameters, active
    parameters."""
    titles = list(seeds[0])
    width = max(len(title) for title in titles)
    cell = 7 if len(seeds) == 1 else 11
    columns = COLUMNS if has_retrieval(seeds) else {}
    lines = [
        "  ".join(
            [f"{'':{width}}"] + [f"{c:>{cell}}" for c in columns] + [f"{'params':>8}", f"{'active':>8}"]
        )
    ]
    for title in titles:
        cells = [
            f"{_mean_and_spread([results[title][key] for results in seeds], 100, 1):>{cell}}"
            for key in columns.values()
        ]
        for key in ("parameters", "active_parameters"):
            cells.append(f"{short_count(seeds[0][title][key]):>8}")
        lines.append("  ".join([f"{title:{width}}", *cells]))
    return "\n".join([*lines, "", HOW_TO_READ])


def format_attributes(seeds: Sequence[Results]) -> str:
    """Zero-shot accuracy by attribute in per cent: each expert as the dense model it came from, and the
    CLIP-MoE; "" where there are no attributes."""
    attributes = list(seeds[0][CLIP_MOE].get("zero_shot", {}))
    if not attributes:
        return ""
    rows = _experts(seeds[0]) | {CLIP_MOE: CLIP_MOE}
    width, cell = max(map(len, rows.values())), 6 if len(seeds) == 1 else 11
    cells = {name: max(cell, len(name)) for name in (*attributes, "mean")}
    lines = ["  ".join([f"{'':{width}}", *(f"{name:>{n}}" for name, n in cells.items())])]
    for title, label in rows.items():
        found = [[results[title]["zero_shot"][a] for a in attributes] for results in seeds]
        found = np.concatenate([found, np.mean(found, axis=1, keepdims=True)], axis=1)
        numbers = (
            f"{_mean_and_spread(of_one, 100, 1):>{n}}"
            for of_one, n in zip(found.T, cells.values(), strict=True)
        )
        lines.append("  ".join([f"{label:{width}}", *numbers]))
    chances = [100 / len(ATTRIBUTES[a]) for a in attributes]
    numbers = zip([*chances, np.mean(chances)], cells.values(), strict=True)
    lines.append("  ".join([f"{'chance':{width}}", *(f"{chance:>{n}.1f}" for chance, n in numbers)]))
    return "\n".join(["Zero-shot accuracy by attribute, per cent", *lines])


def _experts(results: Results) -> dict[str, str]:
    """{title: label} of the models that became experts."""
    return {
        title: f"expert {numbers['expert']} ({title.removesuffix(' alone')})"
        for title, numbers in results.items()
        if numbers["expert"] is not None
    }


def format_evaluations(seeds: Sequence[Results]) -> str:
    """A table for each of the config's evaluations: models by metrics, mean ± standard deviation."""
    with_numbers = [title for title, numbers in seeds[0].items() if "evaluations" in numbers]
    width, tables = max(map(len, with_numbers), default=0), []
    for line in seeds[0][CLIP_MOE].get("evaluations", {}):
        rows = {title: [results[title]["evaluations"][line] for results in seeds] for title in with_numbers}
        metrics = list(rows[CLIP_MOE][0])
        cells = {m: max(len(short_name(m)), 15 if len(seeds) > 1 else 6) for m in metrics}
        names = (f"{short_name(m):>{cell}}" for m, cell in cells.items())
        lines = [line, "  ".join([" " * width, *names])]
        for title, found in rows.items():
            numbers = [f"{_mean_and_spread([one[m] for one in found], 1, 3):>{cells[m]}}" for m in metrics]
            lines.append("  ".join([f"{title:{width}}", *numbers]))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def short_name(metric: str) -> str:
    """image_to_text_r1 -> i2t_r1."""
    return metric.replace("image_to_text", "i2t").replace("text_to_image", "t2i")


def _mean_and_spread(values: Sequence[float], scale: float, digits: int) -> str:
    values = scale * np.array(values)
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def differences(seeds: Sequence[Results]) -> dict[str, dict[str, str]]:
    """CLIP-MoE minus each other model, seed by seed: recall@1, "i2t / t2i", as {title: {column: points}}:
    the mean, the least and the most, and in how many seeds it is above."""
    found = {}
    for title in seeds[0]:
        if title == CLIP_MOE:
            continue
        points = np.array([[100 * (r[CLIP_MOE][key] - r[title][key]) for key in RECALL_AT_1] for r in seeds])
        columns = {"mean": points.mean(0), "least": points.min(0), "most": points.max(0)}
        found[title] = {name: f"{i2t:+.1f} / {t2i:+.1f}" for name, (i2t, t2i) in columns.items()}
        found[title]["seeds above"] = " / ".join(map(str, (points > 0).sum(0)))
    return found


def format_differences(seeds: Sequence[Results]) -> str:
    """`differences` as a table."""
    rows = differences(seeds)
    width = max(map(len, rows))
    lines = [f"CLIP-MoE minus each other model in each of {len(seeds)} seeds, R@1 in points, i2t / t2i"]
    lines.append(" " * width + "".join(f"{name:>16}" for name in next(iter(rows.values()))))
    lines += [f"{title:{width}}" + "".join(f"{p:>16}" for p in row.values()) for title, row in rows.items()]
    return "\n".join(lines)


def short_count(count: int) -> str:
    """3,562,000 -> 3.56M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
