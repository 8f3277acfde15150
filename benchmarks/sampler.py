"""Times the sampler of multistage contrastive learning at the scale of Recap-DataComp-1B.

    python -m benchmarks.sampler --pairs=100000000

Draws pseudo-labels of three stages, sorts them once, then opens them in a new process as a run does: time,
memory, and batches of 800 pairs a second.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
from etils import epath

from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.samplers import ClusterSampler

CLUSTERS, BATCH = 729, 800


def draw_labels(path: pathlib.Path, count: int) -> None:
    """Writes labels (count,) int32 of clusters of very different sizes."""
    rng = np.random.default_rng(0)
    share = np.cumsum(rng.dirichlet(np.full(CLUSTERS, 0.5)))
    labels = np.lib.format.open_memmap(path, "w+", np.int32, (count,))
    for start in range(0, count, 1 << 22):
        part = labels[start : start + (1 << 22)]
        part[:] = np.minimum(np.searchsorted(share, rng.random(len(part))), CLUSTERS - 1)
    labels.flush()


def sort(folder: epath.Path) -> dict[str, float]:
    """Sorts the labels of a folder and writes the index there."""
    began = time.perf_counter()
    ClusterIndex.sort(map_array(folder / "labels.npy")).write(folder)
    return {"sort and write (s)": time.perf_counter() - began}


def use(folder: epath.Path) -> dict[str, float]:
    """Opens the index and draws batches."""
    began = time.perf_counter()
    sampler = ClusterSampler(ClusterIndex.open(folder), BATCH, seed=0)
    sampler.indices(0)
    numbers = {"open and first batch (s)": time.perf_counter() - began}
    began = time.perf_counter()
    for step in range(500):
        sampler.indices(step)
    numbers[f"batches of {BATCH} a second"] = 500 / (time.perf_counter() - began)
    labels = map_array(folder / "labels.npy")
    for step in np.random.default_rng(0).integers(0, sampler.num_steps, 100).tolist():
        assert len(set(labels[sampler.indices(step)].tolist())) == 1 or "level(s) up" in sampler.origin(step)
    return numbers


def main() -> None:
    """Runs both steps in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument(
        "--folder", help="where the files go, some 8 bytes a pair; a temporary one if not given"
    )
    parser.add_argument("--step", choices=("sort", "use"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        numbers = {"sort": sort, "use": use}[args.step](epath.Path(args.folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(numbers | {"peak resident memory, mapped files included (GiB)": peak}))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        draw_labels(pathlib.Path(folder) / "labels.npy", args.pairs)
        print(f"{args.pairs:,} pairs in {CLUSTERS} clusters")
        for step in ("sort", "use"):
            command = [sys.executable, "-m", "benchmarks.sampler", f"--step={step}", f"--folder={folder}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for name, value in json.loads(output).items():
                print(f"  {step}: {name:55} {value:10.2f}")


if __name__ == "__main__":
    main()
