"""Writes what a run leaves for people: tables as text and the report."""

from collections.abc import Callable, Mapping, Sequence

from etils import epath

from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.dmu.recipe import Results
from clipmoe_jax.reporting.page import render
from clipmoe_jax.reporting.text_tables import format_results, format_variants


def write_results(variants: Mapping[str, Sequence[Results]], workdir: epath.Path) -> str:
    """Writes table.txt and report.html of each variant, and of several variants.txt.

    variants: {name: results of each seed}; "" is a config without variants. Returns the table to show.
    """
    table = ""
    for name, results in variants.items():
        folder = workdir / name
        table = format_results(results)
        ((folder if len(results) > 1 else folder / "eval") / "table.txt").write_text(table + "\n")
        write_report(folder)
    if list(variants) != [""]:
        table = format_variants(variants)
        (workdir / "variants.txt").write_text(table + "\n")
    return table


def write_report(workdir: epath.Path, say: Callable[[str], None] = lambda line: None) -> epath.Path:
    """Writes report.html into a run's workdir and returns its path.

    A workdir with several seeds (seed_N) gets one page for all. say: as of `render`. Raises FileNotFoundError
    if it holds no run.
    """
    workdir = epath.Path(workdir)
    page = render(workdir, say)
    path = workdir / "report.html"
    with written_whole(path) as file:
        file.write_text(page)
    return path
