"""The report's tables: recall and other scores by model, training, cost.

Letters: S seeds, M models, C columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmoe_jax.core.terminal import duration
from clipmoe_jax.dmu.recipe import CLIP_MOE, Results
from clipmoe_jax.evaluation.retrieval import ERROR, RANKS
from clipmoe_jax.evaluation.scores import is_setting, is_share, lower_is_better, shown_score
from clipmoe_jax.reporting.text_tables import (
    COST,
    differences,
    further_lines,
    has_cost,
    has_retention,
    has_retrieval,
    recall_with_ties,
    short_count,
    short_name,
    shown_metrics,
)

DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
FIRST = {f"{direction}_r1": label for direction, label in DIRECTIONS.items()}  # recall@1


class Cell(NamedTuple):
    """A cell: its text, a remark in smaller type, whether it is the best of its column."""

    text: str
    note: str = ""
    best: bool = False


class Table(NamedTuple):
    """A table. groups: {heading, "" for none: its columns}; rows: {title: cells}; strong: the row in bold."""

    caption: str
    groups: dict[str, list[str]]
    rows: dict[str, list[Cell]]
    strong: str = CLIP_MOE


def recall_table(seeds: Sequence[Results], chance: Mapping[str, float] | None = None) -> Table:
    """Returns recall and retention by model, in per cent, mean ± standard deviation over seeds; the models'
    sizes, and the cost of training them.

    R@1 and retention stand first: they are seen where the page is narrower than the table. Of one seed there
    are 95 % intervals in place of deviations. chance: of these metrics, a row of its own.
    """
    sizes = {"all": "parameters", "active": "active_parameters"}
    groups = {"parameters": list(sizes)}
    if has_cost(seeds):
        groups["training"], sizes = list(COST), sizes | COST
    rows = {
        title: [Cell(short_count(numbers[key])) for key in sizes.values()]
        for title, numbers in seeds[0].items()
    }
    if not has_retrieval(seeds):
        return Table("Models. There was no test set for recall.", groups, rows)
    keys, headings = list(FIRST), {"R@1": list(DIRECTIONS.values())}
    if has_retention(seeds):
        keys.append("retention")
        headings["what the base knew"] = ["old"]
    keys += [f"{direction}_r{k}" for direction in DIRECTIONS for k in RANKS[1:]]
    headings |= {heading: [f"R@{k}" for k in RANKS[1:]] for heading in DIRECTIONS.values()}
    ties = recall_with_ties(seeds)
    keys += ties.values()
    headings |= {"ties in random order": [name.removesuffix(" ties") for name in ties]} if ties else {}
    scores = 100 * np.array([[[r[title].get(key, np.nan) for key in keys] for title in rows] for r in seeds])
    cells = dict(zip(rows, score_cells(scores, errors=_errors(seeds, list(rows), keys)), strict=True))
    spread = ""
    if len(seeds) > 1:
        spread = f", mean ± standard deviation of {len(seeds)} seeds"
    elif has_errors(seeds):
        spread = "; ± half of the 95 % interval, by a bootstrap over test images"
    caption = f"Recall in per cent{spread}. Bold: the best of a column."
    table = {title: cells[title] + rows[title] for title in rows}
    if chance:
        guesses = [chance.get(key) for key in keys]
        guessed = [Cell("" if guess is None else f"{100 * guess:.1f}") for guess in guesses]
        table["chance"] = guessed + [Cell("")] * len(sizes)
    return Table(caption, headings | groups, table)


def has_errors(seeds: Sequence[Results]) -> bool:
    """Returns whether there is one seed, and intervals of its recall; earlier versions had none."""
    return len(seeds) == 1 and all(f"{key}{ERROR}" in n for key in FIRST for n in seeds[0].values())


def _errors(seeds: Sequence[Results], titles: Sequence[str], keys: Sequence[str]) -> np.ndarray | None:
    """Halves of intervals of recall@1 (M, C) in per cent, NaN for others; None where there are none."""
    if not has_errors(seeds):
        return None
    errors = [{key: seeds[0][title][f"{key}{ERROR}"] for key in FIRST} for title in titles]
    return 100 * np.array([[of_model.get(key, np.nan) for key in keys] for of_model in errors])


def evaluation_tables(seeds: Sequence[Results]) -> list[Table]:
    """Returns one table for each further evaluation, with the models that have it."""
    lines = dict.fromkeys(line for numbers in seeds[0].values() for line in further_lines(numbers))
    tables = []
    for line in lines:
        titles = [title for title, numbers in seeds[0].items() if line in numbers.get("evaluations", {})]
        numbers = [r[title]["evaluations"][line] for r in seeds for title in titles]
        metrics = shown_metrics(list(numbers[0]), numbers)
        scores = [[[r[title]["evaluations"][line][m] for m in metrics] for title in titles] for r in seeds]
        scales = np.array([100 if is_share(m) else 1 for m in metrics])
        cells = score_cells(scales * np.array(scores), metrics)
        columns = [short_name(metric).replace("_", " ") for metric in metrics]
        rows = dict(zip(titles, cells, strict=True))
        if chance := seeds[0][titles[0]].get("chance", {}).get(line):
            rows["chance"] = [Cell(shown_score(m, chance[m]) if m in chance else "") for m in metrics]
        tables.append(Table(line, {"": columns}, rows))
    return tables


def score_cells(
    scores: np.ndarray,
    metrics: Sequence[str] | None = None,
    errors: np.ndarray | None = None,
) -> list[list[Cell]]:
    """Returns the cells of numbers (S, M, C), per cent or as they are: mean ± standard deviation over seeds,
    or errors (M, C), the best mean of each column marked; empty for NaN.

    metrics: of the columns; None for shares. One that is no share has four digits, and a setting no best.
    """
    means = scores.mean(axis=0)
    names = metrics or [""] * means.shape[1]
    sign = np.where([lower_is_better(name) for name in names], -1, 1)
    best = sign * means >= np.nanmax(sign * means, axis=0) - 1e-12
    best &= [not is_setting(name) for name in names]
    forms = [".1f" if is_share(name) else ".4g" for name in names]
    spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else errors
    if spread is None:
        spread = np.full(means.shape, np.nan)
    return [
        [
            Cell("")
            if np.isnan(means[row, column])
            else Cell(
                f"{means[row, column]:{forms[column]}}",
                "" if np.isnan(spread[row, column]) else f"± {spread[row, column]:{forms[column]}}",
                bool(best[row, column]),
            )
            for column in range(means.shape[1])
        ]
        for row in range(len(means))
    ]


def difference_table(seeds: Sequence[Results]) -> Table:
    """Returns CLIP-MoE minus each other model in each of the seeds, R@1 in points."""
    by_model = differences(seeds)
    rows = {
        title: [Cell(text.replace("-", "−")) for text in columns.values()]
        for title, columns in by_model.items()
    }
    caption = f"CLIP-MoE minus each other model in each of {len(seeds)} seeds, R@1 in points"
    columns = list(next(iter(by_model.values())))
    return Table(f"{caption}, {' / '.join(DIRECTIONS.values())}", {"": columns}, rows)


def phase_table(
    curves: Mapping[str, Mapping[str, np.ndarray]],
    names: Mapping[str, str],
    measured: Mapping[str, Mapping[str, Any]],
) -> Table:
    """Returns steps, time, speed and the last numbers of each phase.

    curves: as of `read.read_curves`. measured: of a phase's model in done.json, {} where it is not made yet.
    """
    rows = {}
    for phase, curve in curves.items():
        times, note = measured.get(phase, {}), ""
        seconds = times.get("seconds_now", curve["time"][-1] - curve["time"][0])
        if "steps_now" in times and times["steps_now"] < times["num_steps"]:
            note = f"for the last {times['steps_now']:,}"
        compiling = times.get("compile_seconds_now")
        rows[names[phase]] = [
            Cell(f"{curve['step'][-1]:,.0f}"),
            Cell(duration(seconds), note),
            Cell("" if compiling is None else duration(compiling)),
            Cell(f"{np.median(curve['pairs_per_second']):,.0f}"),
            Cell(f"{100 * np.median(curve['input_wait_fraction']):.0f} %"),
            Cell(f"{curve['loss'][-1]:.3f}"),
            Cell(f"{100 * curve['batch_accuracy'][-1]:.0f} %"),
        ]
    columns = [
        "steps",
        "time",
        "of it compiling",
        "pairs/s",
        "waits for input",
        "last loss",
        "right in last batch",
    ]
    return Table("Phases of training. Speed and waiting: the median.", {"": columns}, rows, strong="")


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Returns parameters, FLOPs, time and memory of each model; beside CLIP-MoE's the ratio to the base's."""
    forms = {
        "parameters": ("parameters", "all", short_count),
        "active_parameters": ("parameters", "active", short_count),
        "flops_per_image": ("FLOPs", "an image", short_count),
        "xla_flops_per_image": ("FLOPs", "… by XLA’s count", short_count),
        "flops_per_caption": ("FLOPs", "a caption", short_count),
        "latency_ms": ("speed", "latency, ms", "{:,.2f}".format),
        "pairs_per_second": ("speed", "pairs/s", "{:,.0f}".format),
        "best_batch": ("speed", "at batch", "{:,}".format),
        "peak_bytes": ("memory", "peak, MB", lambda count: f"{count / 1e6:,.1f}"),
    }
    base, rows = costs.get("base", {}), {}
    forms = {key: form for key, form in forms.items() if key in base}  # earlier versions measured more
    groups: dict[str, list[str]] = {}
    for heading, column, _ in forms.values():
        groups.setdefault(heading, []).append(column)
    for title, cost in costs.items():
        ratios = base.keys() - {"best_batch"} if title == CLIP_MOE else ()
        rows[title] = [
            Cell(form(cost[key]), f"{cost[key] / base[key]:.2f}×" if key in ratios else "")
            for key, (_, _, form) in forms.items()
        ]
    caption = "What encoding takes."
    if "latency_ms" in base:
        caption = "On the machine that evaluated. Latency: of one image and one caption together."
    return Table(caption, groups, rows)
