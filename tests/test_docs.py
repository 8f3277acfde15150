"""README.md and docs/: every command is one that the program takes, and every block that says nothing runs.

So does every notebook. A block that wants more than two cores and this repository says so in a comment above
it, `<!-- needs: … -->`; one of text alone is marked `text`.
"""

import ast
import doctest
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from clipmoe_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
# In the order in which a reader would type what is in them: later blocks use what earlier ones made.
FIRST = ("README.md", "docs/quickstart.md", "docs/tutorial.md")
OTHERS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
PAGES = (*FIRST, *(name for name in OTHERS if name not in FIRST))
BLOCK = re.compile(
    r"^(?:<!-- needs: (?P<needs>.+) -->\n)?```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$", re.M | re.S
)
COMMAND = re.compile(r"(?:python -m clipmoe_jax(?:\.[\w.]+)?|clipmoe) [^\n|>]*")


class Block(NamedTuple):
    page: str
    needs: str
    language: str
    code: str


def blocks() -> list[Block]:
    return [
        Block(page, match["needs"] or "", match["language"], match["code"].replace("\\\n", " "))
        for page in PAGES
        for match in BLOCK.finditer((ROOT / page).read_text())
        if not match["language"].startswith("{")  # a directive of the site
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(module of clipmoe_jax, arguments) of each command in a block or in a line of text, each once."""
    text = "\n".join(block.code for block in blocks() if block.language in ("", "python"))
    for _, notebook in notebooks():
        code = (cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
        text += "\n" + "\n".join("".join(lines) for lines in code)
    for page in PAGES:
        text += "\n" + "\n".join(
            re.findall(
                r"`((?:python -m clipmoe_jax|clipmoe) [^`]+)`", BLOCK.sub("", (ROOT / page).read_text())
            )
        )
    found = set()
    for line in COMMAND.findall(text):
        program, *words = shlex.split(line.replace("'$", "").partition(" && ")[0], comments=True)
        if program == "python":
            program, words = words[1], words[2:]
        if program in ("clipmoe", "clipmoe_jax"):
            name, *words = words
            module = COMMANDS.get(name, name)
            if name == "COMMAND":  # any
                continue
        else:
            module = program.removeprefix("clipmoe_jax.")
        words = [word for word in words if word.startswith("--") and "…" not in word]
        found.add((module, *words))
    return [(module, words) for module, *words in sorted(found)]


def notebooks() -> list[tuple[str, dict]]:
    """(name, content) of each."""
    return [(path.stem, json.loads(path.read_text())) for path in sorted((ROOT / "docs").glob("*/*.ipynb"))]


# Parses the flags of each command in a process of its own, all with the imports of one.
PARSE = """
import importlib, json, os, sys

from clipmoe_jax import config_checks
from clipmoe_jax.core import cli

given = json.load(sys.stdin)
modules = {name: importlib.import_module(f"clipmoe_jax.{name}") for name in {name for name, _ in given}}
for name, words in given:
    sys.stdout.flush()
    if not (child := os.fork()):
        sys.argv = [name, *words]
        modules[name]._define_flags()
        for flag in cli.flags.FLAGS:
            cli.flags.FLAGS[flag].validators.clear()  # which ask for what a line of the docs leaves out
        def main(argv):
            chosen = cli.flags.FLAGS["config"].value if "config" in cli.flags.FLAGS else None
            if chosen is not None:
                config_checks.validate(chosen, paths=False)
        cli.run(main)
    if os.waitpid(child, 0)[1]:
        print(name, *words)
"""


def test_every_command_is_one_that_the_program_takes():
    """Modules, flags, configs, their arguments and the fields on the line exist, and values are in range."""
    given = commands()
    assert len(given) > 15
    done = subprocess.run(
        [sys.executable, "-c", PARSE], input=json.dumps(given), capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1200
    prose = BLOCK.sub("\n\n", text)
    paragraphs = [p for p in re.split(r"\n\n|\n(?=- )", prose) if not p.startswith(("|", "#", "!"))]
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?])\s", " ".join(p.split()))]
    assert all(len(sentence.split()) <= 35 for sentence in sentences)


def test_links_lead_to_files():
    """Within the site Sphinx checks them, with their anchors."""
    links = [
        (page, target)
        for page in (*PAGES, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")
        for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
        if ":" not in target and not target.startswith("generated/")
    ]
    assert len(links) > 50
    assert [link for link in links if not (ROOT / link[0]).parent.joinpath(link[1]).exists()] == []


def messages() -> list[str]:
    """The likeliest errors: the first column of the tables of docs/troubleshooting.md."""
    return re.findall(r"^\| `([^`]+)`", (ROOT / "docs/troubleshooting.md").read_text(), re.M)


def test_errors_of_troubleshooting_are_those_of_the_code():
    texts = [
        node.value
        for path in (ROOT / "clipmoe_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(messages()) >= 25
    missing = {
        part
        for message in messages()
        if not message.startswith("RESOURCE_EXHAUSTED")  # XLA's
        for part in map(str.strip, message.split("…"))
        if not any(part in text for text in texts)
    }
    assert not missing


def test_examples_of_the_docs_give_what_they_show():
    tried = [doctest.testfile(str(ROOT / page), module_relative=False) for page in PAGES]
    assert sum(one.attempted for one in tried) > 0 and not sum(one.failed for one in tried)


def test_blocks_are_of_three_kinds():
    assert {block.language for block in blocks()} == {"", "python", "text"}


def test_notebooks_are_committed_without_outputs():
    """They would be stale with the next change. Who builds the site may have them made (docs/conf.py)."""
    assert len(notebooks()) == 3
    for name, notebook in notebooks():
        assert {*notebook["metadata"]} == {"kernelspec", "language_info"}, name
        for cell in notebook["cells"]:
            assert not cell["metadata"], name
            assert not cell.get("outputs") and cell.get("execution_count") is None, name


def small(line: str) -> str:
    """A command of the docs with this Python and the demo's small settings."""
    line = re.sub(r"^clipmoe ", "python -m clipmoe_jax ", line)
    line = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", line)
    return re.sub(r"(--config=(?:configs/)?demo(?:\.py)?)(?=\s)", r"\1:small", line)


def with_torchvision(code: str) -> str:
    declare = "from benchmarks import torchvision_operators\ntorchvision_operators.declare()\n"
    return declare + code if "torch" in code else code


def environment() -> dict[str, str]:
    """What gives a process this package, the modules of tests/ and one device."""
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_NUM_CPU_DEVICES": "1"}


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "notebook"), notebooks(), ids=[name for name, _ in notebooks()])
def test_notebooks_run(tmp_path, monkeypatch, name, notebook):
    """From above to below, with the demo's small settings: every command succeeds, every figure is drawn."""
    import nbclient
    import nbformat

    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        cell.source = "".join(cell.source)
        if cell.cell_type == "code":
            cell.source = with_torchvision(
                re.sub(
                    "^!(.*)$",
                    lambda line: f"!{small(line[1])}\nassert _exit_code == 0",
                    cell.source,
                    flags=re.M,
                )
            )
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    for cell in notebook.cells:
        drawn = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
        assert bool(drawn) == bool(re.search(r"^ *(plt\.show|compare|show|draw_maps)\(", cell.source, re.M))


@pytest.mark.nightly
def test_blocks_run_as_they_stand(tmp_path):
    """In one folder, page by page, with the demo's small settings. (.ci/run and .ci/nightly install.)"""
    options = {"cwd": tmp_path, "env": os.environ | environment(), "capture_output": True, "text": True}
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks():
        if block.needs or block.language == "text" or ">>>" in block.code:
            continue
        if block.language == "python":
            code = with_torchvision(block.code)
            code = f"from clipmoe_jax.config import default_config\nconfig = default_config()\n{code}"
            done = subprocess.run([sys.executable, "-c", code], **options)
            assert done.returncode == 0, (block.page, block.code, done.stderr[-2000:])
            continue
        for line in re.split(r"\n| && ", block.code):
            if not line.strip() or line.startswith(("pip install", "python -m pytest")):
                continue
            done = subprocess.run(["bash", "-c", small(line)], **options)
            assert done.returncode == 0, (block.page, line, done.stderr[-2000:])
