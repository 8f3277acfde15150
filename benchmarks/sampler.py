"""Times the sampler of multistage contrastive learning at the scale of Recap-DataComp-1B.

    (ulimit -n 1024; ulimit -v 8388608; python -m benchmarks.sampler --pairs=100000000 --width=128)

Labels features of both modalities, one part of them on disk under the name of each, if there is a width. Then
draws pseudo-labels of three stages, sorts them once, and opens them in a new process as a run does: time,
memory, and batches of 800 pairs a second.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from etils import epath

from clipmoe_jax.core import checksums
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.samplers import ClusterSampler

CLUSTERS, BATCH, PART = 729, 800, 65536


def write_features(folder: epath.Path, count: int, width: int) -> None:
    """Writes features of unit length around three centres, in parts, which are one file by many names."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    values = rng.standard_normal((PART, width), np.float32)
    values += rng.standard_normal((3, width), np.float32)[rng.integers(0, 3, PART)]
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    np.save(folder / "image-00000.npy", values.astype(np.float16))
    (checksum,) = checksums.of_folder(folder).values()
    names = [f"{modality}-{k:05d}.npy" for modality in ("image", "text") for k in range(-(-count // PART))]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    checksums.write(folder, dict.fromkeys(names, checksum))


def label(folder: epath.Path) -> dict[str, float]:
    """Labels features as the stage cluster_1 does."""
    from clipmoe_jax.dmu import stages  # here because it imports JAX

    settings = SimpleNamespace(num_clusters=3, max_fit_pairs=200_000)
    run: Any = SimpleNamespace(config=SimpleNamespace(cluster=settings), seed=0)
    out, sizes, began = folder / "clusters", [], time.perf_counter()
    out.mkdir()
    for modality in stages.MODALITIES:
        sizes = stages._label(run, folder / "features", modality, out)
    numbers = {"centres and labels, both modalities (s)": time.perf_counter() - began}
    began = time.perf_counter()
    stages._write_pseudo_labels(run, out, out, sizes, 1)
    return numbers | {"pseudo-labels (s)": time.perf_counter() - began}


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
    parser.add_argument("--width", type=int, default=0, help="of features to label; none if not given")
    parser.add_argument("--step", choices=("label", "sort", "use"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        numbers = {"label": label, "sort": sort, "use": use}[args.step](epath.Path(args.folder))
        used = resource.getrusage(resource.RUSAGE_SELF)
        numbers["all, with imports (s of CPU)"] = used.ru_utime + used.ru_stime
        peak = used.ru_maxrss / 2**20
        print(json.dumps(numbers | {"peak resident memory, mapped files included (GiB)": peak}))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        draw_labels(pathlib.Path(folder) / "labels.npy", args.pairs)
        print(f"{args.pairs:,} pairs in {CLUSTERS} clusters")
        if args.width:
            write_features(epath.Path(folder) / "features", args.pairs, args.width)
        for step in ("label", "sort", "use")[0 if args.width else 1 :]:
            command = [sys.executable, "-m", "benchmarks.sampler", f"--step={step}", f"--folder={folder}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            for name, value in json.loads(output).items():
                print(f"  {step}: {name:55} {value:10.2f}")


if __name__ == "__main__":
    main()
