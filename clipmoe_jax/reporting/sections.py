"""The report's sections on models and data: results, clusters, examples, cost, config.

A section is a function (the seeds' folders) -> dict for the page's template. It raises NotThereError if a
file that it reads is not there. All but means over seeds are of the first seed.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipmoe_jax.core.errors import naming
from clipmoe_jax.core.terminal import duration, reading
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu.recipe import CLIP_MOE, Results
from clipmoe_jax.evaluation.retrieval import ERROR, RANKS
from clipmoe_jax.reporting import charts, pictures, tables
from clipmoe_jax.reporting.read import DIAGNOSTICS, Folder, NotThereError, read_curves, read_labels
from clipmoe_jax.reporting.text_tables import (
    MEAN,
    attribute_lines,
    dense_experts,
    has_cost,
    has_retention,
    has_retrieval,
    shares_in_words,
    titles_with_retention,
)

Context = dict[str, Any]
EXAMPLES_OF_CLUSTER = 6
EQUAL_PAIRS = 0.02  # how far numbers of pairs may be apart: budgets end with whole batches
FIRST = tables.FIRST


def summary(folders: Sequence[Folder]) -> Context:
    """Returns recall@1 of CLIP-MoE, its base, the best model of as many pairs and the best of all, in per
    cent, mean over seeds."""
    seeds = read_results(folders)
    if not has_retrieval(seeds):
        command = f"{folders[0].command} --stage=evaluate --config.data.test=FOLDER"
        raise NotThereError("recall on a test set", command)
    mean = {
        title: {key: 100 * float(np.mean([r[title][key] for r in seeds])) for key in FIRST}
        for title in seeds[0]
    }
    best = max(mean, key=lambda title: sum(mean[title].values()))
    control = _control(seeds, mean)
    active = {title: result["active_parameters"] for title, result in seeds[0].items()}
    return {
        "base": mean["base"],
        "moe": mean[CLIP_MOE],
        "gain": {key: mean[CLIP_MOE][key] - mean["base"][key] for key in FIRST},
        "times_active": active[CLIP_MOE] / active["base"],
        "num_ahead": sum(all(r[CLIP_MOE][key] > r["base"][key] for key in FIRST) for r in seeds),
        "num_seeds": len(seeds),
        "old": _old(seeds, best, control) if has_retention(seeds) else None,
        "control": control,
        "control_scores": mean.get(control or ""),
        "best": None if best == CLIP_MOE else best,
        "best_scores": mean[best],
        "best_times_active": active[best] / active["base"],
        "num_images": folders[0].done_field("eval", "measured").get("num_images"),
    }


def _control(seeds: Sequence[Results], mean: dict[str, dict[str, float]]) -> str | None:
    """Returns the title of the model with the highest recall among those of as many pairs as CLIP-MoE."""
    if not has_cost(seeds):
        return None
    pairs = {title: numbers["pairs"] for title, numbers in seeds[0].items()}
    controls = [t for t in mean if t != CLIP_MOE and abs(pairs[t] / pairs[CLIP_MOE] - 1) < EQUAL_PAIRS]
    return max(controls, key=lambda title: sum(mean[title].values()), default=None)


def _old(seeds: Sequence[Results], best: str, control: str | None) -> dict[str, float]:
    """Returns retention of the base, CLIP-MoE, the model with the highest recall and that of as many pairs:
    per cent, mean over seeds."""
    titles = {"base": "base", "moe": CLIP_MOE, "best": best, "control": control}
    titles = {name: title for name, title in titles.items() if title in titles_with_retention(seeds)}
    return {
        name: 100 * float(np.mean([r[title]["retention"] for r in seeds])) for name, title in titles.items()
    }


def results(folders: Sequence[Folder]) -> Context:
    """Returns the tables, and as charts recall@1 and the accuracy by attribute, where there are such."""
    seeds = read_results(folders)
    with_recall = has_retrieval(seeds)
    return {
        "table": tables.recall_table(seeds, _chance(folders[0], seeds)),
        "differences": tables.difference_table(seeds) if with_recall and len(seeds) > 1 else None,
        "both_axes": _both_axes(seeds) if with_recall and has_retention(seeds) else None,
        "bars": _recall_bars(seeds) if with_recall else None,
        "attributes": _attributes(seeds),
        "further": tables.evaluation_tables(seeds),
    }


def _chance(folder: Folder, seeds: Sequence[Results]) -> dict[str, float]:
    """Returns what guessing reaches of recall@k, for as many captions to each image, and of retention."""
    numbers, chance = seeds[0]["base"].get("chance", {}), {}
    if folder.has("config.json"):
        of_line = numbers.get(folder.config().get("retention", ""), {})
        chance |= {"retention": of_line["top1"]} if "top1" in of_line else {}
    counts = folder.done_field("eval", "measured")
    if images := counts.get("num_images"):
        for k in RANKS:
            # The first caption of k that are drawn may be an own one, or else the second, …
            own = counts["num_captions"] / images
            missed = np.prod([1 - own / (counts["num_captions"] - j) for j in range(min(k, images))])
            chance |= {f"image_to_text_r{k}": 1 - missed, f"text_to_image_r{k}": min(1.0, k / images)}
    return chance


def _recall_bars(seeds: Sequence[Results]) -> charts.Markup:
    titles, pairs = list(seeds[0]), {}
    for key, label in FIRST.items():
        values = 100 * np.array([[r[title][key] for title in titles] for r in seeds])
        spread = values.std(axis=0, ddof=1) if len(seeds) > 1 else None
        if tables.has_errors(seeds):
            spread = 100 * np.array([seeds[0][title][f"{key}{ERROR}"] for title in titles])
        pairs[label] = (values.mean(axis=0), spread)
    numbers = (
        f"{title} {' and '.join(f'{values[row]:.1f}' for values, _ in pairs.values())}"
        for row, title in enumerate(titles)
    )
    alt = f"Bars of recall at 1 in per cent, image to text and text to image: {'; '.join(numbers)}."
    return charts.draw_paired_bars("recall", alt, titles, pairs, x="recall@1 (%)", strong=CLIP_MOE)


def _both_axes(seeds: Sequence[Results]) -> Context:
    """New detail against old knowledge, a point for each model, means over seeds; curves of blends."""

    def place(numbers: Sequence[dict[str, Any]]) -> tuple[float, float]:
        """Retention and recall@1, both in per cent."""
        new = [np.mean([n[key] for key in FIRST]) for n in numbers]
        return 100 * float(np.mean([n["retention"] for n in numbers])), 100 * float(np.mean(new))

    points = {title: place([r[title] for r in seeds]) for title in titles_with_retention(seeds)}
    curves = {}
    for title, numbers in seeds[0].items():
        if shares := list(numbers.get("blends", {})):
            between = [place([r[title]["blends"][share] for r in seeds]) for share in shares]
            curves[title] = np.array([points["base"], *between, points[title]])
    told = (f"{title} {old:.1f} and {new:.1f}" for title, (old, new) in points.items())
    alt = f"Old knowledge and new detail in per cent: {'; '.join(told)}."
    axes = {"x": "old: what the base knew (%)", "y": "new: mean recall@1 (%)"}
    chart = charts.draw_scatter("both-axes", alt, points, curves, **axes, strong=CLIP_MOE)
    return {"chart": chart, "labels": list(points), "has_blends": bool(curves)}


def read_results(folders: Sequence[Folder]) -> list[Results]:
    """Returns eval/results.json of each seed: the models and the kinds of numbers that all of them have.

    Seeds differ where a run goes on with more baselines and has not come to the last seed yet.
    """
    seeds: list[Results] = [folder.json("eval/results.json", "evaluate") for folder in folders]
    kinds = {
        title: [kind for kind in seeds[0][title] if all(kind in seed[title] for seed in seeds)]
        for title in seeds[0]
        if all(title in seed for seed in seeds)
    }
    return [{title: {kind: seed[title][kind] for kind in kinds[title]} for title in kinds} for seed in seeds]


def _attributes(seeds: Sequence[Results]) -> dict[str, charts.Markup]:
    """Returns {title: heat map} of each evaluation by attribute: the experts, each as the dense model it came
    from, and CLIP-MoE."""
    labels = {title: f"expert {e}: {of}" for title, (e, of) in dense_experts(seeds[0]).items()}
    labels[CLIP_MOE] = CLIP_MOE
    rows, lines, maps = list(labels.values()), attribute_lines(seeds), {}
    for number, line in enumerate(lines):
        title = "Zero-shot accuracy" + (f" on {line.partition(':')[2]}" if len(lines) > 1 else "")
        names = list(seeds[0][CLIP_MOE]["evaluations"][line])
        attributes = [*(name for name in names if name != MEAN), *(MEAN for name in names if name == MEAN)]
        accuracies = [[[r[t]["evaluations"][line][a] for a in attributes] for t in labels] for r in seeds]
        values = 100 * np.mean(accuracies, axis=0)
        best = (f"{a} {rows[i]}" for a, i in zip(attributes, values.argmax(axis=0), strict=True))
        alt = f"Heat map in per cent. {title}, the best by attribute: {', '.join(best)}."
        chance = seeds[0][CLIP_MOE]["chance"][line]
        chance = {MEAN: float(np.mean(list(chance.values())))} | chance
        values = np.concatenate([values, [[100 * chance[a] for a in attributes]]])
        width = 2.2 + 0.75 * len(attributes)
        look = {"low": 0, "high": 100, "form": "{:.0f}", "width": width, "strong": CLIP_MOE}
        shown = [*rows, "chance"]
        maps[title] = charts.draw_matrix(f"attributes-{number}", alt, values, shown, attributes, **look)
    return maps


def clusters(folders: Sequence[Folder]) -> Context:
    """Returns {"stages": {stage: sizes of clusters, pairs of the two largest}, "gone": why no examples,
    "shares": of the sources, "" if every pair counts once}."""
    folder, gone, records = folders[0], None, None
    labels = read_labels(folder)
    try:
        records = folder.records("train")
    except NotThereError as error:
        gone = error
    config = folder.config() if folder.has("config.json") else None
    batch_size = config["mcl"]["batch_size"] if config else None
    weights = config["data"].get("weights") if config else None
    stages = {stage: _stage(folder, stage, labels[stage], records, batch_size) for stage in labels}
    return {"stages": stages, "gone": gone, "shares": shares_in_words(weights) if weights else ""}


def _stage(
    folder: Folder, stage: int, labels: np.ndarray, records: Records | None, batch_size: int | None
) -> Context:
    names, sizes = np.unique(labels, return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    alt = (
        f"Sizes of the {len(sizes)} clusters of stage {stage} from the largest, on a logarithmic scale: "
        f"{sizes.max():,} to {sizes.min():,} pairs, median {np.median(sizes):,.0f}."
    )
    report = folder.done_field(f"stage_{stage}/params", "measured")
    levels = [count for name, count in sorted(report.items()) if name.startswith("pairs_level_")]
    return {
        "chart": charts.draw_sizes(f"clusters-{stage}", alt, sizes[order], batch_size),
        "num_clusters": len(sizes),
        "num_pairs": len(labels),
        "largest": [_cluster(records, labels, int(names[i])) for i in order[:2]] if records else [],
        "own": levels[0] if levels else None,
        "of_parents": sum(levels[1:]),
        "unused": report.get("pairs_unused", 0),
    }


def _cluster(records: Records, labels: np.ndarray, name: int) -> Context:
    """Returns some of a cluster's pairs, from all over the data."""
    members = np.flatnonzero(labels == name)
    chosen = np.linspace(0, len(members) - 1, min(EXAMPLES_OF_CLUSTER, len(members))).astype(int)
    examples = []
    for index in members[chosen].tolist():
        image, caption = _example(records, index)
        examples.append({"record": index, "image": image, "caption": caption})
    return {"name": name, "size": len(members), "examples": examples}


def _example(records: Records, index: int) -> tuple[str, str]:
    """Returns the thumbnail of a record, and its first caption."""
    record, place = records[index], f"record {index} of {records.path}"
    with naming(place), reading([place]):
        return pictures.thumbnail(record["image"]), record["captions"][0]


def neighbours(folders: Sequence[Folder]) -> Context:
    """Returns test images on which one of base and CLIP-MoE ranks an own caption first and the other does
    not."""
    by_verdict = folders[0].json("eval/neighbours.json", DIAGNOSTICS)
    records = folders[0].records("test")

    def answer(entry: dict, model: str, right: bool) -> Context:
        caption, score = entry[model]
        own = caption == entry["caption"]
        return {"right": right, "own": own, "words": _compare(caption, entry["caption"]), "score": score}

    def show(entry: dict, right: str) -> Context:
        titles = {"base": "base", "clip_moe": CLIP_MOE}
        return {
            "record": entry["image"],
            "image": _example(records, entry["image"])[0],
            "caption": entry["caption"],
            "answers": {title: answer(entry, model, model == right) for model, title in titles.items()},
        }

    return {
        "CLIP-MoE right, base wrong": [show(entry, "clip_moe") for entry in by_verdict["clip_moe_right"]],
        "Base right, CLIP-MoE wrong": [show(entry, "base") for entry in by_verdict["base_right"]],
    }


def _compare(answer: str, own: str) -> list[tuple[str, bool]]:
    """Returns the words of an answer, each with whether the own caption lacks it."""

    def plain(word: str) -> str:
        return word.strip(".,;:!?\"'()").lower()

    known = {plain(word) for word in own.split()}
    return [(word, plain(word) not in known) for word in answer.split()]


def cost(folders: Sequence[Folder]) -> Context:
    """Returns the table of what the models cost at inference."""
    return {"table": tables.cost_table(folders[0].json("eval/cost.json", DIAGNOSTICS))}


def config(folders: Sequence[Folder]) -> Context:
    """Returns the config as JSON, and the versions with which the routers were trained."""
    versions = folders[0].done_field("moe/params", "versions")
    return {"json": json.dumps(folders[0].config(), indent=2), "versions": versions}


def made(folders: Sequence[Folder]) -> Context:
    """Returns on which day a run began, how long its work took (`Folder.seconds`), on which devices, and by
    which versions, as far as it is known."""
    folder = folders[0]
    began = min(float(curve["time"][0]) for curve in read_curves(folder).values())
    seconds = folder.seconds()
    return {
        "date": f"{datetime.datetime.fromtimestamp(began, datetime.UTC):%-d %B %Y}",
        "duration": "" if seconds is None else duration(seconds),
        "devices": folder.made("moe/params").get("devices", ""),
        "versions": folder.done_field("moe/params", "versions"),
    }
