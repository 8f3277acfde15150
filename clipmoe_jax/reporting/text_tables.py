"""Tables of results for a terminal: of one run, or of several seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clipmoe_jax.dmu.recipe import CLIP_MOE, Results
from clipmoe_jax.evaluation.retrieval import RANDOM_TIES, RECALL_AT_1
from clipmoe_jax.evaluation.scores import is_share, shown_score

R_AT_1 = dict(zip(("i2t R@1", "t2i R@1"), RECALL_AT_1, strict=True))
R_AT_5 = {"i2t R@5": "image_to_text_r5", "t2i R@5": "text_to_image_r5"}
HOW_TO_READ = (
    "R@k: per cent of queries whose right answer is among the first k; i2t asks with an image, t2i with a "
    "caption. Active: what one token uses."
)
TIES = "Equal scores count as misses; in the columns of ties they stand in random order."
OLD = "Old: what the base knew, per cent (config.retention)."
COST = {"pairs": "pairs", "FLOPs": "flops"}
HOW_TO_READ_COST = "Pairs, FLOPs: of training after the base, all that a model is made from among them."
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
    return all(key in numbers for results in seeds for numbers in results.values() for key in RECALL_AT_1)


def recall_with_ties(seeds: Sequence[Results]) -> dict[str, str]:
    """Returns {column: key} of recall@1 with equal scores in random order; empty if that changes nothing."""
    models = [numbers for results in seeds for numbers in results.values()]
    keys = shown_metrics([f"{key}{RANDOM_TIES}" for key in RECALL_AT_1], models)
    return {f"{short_name(key)[:3]} R@1 ties": key for key in keys}


def shown_metrics(metrics: Sequence[str], models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the metrics without recalls for ties that are the plain recall's in every model's numbers."""
    return [
        metric
        for metric in metrics
        if not metric.endswith(RANDOM_TIES)
        or any(abs(n[metric] - n[metric.removesuffix(RANDOM_TIES)]) > 5e-3 for n in models if metric in n)
    ]


def has_retention(seeds: Sequence[Results]) -> bool:
    """Returns whether it was measured what models keep of what the base knew."""
    return all(any("retention" in numbers for numbers in results.values()) for results in seeds)


def titles_with_retention(seeds: Sequence[Results]) -> list[str]:
    """Returns the models that have retention; ensembles of earlier versions have none."""
    return [title for title in seeds[0] if all("retention" in results[title] for results in seeds)]


def score_columns(seeds: Sequence[Results], ties: Mapping[str, str]) -> dict[str, str]:
    """Returns {column: key} of the scores that were measured. ties: of `recall_with_ties`, {} for none."""
    old = {"old": "retention"} if has_retention(seeds) else {}
    return {**R_AT_1, **ties, **old, **R_AT_5} if has_retrieval(seeds) else old


def has_cost(seeds: Sequence[Results]) -> bool:
    """Returns whether it is known what each model took to train; earlier versions did not say."""
    return all(key in numbers for results in seeds for numbers in results.values() for key in COST.values())


def format_table(seeds: Sequence[Results]) -> str:
    """Returns one row a model: recall@1 if there is any, retention, recall@5 (mean ± standard deviation over
    seeds), parameters, active parameters, cost of training."""
    ties = recall_with_ties(seeds)
    columns = score_columns(seeds, ties)
    widths = {name: max(7 if len(seeds) == 1 else 11, len(name)) for name in columns}
    sizes = {"params": "parameters", "active": "active_parameters", **(COST if has_cost(seeds) else {})}
    widths |= dict.fromkeys(sizes, 8)
    rows = {}
    for title, numbers in seeds[0].items():
        recall = [
            _score_and_spread(key, [r[title][key] for r in seeds]) if key in numbers else ""
            for key in columns.values()
        ]
        rows[title] = [*recall, *(short_count(numbers[key]) for key in sizes.values())]
    notes = [
        *(HOW_TO_READ, *([TIES] if ties else []), *([OLD] if "old" in columns else [])),
        *([HOW_TO_READ_COST] if has_cost(seeds) else []),
    ]
    return "\n".join([*_lines(widths, rows), "", " ".join(notes)])


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
    widths = {column: max(6 if len(seeds) == 1 else 11, len(column)) for column in columns}
    rows = {}  # all are shares as the mean is, whatever an attribute's name ends in
    for title, label in labels.items():
        of_seeds = [results[title]["evaluations"][line] for results in seeds]
        rows[label] = [_score_and_spread(MEAN, [n[column] for n in of_seeds]) for column in columns]
    chance = seeds[0][CLIP_MOE]["chance"][line]
    chance = {MEAN: float(np.mean(list(chance.values()))), **chance}
    rows["chance"] = [f"{100 * chance[column]:.1f}" for column in columns]
    data = f" of {line.partition(':')[2]}" if len(attribute_lines(seeds)) > 1 else ""
    return "\n".join([f"Zero-shot accuracy by attribute{data}, per cent", *_lines(widths, rows)])


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
    tables = []
    for line in further_lines(seeds[0][CLIP_MOE]):
        numbers = [r[title]["evaluations"][line] for r in seeds for title in evaluated]
        metrics = shown_metrics(list(numbers[0]), numbers)
        names = map(short_name, metrics)
        widths = {name: max(len(name), 15 if len(seeds) > 1 else 6) for name in names}
        rows = {}
        for title in evaluated:
            of_seeds = [results[title]["evaluations"][line] for results in seeds]
            rows[title] = [_score_and_spread(m, [n[m] for n in of_seeds]) for m in metrics]
        tables.append("\n".join([_in_per_cent(line, metrics), *_lines(widths, rows)]))
    return "\n\n".join(tables)


def short_name(metric: str) -> str:
    """Returns a metric's name with the direction cut short: image_to_text_r1 -> i2t_r1."""
    return metric.replace("image_to_text", "i2t").replace("text_to_image", "t2i")


def _in_per_cent(line: str, metrics: Sequence[str]) -> str:
    """The heading of a table of an evaluation."""
    others = [short_name(metric) for metric in metrics if not is_share(metric)]
    return f"{line}, per cent" + (f" but for {', '.join(others)}" if others else "")


def _score_and_spread(metric: str, values: Sequence[float]) -> str:
    """The mean of a metric over seeds and its standard deviation, as `shown_score`."""
    spread = f" ± {shown_score(metric, float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return shown_score(metric, float(np.mean(values))) + spread


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
    widths = dict.fromkeys(next(iter(rows.values())), 14)
    lines = _lines(widths, {title: list(row.values()) for title, row in rows.items()})
    head = f"CLIP-MoE minus each other model in each of {len(seeds)} seeds, R@1 in points, i2t / t2i"
    return "\n".join([head, *lines])


def short_count(count: float) -> str:
    """Returns a count in thousands, millions and so on: 3,562,000 -> 3.56M."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


def shares_in_words(weights: Sequence[float]) -> str:
    """Returns what parts of their sum weights are, in per cent."""
    return ", ".join(f"{100 * weight / sum(weights):.1f} %" for weight in weights)


def format_models(line: str, numbers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns the table of one evaluation line: a row for each metric, a column for each model.

    numbers: {model: {line: {metric: value}}}, with a model named "model".
    """
    metrics = shown_metrics(list(numbers["model"][line]), [of_line[line] for of_line in numbers.values()])
    widths = {name: max(6, len(name)) for name in numbers}
    rows = {
        short_name(m): [shown_score(m, of_line[line][m]) for of_line in numbers.values()] for m in metrics
    }
    return "\n".join([_in_per_cent(line, metrics), *_lines(widths, rows)])


def format_cost(costs: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the table of measured costs: a row for each model. costs: {model: numbers of `cost.costs`}."""
    forms: dict[str, tuple[str, Callable[[float], str]]] = {
        "latency_ms": ("latency, ms", "{:,.2f}".format),
        "pairs_per_second": ("pairs/s", "{:,.0f}".format),
        "best_batch": ("at batch", "{:,}".format),
        "peak_bytes": ("peak, MB", lambda count: f"{count / 1e6:,.1f}"),
    }
    widths = {column: max(8, len(column)) for column, _ in forms.values()}
    rows = {name: [form(numbers[key]) for key, (_, form) in forms.items()] for name, numbers in costs.items()}
    return "\n".join(["cost of encoding an image and a caption", *_lines(widths, rows)])


def _lines(widths: Mapping[str, int], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the lines of a table. widths: {column: characters}; rows: {title: a cell for each column}."""
    width = max(map(len, rows))
    return [
        "  ".join(
            [f"{title:{width}}", *(f"{cell:>{n}}" for cell, n in zip(cells, widths.values(), strict=True))]
        )
        for title, cells in {"": list(widths), **rows}.items()
    ]
