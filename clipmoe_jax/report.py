"""Writes WORKDIR/report.html: a run on one page, made from the run's files alone, at any time.

    python -m clipmoe_jax.report --workdir=runs/demo

The page is a single file that loads no others. A section whose files do not exist yet says which command
makes them.
"""

from absl import flags, logging
from etils import epath

from clipmoe_jax.core import accelerators, cli
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.reporting.output import write_report


def main(argv: list[str]) -> str:
    """Runs the command; returns its message."""
    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS logs every file it opens
    accelerators.take_none()
    path = write_report(epath.Path(flags.FLAGS.workdir), cli.say)
    return f"{printable_line(path)}: {path.stat().length / 1e6:.1f} MB; open it in a browser."


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "The folder of a run.")
    flags.mark_flag_as_required("workdir")


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
