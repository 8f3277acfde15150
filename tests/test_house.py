"""The house: a module imports from its own row or the rows above, never from below."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "clipmoe_jax"

# README, "The house". Data flows down; `config` describes models and training, so it stands below them.
ROWS = [
    ["trees", "paths", "sharding", "distributed", "metrics", "cli", "accelerators"],
    ["data"],
    ["models"],
    ["losses"],
    ["checkpoints", "artifacts"],
    ["train"],
    ["interop"],
    ["api", "prepare", "config"],
    ["dmu"],
    ["evaluation", "planning"],
    ["reporting"],
    ["main", "convert", "evaluate", "model_card", "report"],
]
ROW_OF = {room: i for i, row in enumerate(ROWS) for room in row}


def modules():
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(dotted: str) -> str:
    """`clipmoe_jax.models.clip` -> models."""
    return dotted.split(".")[1]


def imported_rooms(path: pathlib.Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "clipmoe_jax":
            names += [f"clipmoe_jax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipmoe_jax."):
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("clipmoe_jax.")]
    return {room(name) for name in names}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_its_row_or_above(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    below = {name for name in imported_rooms(path) if ROW_OF[name] > ROW_OF[own]}
    assert not below, f"{own} (row {ROW_OF[own]}) imports from below: {below}"


def test_one_loop_over_steps():
    """Only train/loop.py takes training steps; planning/abstract.py looks at one."""
    callers = {p.name for p in modules() if "make_train_step(" in p.read_text() and p.name != "step.py"}
    assert callers == {"loop.py", "abstract.py"}
