"""Writes the pages of the site that come from elsewhere: config fields, commands, pages of the repository."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

from ml_collections import ConfigDict

from clipmoe_jax import __main__ as clipmoe
from clipmoe_jax import config as configs
from clipmoe_jax import config_checks
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from clipmoe_jax.train.phase import PhaseConfig

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ROOT / "docs" / "generated"
# Pages elsewhere in the repository that the site shows too, by their names there.
PAGES = {
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "SECURITY.md": "security",
    "benchmarks/README.md": "measurements",
    "benchmarks/LOG.md": "log",
}
# What a link to a file of the code leads to on the site.
MADE = {"clipmoe_jax/config.py": "config", "clipmoe_jax/__main__.py": "commands"}


def write() -> None:
    """Writes the pages; one that is as it was keeps its time, by which Sphinx goes."""
    GENERATED.mkdir(exist_ok=True)
    pages = {"config": config_page(), "commands": commands_page()}
    for path, name in PAGES.items():
        pages[name] = relinked((ROOT / path).read_text(), ROOT / path, GENERATED)
    for name, text in pages.items():
        path = GENERATED / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def relinked(text: str, page: pathlib.Path, folder: pathlib.Path) -> str:
    """Returns the text of a page of the repository with its links as they are seen from a folder of the site.

    Folders have no page there: what links to one becomes plain text.
    """

    def link(match: re.Match) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        path = (page.parent / target).resolve()
        if path.is_dir():
            return match[1]
        name = (PAGES | MADE).get(path.relative_to(ROOT).as_posix())
        new = os.path.relpath(GENERATED / f"{name}.md" if name else path, folder)
        return f"[{match[1]}]({new}{hash_}{anchor})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def config_page() -> str:
    """Returns the table of every config field: default, range or choices, and meaning."""
    comments, sections = field_comments(), {}
    for name, value in fields(configs.default_config()):
        sections.setdefault(section_of(name), []).append((name, value))
    lines = [
        "# Config fields",
        "",
        "Every field is an option of `train` and `plan`: `--config.mcl.batch_size=400`. In a config file it",
        "is `config.mcl.batch_size = 400`. Defaults are the paper's run, ViT-L/14 with 248 text positions;",
        "each config that comes with the package changes some. Times are in steps, and batch sizes count all",
        "devices together.",
    ]
    for section, rows in sections.items():
        lines += [
            "",
            f"## {section or 'The run'}",
            "",
            "| field | type | default | range | meaning |",
            "|---" * 5 + "|",
        ]
        for name, value in rows:
            short = name.removeprefix(f"{section}.")
            cells = (f"`{short}`", kind_of(name, value), default_of(value), range_of(name), comments[name])
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def section_of(name: str) -> str:
    """Returns the heading that a field stands under; "" for those of the run itself."""
    nested = next((s for s in ("base.architecture", "base.train") if name.startswith(f"{s}.")), "")
    return nested or name.rpartition(".")[0]


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted name, default) of every field."""
    for name, value in config.items():
        if isinstance(value, ConfigDict) and value:
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def kind_of(name: str, value: object) -> str:
    optional = name.removeprefix("base.architecture.")
    if optional in configs.OPTIONAL:
        return f"{configs.OPTIONAL[optional].__name__} or None"
    return {"ConfigDict": "dict", "NoneType": "None"}.get(type(value).__name__, type(value).__name__)


def default_of(value: object) -> str:
    return "`{}`" if isinstance(value, ConfigDict) else f"`{value!r}`"


def range_of(name: str) -> str:
    if name in config_checks.CHOICES:
        return ", ".join(f"`{choice!r}`" for choice in config_checks.CHOICES[name])
    if name in config_checks.RANGES:
        least, most = config_checks.RANGES[name]
        return f"{least:g} and more" if most >= 1e9 else f"{least:g} to {most:g}"
    return ""


def field_comments() -> dict[str, str]:
    """Returns {dotted field: meaning}, from comments of `default_config` and docstrings of dataclasses."""
    path = pathlib.Path(configs.__file__)
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    source = path.read_text().splitlines()
    texts = {token.start[0]: token.string.lstrip("# ") for token in tokens}
    alone = {row for row in texts if source[row - 1].lstrip().startswith("#")}
    [function] = [
        node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "default_config"
    ]
    found = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        above, row = [], node.lineno - 1
        while row in alone:
            above.insert(0, texts[row])
            row -= 1
        beside = [
            texts[r] for r in range(node.lineno, (node.end_lineno or 0) + 1) if r in texts and r not in alone
        ]
        inside = [texts[r] for r in range(node.lineno, (node.end_lineno or 0) + 1) if r in alone]
        if text := " ".join([*above, *inside, *beside]):
            text = text[0].upper() + text[1:].rstrip(".") + "."
            name = ast.unparse(node.targets[0]).removeprefix("config.")
            one, _, field = name.partition("config[section].")
            names = [f"{s}.{field}" for s in configs.FINE_TUNING_SECTIONS] if field else [one]
            found |= dict.fromkeys(names, text)
    for section in configs.PHASE_SECTIONS:
        found |= {f"{section}.{name}": text for name, text in described(PhaseConfig).items()}
    for prefix, kind in (("", ClipConfig), ("vision.", VisionConfig), ("text.", TextConfig)):
        found |= {f"base.architecture.{prefix}{name}": text for name, text in described(kind).items()}
    return found


def described(kind: type) -> dict[str, str]:
    """Returns {field: meaning} of what a dataclass's docstring says, "name: meaning." one after the other."""
    text = " ".join((kind.__doc__ or "").split())
    parts = re.split(r"(?:^|\s)(\w+): ", text)
    return {
        name: meaning[0].upper() + meaning[1:] for name, meaning in zip(parts[1::2], parts[2::2], strict=True)
    }


def commands_page() -> str:
    """Returns the manuals of all commands, as --help prints them."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    program = "import sys; from clipmoe_jax.__main__ import main; main()"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program, name, "--help"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in clipmoe.COMMANDS
    }
    lines = [
        "# Commands",
        "",
        "What `clipmoe COMMAND --help` prints. Without installing, `python -m clipmoe_jax`",
        "",
    ]
    lines[-2] += " is the same"
    lines.insert(-1, "as `clipmoe`, and `python -m clipmoe_jax.main` the same as `clipmoe train`.")
    for name, process in started.items():
        text, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"clipmoe {name} --help ended with {process.returncode}")
        lines += [f"## clipmoe {name}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)
