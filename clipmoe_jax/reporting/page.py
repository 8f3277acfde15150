"""The report's page: all sections of a run in one HTML file that loads nothing."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from markupsafe import Markup

from clipmoe_jax.core.errors import naming_files
from clipmoe_jax.core.paths import check_plain_folder
from clipmoe_jax.core.terminal import printable, printable_line
from clipmoe_jax.reporting import expert_sections, sections
from clipmoe_jax.reporting.pictures import EXPERT_COLOURS
from clipmoe_jax.reporting.read import Folder, NotThereError, as_argument, seed_folders
from clipmoe_jax.reporting.training import training

Section = Callable[[Sequence[Folder]], dict[str, Any]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "results": ("Results", sections.results),
    "training": ("Training", training),
    "clusters": ("Clusters", sections.clusters),
    "routing": ("Where tokens go", expert_sections.routing),
    "heat_maps": ("Patches and words", expert_sections.heat_maps),
    "experts": ("How the experts differ", expert_sections.experts),
    "neighbours": ("Right and wrong", sections.neighbours),
    "cost": ("Cost", sections.cost),
    "config": ("Config", sections.config),
}


def render(workdir: epath.Path, say: Callable[[str], None] = lambda line: None) -> str:
    """Returns the page of a run, the same bytes from the same files.

    say: is told of data sets elsewhere before they are opened. Raises FileNotFoundError if there is no run,
    and ValueError if a file of it is damaged.
    """
    import jinja2  # slow to import

    check_plain_folder(workdir)
    folders = seed_folders(workdir)
    for path in folders[0].data_elsewhere():
        say(f"opens {path} for images and captions, as the run's config says")
    loader = jinja2.PackageLoader("clipmoe_jax.reporting", ".")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
    )
    style = loader.get_source(environment, "report.css")[0]
    environment.globals |= {
        "shown": _rendered,
        "again": f"python -m clipmoe_jax.report --workdir={as_argument(workdir)}",
        "percent": "{:.1f}\u202f%".format,  # a narrow space that no line breaks at
        "signed": lambda points: f"{points:+.1f}".replace("-", "−"),
    }
    return environment.get_template("report.html").render(
        name=printable_line(workdir.resolve().name),
        style=Markup(style),
        palette=[(e, colour, _ink_on(colour)) for e, colour in enumerate(EXPERT_COLOURS)],
        seeds=[folder.path.name for folder in folders],
        head=_made(sections.summary, folders),
        made=_made(sections.made, folders),
        sections=[
            {"id": name, "title": title, **_made(function, folders)}
            for name, (title, function) in SECTIONS.items()
        ],
    )


def _made(section: Section, folders: Sequence[Folder]) -> dict[str, Any]:
    """Returns {"content": of a section, "absent": the error instead of it, "files": that it has read}."""
    files: list[epath.Path] = []
    folders = [dataclasses.replace(folder, read=files) for folder in folders]
    try:
        with naming_files(files):
            return {"content": section(folders), "absent": None, "files": files}
    except NotThereError as error:
        return {"content": None, "absent": error, "files": files}


def _rendered(macro: Callable[[Any], Markup], section: Mapping[str, Any]) -> Markup:
    """Returns what a macro of the template makes of a section's content."""
    with naming_files(section["files"]):
        return macro(section["content"])


def _shown(value: Any) -> Any:
    """Returns what a placeholder of the template shows: no text in it turns that of the page around."""
    return type(value)(printable(value)) if isinstance(value, str) else value


def _ink_on(colour: str) -> str:
    """Returns black or white, whichever is easier to read on a colour (WCAG's relative luminance)."""
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"
