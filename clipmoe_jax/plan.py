"""Prints what a run would take on any number of devices, and runs nothing (docs/scaling.md).

    python -m clipmoe_jax.plan --config=configs/vit_l14_sharegpt4v.py --accelerator=h100 --devices=8 \\
        --pairs=1246000 --mfu=0.4

Any field of the config can be changed on the same line, as for `clipmoe_jax.main`.
"""

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from clipmoe_jax import config as configs
from clipmoe_jax.core import cli
from clipmoe_jax.core.accelerators import ACCELERATORS
from clipmoe_jax.data import sources
from clipmoe_jax.data.records import Records
from clipmoe_jax.planning.plan import make_plan
from clipmoe_jax.reporting.plan_tables import format_plan


def plan(config: ConfigDict, accelerator: str, num_devices: int, num_pairs: int = 0, mfu: float = 0.4) -> str:
    """Returns the tables of a config's plan, one after the other if it has variants.

    accelerator: a name of ACCELERATORS. num_pairs: of the training set; 0 counts the config's. mfu: the share
    of the peak to expect. Raises ValueError for a run that would be refused.
    """
    configs.validate(config, paths=False)
    num_pairs = num_pairs or count_pairs(config)
    tables = []
    for name, variant in configs.variant_configs(config).items():
        configs.validate(variant, paths=False)
        table = format_plan(make_plan(variant, accelerator, num_devices, mfu, num_pairs))
        tables.append(f"{name}:\n{table}\n" if name else table)
    return "\n".join(tables)


def count_pairs(config: ConfigDict) -> int:
    """Returns the number of training pairs that a config names. Raises ValueError if it names none."""
    train = config.data.train
    if not train:
        raise ValueError("how many pairs? Set --pairs, or config.data.train to a data set or a source")
    if sources.is_source(train):
        if "[" in config.data.train_split:
            raise ValueError(f"how many pairs has data.train_split={config.data.train_split}? Set --pairs")
        return len(sources.open_source(train))
    return len(Records(train, config.data.train_split))


def main(argv: list[str]) -> str:
    """Returns the plan's text; the command prints it."""
    del argv
    logging.set_verbosity(logging.WARNING)  # of libraries: tfds tells every file it opens
    given = flags.FLAGS
    return plan(given.config, given.accelerator, given.devices, given.pairs, given.mfu)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with its arguments after a colon.")
    flags.DEFINE_enum("accelerator", "h100", list(ACCELERATORS), "Whose peak, memory and links.")
    flags.DEFINE_integer("devices", 8, "How many of them.", lower_bound=1)
    flags.DEFINE_integer("pairs", 0, "Training pairs; 0 counts config.data.train.", lower_bound=0)
    flags.DEFINE_float("mfu", 0.4, "Share of the peak to expect.", lower_bound=0.01, upper_bound=1.0)
    flags.mark_flag_as_required("config")
    cli.run(main, renamed=configs.RENAMED)
