"""Tables of the report: recall and other scores by model, training, cost.

Letters: S seeds, M models, C columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmoe_jax.dmu.recipes import CLIP_MOE
from clipmoe_jax.evaluation.retrieval import RANKS
from clipmoe_jax.reporting.text_tables import Results, differences, has_retrieval, short_count, short_name

DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
FIRST = {f"{direction}_r1": label for direction, label in DIRECTIONS.items()}  # recall@1
LOWER_IS_BETTER = ("fpr95", "rank")  # how such metrics' names end
NO_SHARES = ("rank", "C")  # and those that are not parts of one


class Cell(NamedTuple):
    """What stands there; a remark in smaller type; whether it is the best of its column."""

    text: str
    note: str = ""
    best: bool = False


class Table(NamedTuple):
    """groups: {heading, "" for none: its columns}; rows: {title: cells}; strong: the row that stands out."""

    caption: str
    groups: dict[str, list[str]]
    rows: dict[str, list[Cell]]
    strong: str = CLIP_MOE


def recall_table(seeds: Sequence[Results]) -> Table:
    """Recall by model in per cent, mean ± standard deviation over seeds, and the models' sizes."""
    if not has_retrieval(seeds):
        rows = {
            title: [Cell(short_count(numbers[key])) for key in ("parameters", "active_parameters")]
            for title, numbers in seeds[0].items()
        }
        return Table("Models. There was no test set for recall.", {"parameters": ["all", "active"]}, rows)
    keys = [f"{direction}_r{k}" for direction in DIRECTIONS for k in RANKS]
    scores = 100 * np.array([[[r[title][key] for key in keys] for title in seeds[0]] for r in seeds])
    rows = {
        title: cells
        + [Cell(short_count(seeds[0][title][key])) for key in ("parameters", "active_parameters")]
        for title, cells in zip(seeds[0], score_cells(scores), strict=True)
    }
    groups = {heading: [f"R@{k}" for k in RANKS] for heading in DIRECTIONS.values()}
    spread = f", mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else ""
    caption = f"Recall in per cent{spread}. Bold: the best of a column."
    return Table(caption, groups | {"parameters": ["all", "active"]}, rows)


def evaluation_tables(seeds: Sequence[Results]) -> list[Table]:
    """One table for each further evaluation, with the models that have it."""
    names = dict.fromkeys(name for result in seeds[0].values() for name in result.get("evaluations", {}))
    tables = []
    for name in names:
        titles = [title for title, result in seeds[0].items() if name in result.get("evaluations", {})]
        metrics = list(seeds[0][titles[0]]["evaluations"][name])
        found = [[[r[title]["evaluations"][name][m] for m in metrics] for title in titles] for r in seeds]
        scales = [1 if m.endswith(NO_SHARES) else 100 for m in metrics]
        cells = score_cells(scales * np.array(found), [m.endswith(LOWER_IS_BETTER) for m in metrics])
        columns = [short_name(metric).replace("_", " ") for metric in metrics]
        tables.append(Table(name, {"": columns}, dict(zip(titles, cells, strict=True))))
    return tables


def score_cells(scores: np.ndarray, lower_is_better: Sequence[bool] | None = None) -> list[list[Cell]]:
    """Numbers (S, M, C), per cent or as they are: mean ± standard deviation over seeds, the best mean of each
    column marked."""
    means = scores.mean(axis=0)
    sign = np.where(lower_is_better, -1, 1) if lower_is_better is not None else 1
    best = sign * means >= (sign * means).max(axis=0) - 1e-12
    spread = scores.std(axis=0, ddof=1) if len(scores) > 1 else None
    return [
        [
            Cell(
                f"{means[row, column]:.1f}",
                "" if spread is None else f"± {spread[row, column]:.1f}",
                bool(best[row, column]),
            )
            for column in range(means.shape[1])
        ]
        for row in range(len(means))
    ]


def difference_table(seeds: Sequence[Results]) -> Table:
    """CLIP-MoE minus each other model in each of the seeds, R@1 in points."""
    found = differences(seeds)
    rows = {
        title: [Cell(text.replace("-", "−")) for text in columns.values()] for title, columns in found.items()
    }
    caption = f"CLIP-MoE minus each other model in each of {len(seeds)} seeds, R@1 in points"
    columns = list(next(iter(found.values())))
    return Table(f"{caption}, {' / '.join(DIRECTIONS.values())}", {"": columns}, rows)


def phase_table(curves: Mapping[str, Mapping[str, np.ndarray]], names: Mapping[str, str]) -> Table:
    """Steps, minutes, speed and the last numbers of each phase; curves as of `read.read_curves`."""
    rows = {}
    for phase, curve in curves.items():
        minutes = (curve["time"][-1] - curve["time"][0]) / 60
        rows[names[phase]] = [
            Cell(f"{curve['step'][-1]:,.0f}"),
            Cell(f"{minutes:,.1f}"),
            Cell(f"{np.median(curve['pairs_per_second']):,.0f}"),
            Cell(f"{100 * np.median(curve['input_wait_fraction']):.0f} %"),
            Cell(f"{curve['loss'][-1]:.3f}"),
            Cell(f"{100 * curve['batch_accuracy'][-1]:.0f} %"),
        ]
    columns = ["steps", "minutes", "pairs/s", "waits for input", "last loss", "right in last batch"]
    return Table("Phases of training. Speed and waiting: the median.", {"": columns}, rows, strong="")


def cost_table(costs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Parameters, FLOPs, time and memory of each model; beside CLIP-MoE's how many times the base's."""
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
    groups: dict[str, list[str]] = {}
    for heading, column, _ in forms.values():
        groups.setdefault(heading, []).append(column)
    base, rows = costs.get("base"), {}
    for title, cost in costs.items():
        compared = base is not None and title == CLIP_MOE
        rows[title] = [
            Cell(form(cost[key]), f"{cost[key] / base[key]:.2f}×" if compared and key != "best_batch" else "")
            for key, (_, _, form) in forms.items()
        ]
    caption = "On the machine that evaluated. Latency: of one image and one caption together."
    return Table(caption, groups, rows)
