"""Tables of results for a terminal: of one run, or of several seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipmoe_jax.dmu.recipes import CLIP_MOE, Results

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
ATTRIBUTES = "attributes"  # the kind of evaluation that has a table of its own
MEAN = "mean"  # over the attributes


def format_results(seeds: Sequence[Results]) -> str:
    """Returns all tables of one run, or of several seeds."""
    attributes = [format_attributes(seeds, line) for line in attribute_lines(seeds)]
    tables = [format_table(seeds), *attributes, format_evaluations(seeds)]
    if len(seeds) > 1 and has_retrieval(seeds):
        tables.append(format_differences(seeds))
    return "\n\n".join(filter(None, tables))


def format_variants(variants: Mapping[str, Sequence[Results]]) -> str:
    """Returns a row for the CLIP-MoE of each variant: mean and standard deviation over its seeds."""
    seeds: list[dict[str, Any]] = [
        {name: results[CLIP_MOE] for name, results in zip(variants, of_seed, strict=True)}
        for of_seed in zip(*variants.values(), strict=True)
    ]
    return format_table(seeds)


def has_retrieval(seeds: Sequence[Results]) -> bool:
    """Returns whether there was a test set for retrieval."""
    return all(
        key in numbers for results in seeds for numbers in results.values() for key in COLUMNS.values()
    )


def format_table(seeds: Sequence[Results]) -> str:
    """Returns one row a model: recall if there is any (mean ± standard deviation over seeds), parameters,
    active parameters."""
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


def attribute_lines(seeds: Sequence[Results]) -> list[str]:
    """Returns the evaluations that tell attributes, those whose lines begin "attributes:"."""
    return [line for line in seeds[0][CLIP_MOE].get("evaluations", {}) if _is_of_attributes(line)]


def further_lines(numbers: dict[str, Any]) -> list[str]:
    """Returns a model's other evaluations."""
    return [line for line in numbers.get("evaluations", {}) if not _is_of_attributes(line)]


def _is_of_attributes(line: str) -> bool:
    return line.partition(":")[0] == ATTRIBUTES


def format_attributes(seeds: Sequence[Results], line: str) -> str:
    """Returns zero-shot accuracy by attribute in per cent: each expert as the dense model it came from, the
    CLIP-MoE, and chance. line: of `attribute_lines`."""
    labels = {title: f"expert {e} ({of})" for title, (e, of) in dense_experts(seeds[0]).items()}
    labels[CLIP_MOE] = CLIP_MOE
    columns = list(seeds[0][CLIP_MOE]["evaluations"][line])
    width, cell = max(map(len, labels.values())), 6 if len(seeds) == 1 else 11
    widths = {column: max(cell, len(column)) for column in columns}
    lines = ["  ".join([" " * width, *(f"{column:>{n}}" for column, n in widths.items())])]
    for title, label in labels.items():
        cells = (
            f"{_mean_and_spread([r[title]['evaluations'][line][column] for r in seeds], 100, 1):>{n}}"
            for column, n in widths.items()
        )
        lines.append("  ".join([f"{label:{width}}", *cells]))
    chance = seeds[0][CLIP_MOE]["chance"][line]
    chance = {MEAN: float(np.mean(list(chance.values()))), **chance}
    cells = (f"{100 * chance[column]:>{n}.1f}" for column, n in widths.items())
    lines.append("  ".join([f"{'chance':{width}}", *cells]))
    data = f" of {line.partition(':')[2]}" if len(attribute_lines(seeds)) > 1 else ""
    return "\n".join([f"Zero-shot accuracy by attribute{data}, per cent", *lines])


def dense_experts(results: Results) -> dict[str, tuple[int, str]]:
    """Returns {title: (expert, its name)} of the dense models that became experts."""
    return {
        title: (numbers["expert"], title.removesuffix(" alone"))
        for title, numbers in results.items()
        if numbers["expert"] is not None
    }


def format_evaluations(seeds: Sequence[Results]) -> str:
    """Returns a table for each further evaluation: models by metrics, mean ± standard deviation."""
    evaluated = [title for title, numbers in seeds[0].items() if "evaluations" in numbers]
    width, tables = max(map(len, evaluated), default=0), []
    for line in further_lines(seeds[0][CLIP_MOE]):
        metrics = list(seeds[0][CLIP_MOE]["evaluations"][line])
        widths = {m: max(len(short_name(m)), 15 if len(seeds) > 1 else 6) for m in metrics}
        names = (f"{short_name(m):>{n}}" for m, n in widths.items())
        lines = [line, "  ".join([" " * width, *names])]
        for title in evaluated:
            of_seeds = [results[title]["evaluations"][line] for results in seeds]
            cells = (f"{_mean_and_spread([n[m] for n in of_seeds], 1, 3):>{widths[m]}}" for m in metrics)
            lines.append("  ".join([f"{title:{width}}", *cells]))
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def short_name(metric: str) -> str:
    """Returns a metric's name with the direction cut short: image_to_text_r1 -> i2t_r1."""
    return metric.replace("image_to_text", "i2t").replace("text_to_image", "t2i")


def _mean_and_spread(values: Sequence[float], scale: float, digits: int) -> str:
    scaled = scale * np.array(values)
    spread = f" ± {scaled.std(ddof=1):.{digits}f}" if len(scaled) > 1 else ""
    return f"{scaled.mean():.{digits}f}{spread}"


def differences(seeds: Sequence[Results]) -> dict[str, dict[str, str]]:
    """Returns recall@1 of CLIP-MoE minus each other model's, seed by seed, in points: {title: {column:
    "i2t / t2i"}} with the mean, the least, the most, and the number of seeds in which it is above."""
    rows = {}
    for title in seeds[0]:
        if title == CLIP_MOE:
            continue
        points = np.array([[100 * (r[CLIP_MOE][key] - r[title][key]) for key in RECALL_AT_1] for r in seeds])
        columns = {"mean": points.mean(0), "least": points.min(0), "most": points.max(0)}
        rows[title] = {name: f"{i2t:+.1f} / {t2i:+.1f}" for name, (i2t, t2i) in columns.items()}
        rows[title]["seeds above"] = " / ".join(map(str, (points > 0).sum(0)))
    return rows


def format_differences(seeds: Sequence[Results]) -> str:
    """Returns `differences` as a table."""
    rows = differences(seeds)
    width = max(map(len, rows))
    lines = [f"CLIP-MoE minus each other model in each of {len(seeds)} seeds, R@1 in points, i2t / t2i"]
    lines.append(" " * width + "".join(f"{name:>16}" for name in next(iter(rows.values()))))
    lines += [f"{title:{width}}" + "".join(f"{p:>16}" for p in row.values()) for title, row in rows.items()]
    return "\n".join(lines)


def short_count(count: float) -> str:
    """Returns a count in thousands, millions or billions: 3,562,000 -> 3.56M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def format_models(line: str, numbers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the table of one evaluation line: a row for each model, a column for each metric.

    numbers: {model: {line: {metric: value}}}, with a model named "model".
    """
    width = max(map(len, numbers))
    widths = {metric: max(6, len(short_name(metric))) for metric in numbers["model"][line]}
    rows = [line, "  ".join([" " * width, *(f"{short_name(m):>{n}}" for m, n in widths.items())])]
    for name, of_line in numbers.items():
        cells = (f"{of_line[line][metric]:>{n}.3f}" for metric, n in widths.items())
        rows.append("  ".join([f"{name:{width}}", *cells]))
    return "\n".join(rows)
