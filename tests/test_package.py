"""The package: what a wheel holds, and the command that it installs (`.ci/nightly` installs one)."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from clipmoe_jax import __main__ as clipmoe

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_clipmoe(*arguments):
    started = [sys.executable, "-m", "clipmoe_jax", *arguments]
    return subprocess.run(started, capture_output=True, text=True, cwd=ROOT)


def test_wheel_holds_every_file():
    """pyproject.toml names packages and data files; nothing else would miss one that it forgot."""
    setuptools = PROJECT["tool"]["setuptools"]
    package = ROOT / "clipmoe_jax"
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in package.rglob("*.py")}
    assert {*setuptools["packages"]} == folders | {*setuptools["package-dir"]}
    data = {path for pattern in setuptools["package-data"]["clipmoe_jax"] for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert data == {path for path in files if path.suffix != ".py"}


def test_every_python_that_is_promised_is_run():
    promised = re.findall(r"Python :: (3\.\d+)", str(PROJECT["project"]["classifiers"]))
    matrix = re.search(r"python: (\[.*\])", (ROOT / ".github/workflows/nightly.yml").read_text())
    assert matrix and promised == re.findall(r"3\.\d+", matrix[1])


def test_clipmoe_lists_every_command():
    """A module of the top level that defines flags is one of its commands."""
    modules = {
        path.stem for path in (ROOT / "clipmoe_jax").glob("*.py") if "_define_flags()" in path.read_text()
    }
    assert {*clipmoe.COMMANDS.values()} == modules
    listed = run_clipmoe().stdout
    assert all(re.search(rf"^  {name} +[A-Z].*\.$", listed, re.MULTILINE) for name in clipmoe.COMMANDS)


def test_clipmoe_refuses_an_unknown_command():
    done = run_clipmoe("trian")
    commands = ", ".join(clipmoe.COMMANDS)
    assert (done.returncode, done.stderr) == (1, f"error: no command 'trian': choose one of {commands}\n")


def test_manual_of_a_command_calls_it_as_it_was_called():
    done = run_clipmoe("train", "--help")
    assert done.returncode == 0 and "    clipmoe train --config=demo --workdir=runs/demo\n" in done.stdout
    assert (
        "  --config=CONFIG  (required)\n" in done.stdout
        and "  --distributed=auto|off  (default auto)\n" in done.stdout
    )


@pytest.mark.parametrize("name", ["train", "prepare"])
def test_exit_code_of_sigterm_is_told_of_train_alone(name):
    """The other commands end at once."""
    text = " ".join(run_clipmoe(name, "--help").stdout.split())
    assert ("SIGTERM saves and exits with code 75, start the same command again" in text) == (name == "train")
    assert ("SIGTERM" in text) == (name == "train")
    assert text.endswith("Exit codes: 0 done; 1 an error, told in a line; 130 stopped by Ctrl-C.")


def test_config_by_its_name():
    done = run_clipmoe("plan", "--config=demo:small", "--config.mcl.batch_size=0", "--pairs=8000")
    assert done.stderr.startswith("error: mcl.batch_size=0 must lie between 1 and ")
    done = run_clipmoe("plan", "--config=dmeo", "--pairs=8000")
    assert (
        done.returncode == 1 and "no such config: choose one of demo, drawings, sweep, vit_b32" in done.stderr
    )


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x.csv").touch()
    done = run_clipmoe("train", "--config=demo", f"--workdir={tmp_path}/x.csv")
    message = f"error: --workdir={tmp_path}/x.csv is a file: name the folder that everything goes to\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
