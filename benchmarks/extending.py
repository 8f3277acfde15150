"""CLIP-MoEs that learned a third world, seed by seed: the table of docs/extend.md.

    python -m clipmoe_jax.main --config=configs/demo.py:seeds=51-51 --workdir=runs/51
    python -m clipmoe_jax.main --config=configs/demo.py:seeds=51-51,extend=runs/51 --workdir=runs/extended_51
    python -m benchmarks.extending runs/extended_51 runs/extended_52
    python -m benchmarks.extending

The third command copies the numbers of these workdirs to benchmarks/results/extending.json; the last prints
the table from that file alone. "new" is the mean of both R@1 on the test set, "scenes" that on the old test
set, "glyphs" the retention, all in per cent.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from benchmarks.keeping import BASE, CURRICULUM, MIXTURE, recall

RESULTS = pathlib.Path(__file__).parent / "results" / "extending.json"
TITLES = (BASE, CURRICULUM, MIXTURE)  # the old mixture, the new expert alone, the extended mixture
WORLDS = ("new", "scenes", "glyphs")

Seeds = dict[str, dict[str, dict[str, float]]]  # {workdir: {title of a model: {world: per cent}}}


def main() -> None:
    """Collects if workdirs are given, and prints the table."""
    seeds: Seeds = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for workdir in map(pathlib.Path, sys.argv[1:]):
        results = json.loads((workdir / "eval" / "results.json").read_text())
        seeds[workdir.name] = {title: worlds(results[title]) for title in TITLES}
    if sys.argv[1:]:
        RESULTS.write_text(json.dumps(dict(sorted(seeds.items())), indent=1) + "\n")
    print(table(seeds))


def worlds(numbers: dict[str, Any]) -> dict[str, float]:
    """Returns what a model knows of each world."""
    (scenes,) = (found for line, found in numbers["evaluations"].items() if line.startswith("retrieval:"))
    found = {"new": recall(numbers), "scenes": recall(scenes), "glyphs": numbers["retention"]}
    return {world: round(100 * share, 2) for world, share in found.items()}


def table(seeds: Seeds) -> str:
    """Returns means and standard deviations over seeds, and the most that a seed loses of each world."""

    def column(title: str, world: str) -> np.ndarray:
        return np.array([seed[title][world] for seed in seeds.values()])

    lines = [f"{'':24}" + "".join(f"{world:>16}" for world in WORLDS)]
    for title in TITLES:
        values = (column(title, world) for world in WORLDS)
        lines.append(f"{title:24}" + "".join(f"{of.mean():9.1f} ± {of.std(ddof=1):4.1f}" for of in values))
    before = {"new": CURRICULUM, "scenes": BASE, "glyphs": BASE}
    lost = [column(before[world], world) - column(MIXTURE, world) for world in WORLDS]
    for name, of in (("lost", np.mean), ("lost at most", np.max)):
        lines.append(f"{name:24}" + "".join(f"{of(values):16.2f}" for values in lost))
    return "\n".join([*lines, f"{len(seeds)} seeds"])


if __name__ == "__main__":
    main()
