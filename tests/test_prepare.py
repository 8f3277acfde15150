"""Errors of a command with a config, as a person at a terminal meets them."""

import os
import subprocess
import sys

import pytest

CONFIG = """
import ml_collections

def get_config(arch="small"):
    if arch != "small":
        raise ValueError(f"unknown arch {arch!r}: use small")
    return ml_collections.ConfigDict({"num_steps": 10, "data": {"batch_size": 8}})
"""

COMMAND = """
from ml_collections import config_flags
from clipmoe_jax.core import cli
from clipmoe_jax.data.tokenizer import Tokenizer

CONFIG = config_flags.DEFINE_config_file("config")

def main(argv):
    steps = CONFIG.value.num_steps
    if steps == 11:
        Tokenizer(context_length=2)  # an error of this package, made for people
    if steps == 12:
        int("twelve")  # an error from anywhere else
    print("steps", steps)

cli.run(main)
"""


@pytest.fixture
def run_command(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "command.py").write_text(COMMAND)

    def run(*arguments, **variables):
        return subprocess.run(
            [sys.executable, "command.py", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.getcwd()} | variables,
            capture_output=True,
            text=True,
        )

    return run


def test_overrides_reach_main(run_command):
    done = run_command("--config=config.py", "--config.num_steps=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "steps 3\n", "")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.nothing=1", "no such config field: 'nothing'"),
        ("--config.data.batchsize=1", "'batchsize' Did you mean \"batch_size\""),
        ("--config.num_steps=many", "--config.num_steps=many: invalid literal for int"),
        ("--config.num_steps=11", "context_length=2 is too short: use 3 or more"),
        ("--config=config.py:huge", "unknown arch 'huge': use small"),
        ("--config=nowhere.py", "No such file or directory: 'nowhere.py'"),
        ("config.num_steps=3", "unexpected argument 'config.num_steps=3'"),
    ],
)
def test_errors_are_one_line(run_command, argument, message):
    done = run_command("--config=config.py", argument)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_other_errors_keep_their_stack_trace(run_command):
    done = run_command("--config=config.py", "--config.num_steps=12")
    assert done.returncode == 1 and "Traceback" in done.stderr and "'twelve'" in done.stderr
    debugged = run_command("--config=config.py", "--config.num_steps=11", CLIPMOE_DEBUG="1")
    assert debugged.returncode == 1 and "Traceback" in debugged.stderr
