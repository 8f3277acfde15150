"""The stages of diversified multiplet upcycling, artifacts in and artifacts out (arXiv 2409.19291).

    base              base/: the CLIP that the run starts from, text positions stretched
    rehearsal         rehearsal/features: data.rehearsal as the base encodes it
    embed_s           stage_s/features: every pair as the model of stage s - 1 encodes it
    cluster_s         stage_s/clusters: accumulated pseudo-labels
    mcl_s             stage_s/params: feed-forward layers fine-tuned on single-cluster batches
    consolidation     dense/params: the last stage trained on with ordinary batches
    upcycle           moe/upcycled: feed-forward layers of base and stages as experts, routers random;
                      or a base that is an MoE with further experts
    router            moe/params: routers fine-tuned, or their new columns
    baselines         baselines/NAME: models to compare with

A stage whose artifact is there is skipped; one whose artifact another config made is refused.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from clipmoe_jax.core import artifacts, checksums, distributed
from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.core.terminal import duration
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import array_shape, load_array, load_arrays, map_array, save_array
from clipmoe_jax.dmu import recipes
from clipmoe_jax.dmu.clustering import accumulate_labels, fit_centres, nearest_centre
from clipmoe_jax.dmu.recipe import BASE_NAME, BASELINES_STAGE, REHEARSAL_FOLDER, REHEARSAL_STAGE, Recipe
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.training import (
    inputs_of,
    inputs_of_encoding,
    make_baselines,
    make_model,
    rehearsal_datasets,
    upcycle,
)
from clipmoe_jax.evaluation.encoder import Encoder

# Features are written in parts of so many rows; a killed pass goes on with the next part.
PART_ROWS = 65536
MODALITIES = ("image", "text")
# Beside the parts: those batches of one that were done when a signal came.
BEGUN = "begun.npz"


def stages_of(config: ConfigDict) -> dict[str, Callable[[Run], None]]:
    """Returns {name: function} of the stages that make a config's models, in order."""
    stages: dict[str, Callable[[Run], None]] = {}
    for recipe in recipes.recipes(config).values():
        if recipe.is_baseline or recipe.group == "ensemble":
            continue
        if recipe.sampler == "clusters":
            number = recipe.number
            stages[f"embed_{number}"] = lambda run, number=number: embed(run, number)
            stages[f"cluster_{number}"] = lambda run, number=number: cluster(run, number)
        if recipe.is_moe(config):
            stages["upcycle"] = lambda run, recipe=recipe: upcycle(run, recipe)
        stages[recipe.name] = lambda run, recipe=recipe: make_model(run, recipe)
        if recipe.group == "base" and recipes.imitates_base(config):
            stages[REHEARSAL_STAGE] = encode_rehearsal
    if config.baselines:
        stages[BASELINES_STAGE] = make_baselines
    return stages


def embed(run: Run, stage: int) -> None:
    """Writes stage_s/features: image-*.npy, text-*.npy, (rows, embed) float16 unit vectors, in order."""
    before = _model_before(run, stage)
    source = artifacts.require(run.workdir / before.folder, before.stage)
    name = f"embed_{stage}"

    def build(folder: epath.Path) -> dict:
        encoder = run.encoder(source)
        num_pairs = len(run.records("train"))
        starts = range(0, num_pairs, PART_ROWS)  # whatever the batch size is when a killed pass goes on
        with run.metrics.progress(name, 0, num_pairs, unit="pair") as progress:
            for part, start in enumerate(starts):
                stop = min(start + PART_ROWS, num_pairs)
                text_file = folder / f"text-{part:05d}.npy"  # written last
                if not distributed.agree(text_file.exists()):
                    features = _encode(run, encoder, folder / BEGUN, start, stop, name, progress)
                    save_array(folder / f"image-{part:05d}.npy", features["image"])
                    save_array(text_file, features["text"])
                progress.update(stop - progress.n)
                if distributed.preempted():
                    raise distributed.Preempted(f"{name}, {stop} pairs")
        if distributed.is_main():
            (folder / BEGUN).unlink(missing_ok=True)
        return {"num_pairs": num_pairs, "num_parts": len(starts)}

    began = time.perf_counter()
    if run.make(run.workdir / f"stage_{stage}" / "features", inputs_of_features(run, stage), build):
        seconds = duration(time.perf_counter() - began)
        run.metrics.say(f"{name}: {len(run.records('train')):,} pairs encoded in {seconds}")


def _encode(
    run: Run, encoder: Encoder, begun: epath.Path, start: int, stop: int, name: str, progress: tqdm
) -> dict[str, np.ndarray]:
    """Returns {modality: (stop - start, embed) float16} of a part's pairs; right in process 0 alone.

    Goes on with the batches that `begun` holds of it. After SIGTERM or Ctrl-C those that are done go there,
    and it raises Preempted.
    """
    parts = {modality: [] for modality in MODALITIES}
    if distributed.is_main() and begun.exists():
        arrays = load_arrays(begun)
        if (arrays["start"], arrays["stop"]) == (start, stop):
            parts = {modality: [arrays[modality]] for modality in MODALITIES}
    done = int(distributed.broadcast(np.asarray(start + sum(map(len, parts["text"])))))
    workers, shards = run.config.data.num_workers, run.mesh.size
    with encoder.open(run.pairs("train"), done, stop, workers, shards) as batches:
        for features in encoder.stream(batches):
            for modality, rows in features.items():
                parts[modality].append(rows.astype(np.float16))
            done += len(features["text"])
            progress.update(done - progress.n)
            if done < stop and distributed.preempted():
                _save_begun(begun, _joined(parts), start, stop)
                raise distributed.Preempted(f"{name}, {done} pairs")
    return _joined(parts)


def _joined(parts: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
    return {modality: np.concatenate(arrays) for modality, arrays in parts.items()}


def _save_begun(path: epath.Path, features: Mapping[str, np.ndarray], start: int, stop: int) -> None:
    if distributed.is_main():
        with written_whole(path) as where, where.open("wb") as file:
            np.savez(file, start=start, stop=stop, image=features["image"], text=features["text"])


def encode_rehearsal(run: Run) -> None:
    """Writes rehearsal/features: image.npy and text.npy, (N, embed) float32 unit vectors of the base.

    The captions are those of the images, or N others.
    """
    base = recipes.recipes(run.config)[BASE_NAME]
    source = artifacts.require(run.workdir / base.folder, base.stage)

    def build(folder: epath.Path) -> dict:
        encoder = run.encoder(source)
        numbers = {}
        for modality, name in zip(MODALITIES, rehearsal_datasets(run), strict=True):
            pairs, workers = run.pairs(name), run.config.data.num_workers
            features = encoder.pairs(pairs, inputs=[modality], num_workers=workers)[modality]
            save_array(folder / f"{modality}.npy", features)
            numbers[f"num_{modality}s"] = len(features)
        return numbers

    run.make(run.workdir / REHEARSAL_FOLDER, inputs_of_rehearsal(run), build)


def inputs_of_rehearsal(run: Run) -> dict:
    """Returns what the base's features of the records to rehearse depend on."""
    return inputs_of(run, recipes.recipes(run.config)[BASE_NAME]) | run.fields("data.rehearsal")


def _model_before(run: Run, stage: int) -> Recipe:
    """The recipe of the model whose features a stage clusters."""
    return recipes.recipes(run.config)[f"mcl_{stage - 1}" if stage > 1 else BASE_NAME]


def cluster(run: Run, stage: int) -> None:
    """Writes stage_s/clusters: pseudo_labels.npy (N,) int32 (int64 for more labels), and a ClusterIndex.

    Neither features nor labels of all pairs are in memory at once.
    """
    folder = run.workdir / f"stage_{stage}"
    features = artifacts.require(folder / "features", f"embed_{stage}")
    before = run.workdir / f"stage_{stage - 1}" / "clusters"
    if stage > 1:
        artifacts.require(before, f"cluster_{stage - 1}")

    def build(out: epath.Path) -> dict:
        part_sizes: list[int] = []
        for modality in MODALITIES:
            part_sizes = _label(run, features, modality, out)
        clusters = None
        if distributed.is_main():
            _write_pseudo_labels(run, out, before, part_sizes, stage)
            clusters = ClusterIndex.sort(map_array(out / "pseudo_labels.npy"))
            clusters.write(out)
        distributed.barrier("clusters are sorted")
        for modality in MODALITIES:
            for part in range(jax.process_index(), len(part_sizes), jax.process_count()):
                _labels_file(out, modality, part).unlink()
        if clusters is None:
            return {}
        sizes = clusters.sizes
        run.metrics.say(
            f"cluster_{stage}: {len(sizes):,} clusters of {sizes.min():,} to {sizes.max():,} pairs, "
            f"median {np.median(sizes):,.0f}"
        )
        return {
            "num_clusters": len(sizes),
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": int(sizes.max()),
        }

    run.make(folder / "clusters", inputs_of_clusters(run, stage), build)


def inputs_of_features(run: Run, stage: int) -> dict:
    """Returns what the features that a stage clusters depend on."""
    return inputs_of_encoding(run, _model_before(run, stage))


def inputs_of_clusters(run: Run, stage: int) -> dict:
    """Returns what the clusters of a stage depend on."""
    return inputs_of_features(run, stage) | run.fields("cluster.")


def _label(run: Run, features: epath.Path, modality: str, out: epath.Path) -> list[int]:
    """Writes the k-means labels of one modality, a file for each part of the features.

    Returns the parts' sizes. Process 0 finds the centres; every process labels parts of its own.
    """
    settings = run.config.cluster
    files = sorted(features.glob(f"{modality}-*.npy"))
    try:
        shapes = [array_shape(file) for file in files]
        sizes, parts = [rows for rows, _ in shapes], _Parts(files)
        centres = np.zeros((settings.num_clusters, shapes[0][1]), np.float32)
        if distributed.is_main():
            most = settings.max_fit_pairs
            centres = fit_centres(parts, sizes, settings.num_clusters, seed=run.seed, max_fit=most)
    except ValueError:
        checksums.verify(features, *(file.name for file in files))  # names the file, if one is damaged
        raise
    distributed.barrier(f"centres of {modality}s")  # a collective would not wait as long
    centres = distributed.broadcast(centres)
    for part in range(jax.process_index(), len(parts), jax.process_count()):
        checksums.verify(features, files[part].name)  # here, where all of it is read
        with _labels_file(out, modality, part).open("wb") as file:
            np.save(file, nearest_centre(parts[part], centres))
    distributed.barrier(f"labels of {modality}s")
    return sizes


class _Parts(Sequence[np.ndarray]):
    """Arrays in files, each opened when it is asked for: all at once may be more than a process may open."""

    def __init__(self, files: Sequence[epath.Path]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, part: Any) -> Any:
        return map_array(self._files[part], verify=False)


def _write_pseudo_labels(
    run: Run, out: epath.Path, before: epath.Path, part_sizes: list[int], stage: int
) -> None:
    """Writes pseudo_labels.npy part by part: the stage before's labels and both modalities' accumulated."""
    num_clusters, num_pairs = run.config.cluster.num_clusters, sum(part_sizes)
    num_labels = num_clusters ** (2 * stage - 2)  # of the stage before
    previous = map_array(before / "pseudo_labels.npy") if stage > 1 else np.zeros(num_pairs, np.int8)
    dtype = np.dtype(np.int32 if num_clusters ** (2 * stage) <= 2**31 else np.int64)
    with (out / "pseudo_labels.npy").open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (num_pairs,)}
        np.lib.format.write_array_header_1_0(file, header)
        start = 0
        for part, size in enumerate(part_sizes):
            of_part = previous[start : start + size]
            if of_part.min() < 0 or of_part.max() >= num_labels:
                raise ValueError(
                    f"{before}/pseudo_labels.npy is damaged (a label is not from 0 to {num_labels - 1}): "
                    f"delete {before} and start the same command again"
                )
            image_labels, text_labels = (load_array(_labels_file(out, m, part)) for m in MODALITIES)
            labels = accumulate_labels(of_part, image_labels, text_labels, num_clusters)
            file.write(labels.astype(dtype).tobytes())
            start += size


def _labels_file(folder: epath.Path, modality: str, part: int) -> epath.Path:
    return folder / f"{modality}-{part:05d}.npy"
