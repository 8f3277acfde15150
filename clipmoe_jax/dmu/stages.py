"""The stages of diversified multiplet upcycling, artifacts in and artifacts out (arXiv 2409.19291).

    base              the dense CLIP, text positions stretched
    embed_s           stage_s/features: what the model of stage s - 1 makes of every pair
    cluster_s         stage_s/clusters: accumulated pseudo-labels
    mcl_s             stage_s/params: feed-forward layers fine-tuned on single-cluster batches
    upcycle           moe/upcycled: the base's and the stages' feed-forward layers as experts, routers random
    router            moe/params: routers fine-tuned

Each is skipped if it is there, and refuses to mix with another config's.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, distributed, sharding, trees
from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.data import samplers
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.data.npy import load_array, map_array
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.sources.digit_scenes import DigitScenes
from clipmoe_jax.dmu.clustering import accumulate_labels, fit_centres, nearest_centre
from clipmoe_jax.dmu.recipes import TRAIN_EVERYTHING, TRAIN_FFN, TRAIN_ROUTERS
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.dmu.upcycling import reinitialize_experts, stack_experts
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import check_params
from clipmoe_jax.models.flops import count_active_parameters
from clipmoe_jax.models.model_folder import save_model

# Features are written in parts of so many rows; a killed pass goes on with the next part.
PART_ROWS = 65536

BASE_FIELDS = ("base.", "compute.dtype", "data.digit_scenes", "data.max_caption_tokens")
FIRST_STAGE_FIELDS = (*BASE_FIELDS, "data.train")
STAGE_FIELDS = (*FIRST_STAGE_FIELDS, "cluster.", "mcl.", "loss.", "compute.frozen_dtype")
STAGE_COUNT = ("mcl.num_stages",)  # a further stage changes nothing in those before it
# What makes no difference to what is trained on ordinary batches, from the base.
STAGES_ALONE = ("mcl.init_from", "mcl.small_clusters", "cluster.num_clusters", "cluster.max_fit_pairs")
MOE_FIELDS = (*STAGE_FIELDS, "moe.num_selected_experts", "moe.num_moe_layers", "moe.router_stddev")
ROUTER_FIELDS = (*STAGE_FIELDS, "moe.", "router.")


def stage_path(run: Run, stage: int) -> epath.Path:
    """Model folder of a stage; stage 0 is the base."""
    return run.workdir / f"stage_{stage}" / "params" if stage else run.workdir / "base"


def stage_name(stage: int) -> str:
    """The pipeline's name of what makes `stage_path(run, stage)`."""
    return f"mcl_{stage}" if stage else "base"


def model_fields(run: Run, stage: int) -> dict:
    """What the model of a stage, and what is made of it and the training pairs alone, depends on."""
    if stage == 0:
        return run.fields(*FIRST_STAGE_FIELDS)
    # The first stage starts from the base either way.
    return run.fields(*STAGE_FIELDS, without=(*STAGE_COUNT, *(["mcl.init_from"] if stage == 1 else [])))


def make_scenes(run: Run) -> None:
    """data/: digit scenes, prepared as a user's data would be, and attributes.json of those for test."""

    def build(folder: epath.Path) -> dict:
        if not distributed.is_main():
            return {}
        count = run.config.data.digit_scenes
        run.metrics.say(f"data: drawing {count} training scenes and an eighth for test")
        test = DigitScenes("test", pairs=count // 8, seed=run.seed)
        measured = {}
        for name, scenes in (
            ("base", DigitScenes("train", pairs=count, captions="coarse", seed=run.seed)),
            ("train", DigitScenes("train", pairs=count, seed=run.seed)),
            ("test", test),
        ):
            if (folder / name).exists():
                (folder / name).rmtree()
            measured[name] = prepare(scenes, str(folder / name))
        artifacts.write_json(folder / "attributes.json", [pair.attributes for pair in test])
        return measured

    run.make(run.workdir / "data", run.fields("data.digit_scenes") | {"version": 3}, build)


def make_base(run: Run) -> None:
    """base/: the checkpoint that the config names, or a CLIP trained from scratch on data/base."""
    config = configs.architecture(run.config)

    def build(folder: epath.Path) -> dict:
        if run.config.base.checkpoint:
            params, measured = _import_base(run)
            save_model(folder, config, params)
            return measured
        model = run.model(config)
        images = jnp.zeros((1, config.vision.image_size, config.vision.image_size, 3))
        tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
        with ThreadPoolExecutor(1) as thread:
            pairs = thread.submit(run.pairs, "base", short_captions=False)  # while initialisation compiles
            params = sharding.init_params(
                run.mesh, lambda key: model.init(key, images, tokens)["params"], jax.random.key(run.seed)
            )
            pairs.result()  # raises what is wrong with them
        section = run.config.base.train
        sampler = samplers.ShuffledSampler(len(run.records("base")), section.batch_size, run.seed)
        return run.train(
            "base",
            model,
            params,
            folder,
            rules=TRAIN_EVERYTHING,
            sampler=sampler,
            section=section,
            data="base",
        )

    run.make(run.workdir / "base", run.fields(*BASE_FIELDS), build)


def _import_base(run: Run) -> tuple[dict, dict]:
    config, checkpoint = configs.architecture(run.config), run.config.base.checkpoint
    found = read_model(
        checkpoint,
        activation=config.activation,
        context_length=config.text.context_length,
        image_size=config.vision.image_size,
        place=functools.partial(sharding.put_param, run.mesh),
    )
    if found.config.moe or found.config.text is None:
        raise ValueError(
            f"base.checkpoint={checkpoint} is a {found.source}; the base must be a dense CLIP of both towers"
        )
    shapes = {name: leaf.shape for name, leaf in trees.flatten(found.params).items()}
    check_params(config, shapes, f"base.checkpoint={checkpoint} ({found.source})")
    if found.config != config:  # same shapes, another meaning: activation, head width, eps
        has, wants = (trees.flatten(c.to_dict()) for c in (found.config, config))
        name = next(name for name in has if has[name] != wants[name])
        raise ValueError(
            f"base.checkpoint={checkpoint} has {name}={has[name]!r} and base.architecture says "
            f"{wants[name]!r}"
        )
    params = found.params
    if run.config.base.logit_scale:
        logit_scale = np.asarray(math.log(run.config.base.logit_scale), np.float32)
        params["logit_scale"] = sharding.put_replicated(run.mesh, logit_scale)
    run.metrics.say(f"base: {checkpoint}: {found.source}")
    return params, {"source": found.source}


def embed(run: Run, stage: int) -> None:
    """stage_s/features: image-*.npy and text-*.npy, (rows, embed) float16 unit vectors in record order."""
    source = artifacts.require(stage_path(run, stage - 1), stage_name(stage - 1))

    def build(folder: epath.Path) -> dict:
        config, params = run.load(source)
        encoder = Encoder(run.model(config), params, run.mesh, run.config.embed.batch_size)
        num_pairs = len(run.pairs("train"))
        starts = range(0, num_pairs, PART_ROWS)  # whatever the batch size is when a killed pass goes on
        with run.metrics.progress(f"embed_{stage}", 0, num_pairs, unit="pair") as progress:
            for part, start in enumerate(starts):
                stop = min(start + PART_ROWS, num_pairs)
                text_file = folder / f"text-{part:05d}.npy"  # written last
                if not distributed.agree(text_file.exists()):
                    features = run.encode("train", encoder, start, stop)
                    save_array(folder / f"image-{part:05d}.npy", features["image"].astype(np.float16))
                    save_array(text_file, features["text"].astype(np.float16))
                progress.update(stop - progress.n)
                if distributed.preempted():
                    raise distributed.Preempted(f"embed_{stage}, {stop} pairs")
        return {"num_pairs": num_pairs, "num_parts": len(starts)}

    run.make(run.workdir / f"stage_{stage}" / "features", model_fields(run, stage - 1), build)


def cluster(run: Run, stage: int) -> None:
    """stage_s/clusters: pseudo_labels.npy (N,) int32 (int64 if there are that many), and the records of each
    cluster as a ClusterIndex. Neither features nor labels of all pairs are in memory at once."""
    folder = run.workdir / f"stage_{stage}"
    features = artifacts.require(folder / "features", f"embed_{stage}")
    before = run.workdir / f"stage_{stage - 1}" / "clusters"
    if stage > 1:
        artifacts.require(before, f"cluster_{stage - 1}")
    num_clusters, kinds = run.config.cluster.num_clusters, ("image", "text")

    def build(out: epath.Path) -> dict:
        sizes = [_label(run, features, kind, out) for kind in kinds][0]
        if distributed.is_main():
            previous = map_array(before / "pseudo_labels.npy") if stage > 1 else np.zeros(sum(sizes), np.int8)
            dtype = np.int32 if num_clusters ** (2 * stage) <= 2**31 else np.int64
            with (out / "pseudo_labels.npy").open("wb") as file:
                header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (sum(sizes),)}
                np.lib.format.write_array_header_1_0(file, header)
                start = 0
                for i, size in enumerate(sizes):
                    labels = [load_array(_labels_file(out, kind, i)) for kind in kinds]
                    labels = accumulate_labels(previous[start : start + size], *labels, num_clusters)
                    file.write(labels.astype(dtype).tobytes())
                    start += size
            clusters = ClusterIndex.sort(map_array(out / "pseudo_labels.npy"))
            clusters.write(out)
        distributed.barrier("clusters are sorted")
        for kind in kinds:
            for i in range(jax.process_index(), len(sizes), jax.process_count()):
                _labels_file(out, kind, i).unlink()
        if not distributed.is_main():
            return {}
        sizes = clusters.sizes
        run.metrics.say(
            f"cluster_{stage}: {len(sizes)} clusters of {sizes.min()} to {sizes.max()} pairs, "
            f"median {np.median(sizes):.0f}"
        )
        return {
            "num_clusters": len(sizes),
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": int(sizes.max()),
        }

    run.make(folder / "clusters", model_fields(run, stage - 1) | run.fields("cluster."), build)


def _label(run: Run, features: epath.Path, kind: str, out: epath.Path) -> list[int]:
    """Writes the k-means labels of one modality, a file for each part of the features; returns the parts'
    sizes. Process 0 finds the centres; all of them label parts, each its own."""
    settings = run.config.cluster
    parts = [map_array(part) for part in sorted(features.glob(f"{kind}-*.npy"))]
    shape = (settings.num_clusters, parts[0].shape[1])
    centres = np.zeros(shape, np.float32)
    if distributed.is_main():
        centres = fit_centres(parts, settings.num_clusters, seed=run.seed, max_fit=settings.max_fit_pairs)
    centres = distributed.broadcast(centres)
    for i in range(jax.process_index(), len(parts), jax.process_count()):
        with _labels_file(out, kind, i).open("wb") as file:
            np.save(file, nearest_centre(parts[i], centres))
    distributed.barrier(f"labels of {kind}s")
    return [len(part) for part in parts]


def _labels_file(folder: epath.Path, kind: str, part: int) -> epath.Path:
    return folder / f"{kind}-{part:05d}.npy"


def mcl(run: Run, stage: int) -> None:
    """stage_s/params: the feed-forward layers trained on batches that each come from one cluster."""
    section = run.config.mcl
    first = stage - 1 if section.init_from == "previous" else 0
    start = artifacts.require(stage_path(run, first), stage_name(first))
    clusters = artifacts.require(run.workdir / f"stage_{stage}" / "clusters", f"cluster_{stage}")

    def build(folder: epath.Path) -> dict:
        sampler = samplers.ClusterSampler(
            ClusterIndex.open(clusters),
            section.batch_size,
            run.seed,
            labels_per_stage=run.config.cluster.num_clusters**2,
            small_clusters=section.small_clusters,
        )
        report = sampler.report()
        run.metrics.say(f"mcl_{stage}: {_describe(report)}")
        config, params = run.load(start)
        measured = run.train(
            f"mcl_{stage}",
            run.model(config),
            params,
            folder,
            rules=TRAIN_FFN,
            sampler=sampler,
            section=section,
        )
        return measured | report

    run.make(stage_path(run, stage), model_fields(run, stage), build)


def _describe(report: dict[str, int]) -> str:
    """A sampler's report in words."""
    own = report.get("pairs_level_0", 0)
    used = sum(count for name, count in report.items() if name.startswith("pairs_level_"))
    return (
        f"an epoch takes {own} pairs from {report['num_clusters']} clusters and {used - own} from their "
        f"parents; {report['pairs_unused']} stay out"
    )


def upcycle(run: Run) -> None:
    """moe/upcycled: the base's and every stage's feed-forward layers as experts, routers random."""
    paths = []
    for stage in range(run.config.mcl.num_stages + 1):
        paths.append(artifacts.require(stage_path(run, stage), stage_name(stage)))
    stack_models(run, run.workdir / "moe" / "upcycled", paths, run.fields(*MOE_FIELDS))


def stack_models(
    run: Run, out: epath.Path, paths: list[epath.Path], fields: dict, *, reinitialize: bool = False
) -> None:
    """Writes the MoE whose experts are the models of some folders, with random routers. reinitialize: with
    half of each expert's hidden units drawn anew (`reinitialize_experts`)."""

    def build(folder: epath.Path) -> dict:
        loaded = {path: run.load(path) for path in dict.fromkeys(paths)}
        dense, experts = loaded[paths[0]][0], [loaded[path][1] for path in paths]
        moe = dataclasses.replace(
            configs.moe_config(run.config),
            num_experts=len(paths),
            num_selected_experts=min(len(paths), run.config.moe.num_selected_experts),
        )
        key = jax.random.fold_in(jax.random.key(run.seed), len(paths))
        place = functools.partial(sharding.param_shardings, run.mesh)
        params = stack_experts(
            experts,
            key,
            num_moe_layers=moe.num_moe_layers,
            router_stddev=run.config.moe.router_stddev,
            place=place,
        )
        if reinitialize:
            params = reinitialize_experts(params, jax.random.fold_in(key, 1), place=place)
        config = dataclasses.replace(dense, moe=moe)
        save_model(folder, config, params)
        return {
            "parameters": trees.count_parameters(params),
            "active_parameters": count_active_parameters(params, config),
        }

    run.make(out, fields, build)


def router(run: Run) -> None:
    """moe/params: the routers trained on ordinary shuffled batches, with the load-balance loss."""
    upcycled = artifacts.require(run.workdir / "moe" / "upcycled", "upcycle")
    out = run.workdir / "moe" / "params"
    train_moe(run, "router", upcycled, out, run.config.router, TRAIN_ROUTERS)


def train_moe(
    run: Run,
    name: str,
    upcycled: epath.Path,
    out: epath.Path,
    section: ConfigDict,
    rules: trees.Rules,
    *,
    without: tuple[str, ...] = (),
    other_losses: Mapping[str, float] | None = None,
) -> None:
    """Training of what the rules say of an upcycled model, on shuffled batches, with the load balance.
    without: fields that it does not depend on. other_losses: as of `Run.train`."""

    def build(folder: epath.Path) -> dict:
        config, params = run.load(upcycled)
        sampler = samplers.ShuffledSampler(len(run.pairs("train")), section.batch_size, run.seed)
        return run.train(
            name,
            run.model(config, training_routers=True),
            params,
            folder,
            rules=rules,
            sampler=sampler,
            section=section,
            balance=True,
            other_losses=other_losses,
        )

    run.make(out, run.fields(*ROUTER_FIELDS, without=without), build)


def save_array(path: epath.Path, array: np.ndarray) -> None:
    """Whole or not at all; process 0 does."""
    if not distributed.is_main():
        return
    with written_whole(path) as where, where.open("wb") as file:
        np.save(file, array)
