"""New detail and old knowledge, seed by seed: the tables of docs/keeping.md.

    python -m clipmoe_jax.main --config=configs/demo.py:controls,flops,seeds=51-60 --workdir=runs/keeping
    python -m benchmarks.keeping --name=demo --workdir=runs/keeping
    python -m benchmarks.keeping --name=demo --picture=docs/keeping.png

The second command copies the numbers of each seed that has been evaluated to benchmarks/results/keeping/demo,
a file a seed; the third prints the table and what it shows from these files alone, and draws both axes. "new"
is the mean of both R@1 on the test set, "old" the retention, both in per cent. Intervals: bootstrap over
seeds, 95 %.

Letters: S seeds, B blends.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

RESULTS = pathlib.Path(__file__).parent / "results" / "keeping"
MIXTURE, CURRICULUM, BASE = "CLIP-MoE", "dense curriculum", "base"
DIRECT_SAME_PAIRS = "direct fine-tuning, same total pairs"
CURRICULUM_SAME_PAIRS = "dense curriculum, same total pairs"
RECALL = ("image_to_text_r1", "text_to_image_r1")
AXES = ("new", "old")
CLOSE, APART = 1.0, 4.0  # points: of new that is as good, of old that is clearly less

Numbers = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", required=True, help="of the measurement: a folder of results/keeping")
    parser.add_argument("--workdir", type=pathlib.Path, help="of a run of several seeds, to copy from")
    parser.add_argument("--picture", type=pathlib.Path, help="a PNG of both axes to draw")
    flags = parser.parse_args()
    folder = RESULTS / flags.name
    if flags.workdir:
        collect(flags.workdir, folder)
        return
    seeds = [json.loads(file.read_text()) for file in sorted(folder.glob("seed_*.json"))]
    if not seeds:
        raise SystemExit(f"{folder} has no seed: --workdir copies them there")
    print(format_table(seeds))
    print()
    print("\n".join(findings(seeds)))
    if flags.picture:
        draw(seeds, flags.picture)


def draw(seeds: list[Numbers], picture: pathlib.Path) -> None:
    """Draws each model's means of both axes, numbered, and its blends with the base as a curve."""
    titles = [title for title in titles_of(seeds) if "alone" not in title]
    figure = Figure((9.2, max(4.6, 0.19 * len(titles))), layout="constrained", dpi=150)
    axis = figure.add_subplot()
    base = [of(seeds, BASE, a).mean() for a in ("old", "new")]
    for number, title in enumerate(titles, 1):
        there = with_model(seeds, title)
        x, y = (of(there, title, a).mean() for a in ("old", "new"))
        with_blends = [seed[title]["blends"] for seed in there if "blends" in seed[title]]
        if with_blends:
            between = [
                [np.mean([blends[share][a] for blends in with_blends]) for a in ("old", "new")]
                for share in with_blends[0]
            ]
            axis.plot(*np.transpose([base, *between, (x, y)]), color="0.6", linewidth=0.8, zorder=1)
        is_mixture = title == MIXTURE
        fill, ink = ("tab:blue", "white") if is_mixture else ("white", "black")
        axis.plot(
            x, y, "o", color=fill, markeredgecolor="black", markersize=14 if is_mixture else 11, zorder=2
        )
        axis.annotate(str(number), (x, y), ha="center", va="center", fontsize=7, color=ink)
        place = (1.02, 1 - (number - 0.5) / len(titles))
        weight = "bold" if is_mixture else "normal"
        axis.annotate(f"{number}  {title}", place, xycoords="axes fraction", fontsize=8, fontweight=weight)
    axis.set_xlabel("old: zero-shot accuracy on what the base knew (%)")
    axis.set_ylabel("new: mean recall@1 (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    figure.savefig(picture)


def collect(workdir: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a file for each seed of a run that has its results."""
    files = sorted(workdir.glob("seed_*/eval/results.json"))
    if not files:
        raise SystemExit(f"{workdir}/seed_*/eval/results.json: no such file, so no seed is evaluated")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        models = {title: _summary(numbers) for title, numbers in json.loads(file.read_text()).items()}
        out = folder / f"{file.parents[1].name}.json"
        out.write_text(json.dumps(models, indent=1) + "\n")
        print(out)


def _summary(numbers: dict[str, Any]) -> dict[str, Any]:
    """Both axes in per cent, recall by direction, and costs; of blends both axes by share."""
    summary = {name: round(100 * numbers[name], 2) for name in RECALL} | _both_axes(numbers)
    summary |= {name: numbers[name] for name in ("pairs", "flops", "active_parameters")}
    if blends := numbers.get("blends"):
        summary["blends"] = {share: _both_axes(of_share) for share, of_share in blends.items()}
    return summary


def _both_axes(numbers: dict[str, Any]) -> dict[str, float]:
    return {"new": round(100 * recall(numbers), 2), "old": round(100 * numbers["retention"], 2)}


def recall(numbers: dict[str, Any]) -> float:
    """Returns the mean of both R@1."""
    return float(np.mean([numbers[name] for name in RECALL]))


def of(seeds: list[Numbers], title: str, name: str) -> np.ndarray:
    """Returns one number of one model in each seed that has the model, (S,)."""
    return np.array([seed[title][name] for seed in seeds if title in seed])


def with_model(seeds: list[Numbers], title: str) -> list[Numbers]:
    """Returns the seeds that have a model: of a measurement that goes on some may not yet."""
    return [seed for seed in seeds if title in seed]


def titles_of(seeds: list[Numbers]) -> list[str]:
    """Returns the models of all seeds, in the order of the seed that has most of them."""
    return list(max(seeds, key=len))


def format_table(seeds: list[Numbers]) -> str:
    """Returns a row a model: both axes, their differences from the mixture's, costs, number of seeds."""
    differences = ("new, less the mixture's", "old, less the mixture's")
    header = ("", *AXES, *differences, "pairs", "FLOPs", "active", "seeds")
    rows = [header]
    for title in titles_of(seeds):
        count = len(with_model(seeds, title))
        axes = [_mean_and_spread(of(seeds, title, axis)) for axis in AXES]
        paired = [_difference(seeds, title, axis) if title != MIXTURE else "" for axis in AXES]
        pairs, flops, active = (of(seeds, title, n).mean() for n in ("pairs", "flops", "active_parameters"))
        costs = f"{pairs / 1e3:.1f}k", f"{flops / 1e12:.2f}T", f"{active / 1e6:.2f}M"
        rows.append((title, *axes, *paired, *costs, str(count)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in rows
    )


def _mean_and_spread(values: np.ndarray) -> str:
    spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def _difference(seeds: list[Numbers], title: str, axis: str) -> str:
    there = with_model(seeds, title)
    points = of(there, title, axis) - of(there, MIXTURE, axis)
    if len(points) < 2 or np.ptp(points) == 0:
        return f"{points.mean():+.1f}"
    interval = scipy.stats.bootstrap((points,), np.mean, method="percentile", rng=0).confidence_interval
    return f"{points.mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def findings(seeds: list[Numbers]) -> list[str]:
    """Returns the sentences that the table is for, each with its count of seeds."""
    new, old = of(seeds, MIXTURE, "new"), of(seeds, MIXTURE, "old")
    count = len(seeds)
    near = new >= of(seeds, CURRICULUM, "new") - CLOSE
    kept = old / of(seeds, BASE, "old")
    lines = [
        f"(a) The mixture's new is at most {CLOSE:g} point below the dense curriculum's in {near.sum()} of "
        f"{count} seeds; on average {np.mean(new - of(seeds, CURRICULUM, 'new')):+.2f} points.",
        f"    It keeps {100 * kept.mean():.1f} % of the base's old, at least {100 * kept.min():.1f} %.",
    ]
    for budget in ("pairs", "flops"):
        lines += _against_dense(seeds, budget)
    lines += _against_blends(seeds)
    there = with_model(with_model(seeds, CURRICULUM_SAME_PAIRS), DIRECT_SAME_PAIRS)
    if there:
        gain = of(there, CURRICULUM_SAME_PAIRS, "new") - of(there, DIRECT_SAME_PAIRS, "new")
        lines.append(
            f"(d) The dense curriculum is above direct fine-tuning at equal pairs in {(gain > 0).sum()} of "
            f"{len(there)} seeds; on average {gain.mean():+.1f} points, {gain.min():+.1f} at least."
        )
    return lines


def _against_dense(seeds: list[Numbers], budget: str) -> list[str]:
    """(b): dense controls within the mixture's budget."""
    dense = of(seeds, BASE, "active_parameters")[0]
    most = 1.001 * of(seeds, MIXTURE, budget).mean()  # a batch is rounded up
    lines = [
        f"(b) Dense models of at most the mixture's {budget} whose new is at most {CLOSE:g} point below its:"
    ]
    for title in titles_of(seeds):
        there = with_model(seeds, title)
        is_dense = of(seeds, title, "active_parameters")[0] == dense and title != BASE
        if not is_dense or of(seeds, title, budget).mean() > most:
            continue
        new, old = (of(there, title, axis) - of(there, MIXTURE, axis) for axis in AXES)
        if new.mean() >= -CLOSE:
            worse = f"{np.sum(old <= -APART)} of {len(there)} seeds keep {APART:g} points less"
            lines.append(f"    {title}: new {new.mean():+.1f}, old {old.mean():+.1f}; {worse}")
    return lines if len(lines) > 1 else [*lines, "    none"]


def _against_blends(seeds: list[Numbers]) -> list[str]:
    """(c): blends of the base with a dense model."""
    as_good, in_single, count = [], 0, 0
    for title in titles_of(seeds):
        there = [seed for seed in with_model(seeds, title) if "blends" in seed[title]]
        for share in there[0][title]["blends"] if there else ():
            points = np.array(
                [[seed[title]["blends"][share][a] - seed[MIXTURE][a] for a in AXES] for seed in there]
            )
            if (points.mean(axis=0) >= 0).all():
                as_good.append(f"    {share} of {title}")
            in_single, count = in_single + np.sum((points >= 0).all(axis=1)), count + len(there)
    told = "As good on both axes on average:" if as_good else "No blend is as good on both axes on average"
    return [f"(c) {told}; in single seeds {in_single} of {count} are.", *as_good]


if __name__ == "__main__":
    main()
