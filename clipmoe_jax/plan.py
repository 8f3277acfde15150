"""Prints what a run would take on any number of devices, and runs nothing (docs/scaling.md).

    python -m clipmoe_jax.plan --config=configs/vit_l14_sharegpt4v.py --accelerator=h100 --devices=8 \\
        --pairs=1246000

Any field of the config can be changed on the same line, as for `clipmoe_jax.main`.
"""

import functools
import os
from collections.abc import Callable

from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.core import accelerators, cli
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.data import sources
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu.recipes import check_baselines
from clipmoe_jax.dmu.training import take_architecture
from clipmoe_jax.planning.plan import make_plan
from clipmoe_jax.reporting.plan_tables import format_plan


def plan(
    config: ConfigDict, accelerator: str, num_devices: int, num_pairs: int = 0, mfu: float | None = None
) -> str:
    """Returns the tables of a config's plan, one after the other if it has variants.

    accelerator: a name of ACCELERATORS. num_pairs: of the training set; 0 counts the config's. mfu: the share
    of the peak to expect; None is what was measured or predicted, or is assumed. Raises ValueError for a run
    that would be refused, with what that would say.
    """
    errors, tables = Errors(), {}
    count = functools.cache(_count)  # variants have most of their data in common
    with errors.of():
        config_checks.validate(config, paths=False)
    for name, variant in configs.variant_configs(config, errors).items():
        checks = Errors()
        with checks.of():
            config_checks.validate(variant, paths=False)
        with checks.of():
            check_baselines(variant)
        with errors.of(configs.label(name)):
            checks.raise_all()
            checkpoint = os.path.expanduser(variant.base.checkpoint)
            if checkpoint and epath.Path(checkpoint).exists():  # a plan can do without
                take_architecture(variant)
            pairs = (num_pairs, 0) if num_pairs else count_pairs(variant, count)
            tables[name] = format_plan(make_plan(variant, accelerator, num_devices, *pairs, mfu=mfu))
    errors.raise_all()
    return "\n".join(f"{name}:\n{table}\n" if name else table for name, table in tables.items())


def count_pairs(config: ConfigDict, count: Callable[[str, str], int]) -> tuple[int, int]:
    """Returns how many training pairs a config names, and how many to train a base on, 0 if none.

    count: from a data set or source, and its split, to the number of pairs. Raises ValueError if the config
    names no training pairs.
    """
    if not config.data.train:
        raise ValueError("how many pairs? Set --pairs, or config.data.train to a data set or a source")
    trains_base = config.data.base and not config.base.checkpoint
    num_base_pairs = count(config.data.base, "") if trains_base else 0
    return count(config.data.train, config.data.train_split), num_base_pairs


def _count(data: str, split: str) -> int:
    if not sources.is_source(data):
        return len(Records(data, split))
    if "[" in split:
        raise ValueError(f"how many pairs has data.train_split={split}? Set --pairs")
    return len(sources.open_source(data))


def main(argv: list[str]) -> str:
    """Returns the plan's text; the command prints it."""
    del argv
    logging.set_verbosity(logging.WARNING)  # of libraries: tfds tells every file it opens
    accelerators.take_none()
    given = flags.FLAGS
    return plan(given.config, given.accelerator, given.devices, given.pairs, given.mfu)


def _define_flags() -> None:
    cli.define_config_flag()
    flags.DEFINE_enum("accelerator", "h100", list(accelerators.ACCELERATORS), "Whose peak, memory and links.")
    flags.DEFINE_integer("devices", 1, "How many of them.", lower_bound=1)
    flags.DEFINE_integer("pairs", 0, "Training pairs; 0 counts config.data.train.", lower_bound=0)
    flags.DEFINE_float(
        "mfu",
        None,
        "Share of the peak to expect; what was measured or predicted, or 0.4, if not given.",
        lower_bound=0.01,
        upper_bound=1.0,
    )


if __name__ == "__main__":
    _define_flags()
    cli.run(main, renamed=configs.RENAMED)
