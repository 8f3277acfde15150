"""The whole of diversified multiplet upcycling from a config.

    python -m clipmoe_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m clipmoe_jax.main --config=configs/vit_l14_sharegpt4v.py --workdir=runs/l14 \\
        --config.base.checkpoint=ViT-L-14.pt --config.data.train=data/sharegpt4v

A config with `variants` is a sweep: each variant is run in WORKDIR/VARIANT, and one table compares them
(configs/sweep.py). What is done is not done again; a run that was killed goes on. `--stage` runs one stage
alone: data, base, embed_1, cluster_1, mcl_1, …, upcycle, router, baselines, evaluate. What a run will take
is told by `python -m clipmoe_jax.plan`.
"""

import contextlib
import time
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict, config_flags

from clipmoe_jax import config as configs
from clipmoe_jax.core import artifacts, cli, distributed, sharding
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu import stages
from clipmoe_jax.dmu.baselines import make_baselines
from clipmoe_jax.dmu.recipes import CLIP_MOE
from clipmoe_jax.dmu.results import evaluate, evaluate_stage, is_wanted
from clipmoe_jax.dmu.run import Run
from clipmoe_jax.evaluation.evaluations import parse_evaluation
from clipmoe_jax.planning.trainings import check_mesh, trainings
from clipmoe_jax.report import write_report
from clipmoe_jax.reporting.text_tables import format_results, format_table


def stages_of(config: ConfigDict) -> dict[str, Callable[[Run], object]]:
    """{name: function} of a config's stages, in order."""
    table: dict[str, Callable[[Run], object]] = {}
    if config.data.digit_scenes:
        table["data"] = stages.make_scenes
    table["base"] = stages.make_base
    for s in range(1, config.mcl.num_stages + 1):
        table[f"embed_{s}"] = lambda run, s=s: stages.embed(run, s)
        table[f"cluster_{s}"] = lambda run, s=s: stages.cluster(run, s)
        table[f"mcl_{s}"] = lambda run, s=s: stages.mcl(run, s)
    table["upcycle"] = stages.upcycle
    table["router"] = stages.router
    if config.baselines:
        table["baselines"] = make_baselines
    if is_wanted(config):
        table["evaluate"] = evaluate
    return table


def run_pipeline(config: ConfigDict, workdir: epath.Path, only: str = "") -> list[dict]:
    """Runs every stage (or one) for every seed, of every variant if there are some; returns the results of
    each, empty if not evaluated."""
    return [found for results in run_variants(config, workdir, only).values() for found in results]


def run_variants(config: ConfigDict, workdir: epath.Path, only: str = "") -> dict[str, list[dict]]:
    """{variant: results of each seed}, as `run_pipeline`; a config without variants is one named "", in
    WORKDIR itself. What several variants have in common is made once and copied."""
    configs.validate(config)
    variants = configs.variant_configs(config)
    for name, variant in variants.items():
        try:
            check_run(variant, only)
        except (ValueError, FileNotFoundError) as error:
            if not name:
                raise
            raise ValueError(f"variants.{name}: {error}") from error
    return {
        name: _run_seeds(
            variant, workdir / name, only, [workdir / other for other in variants if other != name]
        )
        for name, variant in variants.items()
    }


def _run_seeds(
    config: ConfigDict, workdir: epath.Path, only: str, siblings: Sequence[epath.Path]
) -> list[dict]:
    """The results of each seed. siblings: the folders of other variants."""
    table = stages_of(config)
    mesh = sharding.make_mesh(**config.mesh)
    results = []
    for seed in config.seeds:
        part = f"seed_{seed}" if len(config.seeds) > 1 else ""
        folder = workdir / part
        found = None
        with contextlib.closing(Metrics(folder)) as metrics:
            run = Run(config, seed, folder, mesh, metrics, [sibling / part for sibling in siblings])
            for name, function in table.items():
                if only in ("", name):
                    found = function(run)
                    if is_wanted(config):
                        evaluate_stage(run, name)
                    if distributed.preempted():
                        raise distributed.Preempted(f"after stage {name}")
        if not only or not (folder / "config.json").exists():  # every stage has agreed with this config
            artifacts.write_json(folder / "config.json", {"seed": seed, **config.to_dict()})
        if found and "evaluate" in table:
            results.append(found)
    return results


def check_run(config: ConfigDict, only: str = "") -> None:
    """Raises for what would fail later, before any device time is spent: fields, stage, data, batch sizes,
    schedules, mesh."""
    configs.validate(config)
    table = stages_of(config)
    if only and only not in table:
        raise ValueError(f"--stage={only} is not a stage of this config: choose one of {', '.join(table)}")
    configs.compute_config(config, sharding.platform())
    mesh = sharding.make_mesh(**config.mesh)
    num_pairs = config.data.digit_scenes
    if not num_pairs:
        train = Records(config.data.train, config.data.train_split)
        num_pairs = len(train)
        if config.data.packing_steps and not config.data.in_memory:
            _ = train.token_counts  # is not there in data sets of an earlier version
        if config.data.test:
            Records(config.data.test, config.data.test_split)
    for line in config.evaluations:
        _ = parse_evaluation(line).data
    if config.base.checkpoint and not epath.Path(config.base.checkpoint).exists():
        raise FileNotFoundError(
            f"base.checkpoint={config.base.checkpoint} does not exist: give a .pt file, a folder of "
            "transformers' CLIPModel or a model folder of a run"
        )
    sections = {"mcl": config.mcl, "router": config.router}
    if not config.base.checkpoint:
        sections["base.train"] = config.base.train
    for name, section in sections.items():
        phase = configs.phase_config(section)
        if num_pairs < phase.batch_size:
            raise ValueError(
                f"{name}.batch_size={phase.batch_size} is more than the {num_pairs} training pairs: "
                "choose a smaller batch or more data"
            )
        try:
            phase.length(num_pairs // phase.batch_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for training in trainings(config, sharding.platform(), num_pairs):
        if only in ("", training.stage):
            check_mesh(mesh, training)


def write_results(results: Sequence[dict], workdir: epath.Path) -> str:
    """The tables of one config's models. They also lie in table.txt (in eval/ for one seed) and on a page,
    report.html. results: of each seed."""
    tables, folder = format_results(results), workdir if len(results) > 1 else workdir / "eval"
    (folder / "table.txt").write_text(tables + "\n")
    write_report(workdir)
    return tables


def format_variants(variants: dict[str, list[dict]]) -> str:
    """A row for the CLIP-MoE of each variant: mean and standard deviation over its seeds."""
    seeds = zip(*variants.values(), strict=True)
    return format_table([dict(zip(variants, [r[CLIP_MOE] for r in of_one], strict=True)) for of_one in seeds])


def main(argv: list[str]) -> None:
    """Runs the config and shows what came out."""
    del argv
    logging.set_verbosity(logging.WARNING)  # of libraries: tfds and orbax tell every file they open
    config, workdir = flags.FLAGS.config, epath.Path(flags.FLAGS.workdir)
    distributed.initialize(flags.FLAGS.distributed)
    distributed.keep_compiled_programs()
    began = time.perf_counter()
    variants = run_variants(config, workdir, flags.FLAGS.stage)
    if not all(variants.values()) or not distributed.is_main():
        return
    for name, results in variants.items():
        table = write_results(results, workdir / name)
    if config.variants:
        table = format_variants(variants)
        (workdir / "variants.txt").write_text(table + "\n")
    where = "VARIANT/report.html" if config.variants else "report.html"
    print(f"\n{table}\n\n{workdir / where}: all of it on one page. ", end="")
    print(
        f"{time.perf_counter() - began:.0f} s on {jax.device_count()} device(s)"
        f"{f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''}."
    )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with its arguments after a colon.")
    flags.DEFINE_string("workdir", None, "Where everything the run makes goes.")
    flags.DEFINE_string("stage", "", "One stage alone; all of them if empty.")
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "off"], "Whether to join other processes that the environment shows."
    )
    flags.DEFINE_bool("plan", False, "Has become python -m clipmoe_jax.plan.")
    flags.mark_flags_as_required(["config", "workdir"])
    flags.register_validator(  # the last one, whose line is shown
        "plan",
        lambda given: not given,
        "plans are made by python -m clipmoe_jax.plan --config=… --accelerator=… --devices=… --pairs=…",
    )
    cli.run(main)
