"""Writes WORKDIR/report.html: a run on one page, made from its files alone, again at any time.

    python -m clipmoe_jax.report --workdir=runs/demo

The page is one file that loads nothing. A section whose files are not there yet says which command makes
them.
"""

from absl import flags, logging
from etils import epath

from clipmoe_jax.core import cli
from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.reporting.page import render


def write_report(workdir: epath.Path) -> epath.Path:
    """Writes report.html into a run's workdir and returns its path.

    Of a workdir with seeds (seed_N) one page for all. Raises FileNotFoundError if there is no run in it.
    """
    workdir = epath.Path(workdir)
    page = render(workdir)
    path = workdir / "report.html"
    with written_whole(path) as file:
        file.write_text(page)
    return path


def main(argv: list[str]) -> None:
    """The command."""
    del argv
    logging.set_verbosity(logging.WARNING)  # tfds tells every file it opens
    path = write_report(epath.Path(flags.FLAGS.workdir))
    print(f"{path}: {path.stat().length / 1e6:.1f} MB; open it in a browser.")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Where a run lies.")
    flags.mark_flag_as_required("workdir")
    cli.run(main)
