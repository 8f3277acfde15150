"""The house: what each room of clipmoe_jax must not know. CONTRIBUTING.md, "Layout", describes the rooms."""

import ast
import pathlib
from typing import NamedTuple

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "clipmoe_jax"
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
# A command or the API: what a user runs or imports. Rooms know none of these; `config` describes runs.
CONFIG = ("config", "config_checks")
TOP = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", *CONFIG))


class Never(NamedTuple):
    """room must not import any of `others` (dotted below clipmoe_jax), except `allowed`."""

    room: str
    others: tuple[str, ...]
    reason: str
    allowed: tuple[str, ...] = ()


def others(*but: str) -> tuple[str, ...]:
    """Every room but these, `config` and the top level."""
    return (*(room for room in ROOMS if room not in but), *TOP, *CONFIG)


NEVERS = [
    Never("core", others("core"), "the tools at the bottom serve every room and know none"),
    Never(
        "data",
        others("core", "data"),
        "data is pairs in files: it knows no model and no run",
        ("models.inputs",),
    ),
    Never("models", others("core", "models"), "a model is a function of arrays: it knows no data and no run"),
    Never(
        "train",
        others("core", "data", "models", "train"),
        "the loop trains what it is given: it knows no stage and no config",
    ),
    Never(
        "interop",
        others("core", "models", "interop"),
        "a format is names and arrays: it knows no data set and no run",
    ),
    Never(
        "evaluation",
        others("core", "data", "models", "evaluation"),
        "a metric takes arrays, models and data sets: it knows no run",
    ),
    Never(
        "analysis",
        others("core", "data", "models", "evaluation", "analysis"),
        "an analysis takes arrays, models and data sets: it knows no run",
    ),
    Never(
        "planning",
        ("analysis", "dmu", "evaluation", "interop", "reporting", *TOP),
        "a plan reads the recipe table, worked out for a config, and traces steps: it runs no stage",
        ("dmu.recipes", "dmu.phases"),
    ),
    Never(
        "reporting",
        ("analysis", "dmu", "interop", "train", *TOP),
        "a report reads files that a run left: it runs no stage and trains nothing",
        ("dmu.recipe", "dmu.recipes"),
    ),
    Never(
        "dmu",
        ("planning", "reporting", *TOP),
        "stages make artifacts: how these are shown is not theirs",
        ("planning.memory",),  # by which a run chooses what its steps compute again
    ),
]


def imports(source: str) -> set[str]:
    """Modules of clipmoe_jax that a file imports, dotted below it: `from clipmoe_jax.data import x` is
    data.x."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names.add(f"relative import in line {node.lineno}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "clipmoe_jax":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "clipmoe_jax"}
    return {name.removeprefix("clipmoe_jax").removeprefix(".") for name in names}


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def forbidden(never: Never, source: str) -> set[str]:
    """What a file of the room imports and must not."""
    return {
        name
        for name in imports(source)
        if name.startswith("relative import")
        or any(is_under(name, other) for other in never.others)
        and not any(is_under(name, allowed) for allowed in never.allowed)
    }


@pytest.mark.parametrize("never", NEVERS, ids=lambda never: never.room)
def test_room_knows_only_what_it_may(never):
    found = {
        name: names
        for name, source in sources().items()
        if name.startswith(f"{never.room}/") and (names := forbidden(never, source))
    }
    assert not found, never.reason


PLANTED = [(never, other) for never in NEVERS for other in never.others if other not in never.allowed]


@pytest.mark.parametrize(("never", "other"), PLANTED, ids=lambda p: p if isinstance(p, str) else p.room)
def test_planted_import_breaks_the_rule(never, other):
    parent, _, name = f"clipmoe_jax.{other}".rpartition(".")
    for source in (
        f"import clipmoe_jax.{other}",
        f"from {parent} import {name}",
        f"def f():\n    from clipmoe_jax.{other} import something as s",
    ):
        assert forbidden(never, source), source


def test_every_room_has_its_rule():
    assert {never.room for never in NEVERS} == set(ROOMS)


def test_one_loop_over_steps():
    """Only train/loop.py takes training steps; step_programs.py and planning/abstract.py look at them."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "step.py"]
    callers = {path.name for path in files if "make_train_step(" in path.read_text()}
    assert callers == {"loop.py", "step_programs.py", "abstract.py"}


# Code for PyTorch and transformers that exports carry with them: not of this program.
EXPORTED = ("interop/modeling_clip_moe.py", "data/image_processing_openai_clip.py")
COMMANDS = {
    "main.py",
    "prepare.py",
    "convert.py",
    "embed.py",
    "evaluate.py",
    "report.py",
    "plan.py",
    "planning/roofline.py",
}
FLAG_MODULES = {"absl.flags", "absl.app", "ml_collections.config_flags"}


def modules(source: str) -> set[str]:
    """Every module or name that a file imports, dotted."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def writes_to_the_terminal(source: str) -> set[str]:
    """Calls of print and tqdm, and uses of sys.stdout and sys.stderr, with their lines."""
    places = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" or "tqdm" in name.split("."):
                places.add(f"line {node.lineno}: {name}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stderr"):
            places.add(f"line {node.lineno}: {ast.unparse(node)}")
    return places


def sources() -> dict[str, str]:
    """{path below the package: content} of every file but the exported one."""
    paths = sorted(path for path in PACKAGE.rglob("*.py"))
    named = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}
    return {name: source for name, source in named.items() if name not in EXPORTED}


def test_only_commands_and_cli_know_flags():
    """A function is told by its arguments: it works alike in a notebook, a test and a command."""
    knowing = {
        name
        for name, source in sources().items()
        if any(is_under(module, flags) for module in modules(source) for flags in FLAG_MODULES)
    }
    assert knowing <= COMMANDS | {"core/cli.py"}


def test_only_cli_and_metrics_write_to_the_terminal():
    """One place decides that process 0 alone writes, that a log file gets no bars, that text is flushed.

    Commands return their text. `__main__` lists them before anything else is imported.
    """
    places = {
        name: writes
        for name, source in sources().items()
        if name not in ("core/cli.py", "core/metrics.py", "__main__.py")
        and (writes := writes_to_the_terminal(source))
    }
    assert places == {}


def test_digit_scenes_are_a_source_like_any_other():
    """Only the table of sources knows the demo's data; the config names what its old field has become."""
    lines = {name: source.count("digit_scenes") for name, source in sources().items()}
    assert {name for name, count in lines.items() if count} == {
        "config.py",
        "data/sources/__init__.py",
        "data/sources/digit_scenes.py",
    }
    [line] = [line for line in sources()["config.py"].splitlines() if "digit_scenes" in line]
    assert line.strip().startswith('"data.digit_scenes": ')


def test_json_files_are_read_in_one_place():
    """`core.json_files` names the file and what is wrong in it; these read what is in memory, or our own."""
    readers = {name for name, source in sources().items() if "json.load" in source}
    assert readers == {
        "core/json_files.py",
        "core/artifacts.py",  # inputs as a file gives them back
        "core/distributed.py",  # between processes
        "data/sources/base.py",  # an entry, which may be a bad record
        "evaluation/classes.py",  # our own tables
    }


def test_planted_flags_and_prints_are_seen():
    assert "absl.flags" in modules("def f():\n    from absl import flags")
    assert "absl.flags" in modules("import absl.flags")
    for planted in (
        "print('x')",
        "tqdm(range(3))",
        "tqdm.tqdm()",
        "tqdm.write('x')",
        "sys.stdout.write('x')",
    ):
        assert writes_to_the_terminal(f"def f():\n    {planted}"), planted
    assert not writes_to_the_terminal('TEXT = "print(1)"\ndef f(bar: tqdm): ...')


def test_docstrings_begin_with_no_question_word():
    """They begin with a verb: what is returned or done, not a clause about it."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    places = [
        f"{name}:{node.body[0].lineno}"
        for name, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds)
        and (ast.get_docstring(node) or "-").split()[0].rstrip(",:") in ("What", "How", "Where")
    ]
    assert places == []
