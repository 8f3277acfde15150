"""Makes a CLIP-MoE of a CLIP, from a config: base, stages, routers, baselines, evaluation, report.

    python -m clipmoe_jax.main --config=demo --workdir=runs/demo
    python -m clipmoe_jax.main --config=vit_l14_sharegpt4v --workdir=runs/l14 \\
        --config.base.checkpoint=ViT-L-14.pt --config.data.train=data/sharegpt4v

A config with `variants` is a sweep: each variant is a run in WORKDIR/VARIANT, and one table compares them
(--config=sweep). A finished stage is not run again, and a killed run resumes; SIGTERM saves and exits with
code 75, start the same command again to go on. `--stage` runs one stage alone, of those that the config has:
data, base, rehearsal, embed_1, cluster_1, mcl_1, …, consolidation, upcycle, router, baselines, evaluate.

`--profile=100:105` traces steps 100 to 105 of each phase: WORKDIR/profile/PHASE, for ui.perfetto.dev.
`python -m clipmoe_jax.plan` estimates beforehand what a run takes on any number of devices.
"""

import re
import time

import jax
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax.core import accelerators, cli, distributed
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.dmu.recipe import Results
from clipmoe_jax.dmu.runner import DATA_STAGE, run_variants
from clipmoe_jax.reporting.output import write_results


def main(argv: list[str]) -> str | None:
    """Runs the config. Returns its tables, or None where this process wrote none."""
    del argv
    logging.set_verbosity(logging.WARNING)  # of libraries: tfds and orbax tell every file they open
    if not flags.FLAGS.workdir:
        raise ValueError("--workdir is empty: name the folder that everything the run makes goes to")
    workdir = epath.Path(flags.FLAGS.workdir)
    if workdir.is_file():
        raise ValueError(f"--workdir={workdir} is a file: name the folder that everything goes to")
    if flags.FLAGS.stage == DATA_STAGE:
        accelerators.take_none()
    profiled = _parse_profile(flags.FLAGS.profile)
    distributed.initialize(flags.FLAGS.distributed, cli.say_aside)
    distributed.keep_compiled_programs()
    began = time.perf_counter()

    def show_first(results: Results) -> None:
        if distributed.is_main():
            write_results({"": [results]}, workdir)
            seconds = time.perf_counter() - began
            cli.say(f"{workdir}/report.html: a first report, after {seconds:.0f} s; baselines follow")

    variants = run_variants(flags.FLAGS.config, workdir, flags.FLAGS.stage, profiled, show_first)
    if not distributed.is_main() or flags.FLAGS.stage and not all(variants.values()):
        return None
    if lacking := [name for name, seeds in variants.items() if not seeds]:
        return _where_the_model_is(workdir / lacking[0], flags.FLAGS.config)
    shown = write_results(variants, workdir)
    place = "report.html" if list(variants) == [""] else "VARIANT/report.html"
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    seconds = time.perf_counter() - began
    return (
        f"\n{shown}\n\n{printable_line(workdir / place)}: all of it on one page. {seconds:.0f} s on "
        f"{jax.device_count()} device(s){processes}."
    )


def _where_the_model_is(folder: epath.Path, config: ConfigDict) -> str:
    """Returns the last line of a run that names nothing to evaluate on. folder: its variant's."""
    seed = f"seed_{config.seeds[0]}" if len(config.seeds) > 1 else ""
    model = printable_line(folder / seed / "moe" / "params")
    return (
        f"{model}: the CLIP-MoE. Nothing was evaluated: name a test set with --config.data.test=DATA, or run "
        f"python -m clipmoe_jax.evaluate --model={model} --data=DATA"
    )


def _parse_profile(text: str) -> range:
    """Returns the steps, from 0, that "100:105" names: the hundredth to the hundred and fifth."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = range(int(match[1]) - 1, int(match[2])) if match else range(0)
    if text and (not steps or steps.start < 0):
        raise ValueError(f"--profile={text} must be the first and the last step of a trace, such as 100:105")
    return steps


def _define_flags() -> None:
    cli.define_config_flag()
    flags.DEFINE_string("workdir", None, "Where everything the run makes goes.")
    flags.DEFINE_string("stage", "", "One stage alone; all of them if empty.")
    flags.DEFINE_string("profile", "", "Steps of each phase to trace, such as 100:105.")
    flags.DEFINE_enum(
        "distributed", "auto", ["auto", "off"], "Whether to join other processes that the environment shows."
    )
    flags.mark_flag_as_required("workdir")


_FLAGS_OF_PLAN = dict.fromkeys(
    ("plan", "plan_accelerator", "plan_devices", "plan_pairs", "plan_mfu", "plan_scaling"),
    "python -m clipmoe_jax.plan --config=… --accelerator=… --devices=… --pairs=…",
)

if __name__ == "__main__":
    _define_flags()
    cli.run(main, renamed=configs.RENAMED | _FLAGS_OF_PLAN)
