"""Commands: their text, their errors and their exit codes."""

import subprocess
import sys

import pytest
from absl import flags

from clipmoe_jax.core import artifacts, cli, distributed


def command(body: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a command whose main(argv) has this body."""
    script = (
        "from absl import flags\nfrom clipmoe_jax.core import artifacts, cli, distributed\n"
        f"flags.DEFINE_string('stage', '', '')\ndef main(argv):\n    {body}\ncli.run(main)\n"
    )
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)


def test_returned_text_is_printed():
    done = command("return 'made ' + flags.FLAGS.stage", "--stage=base")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made base\n", "")


def test_command_that_returns_nothing_prints_nothing():
    done = command("pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_missing_artifact_is_completed_with_the_flag_that_makes_it():
    done = command("artifacts.require('runs/base', 'base')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: runs/base does not exist yet: stage base makes it; "
        "run the same command with --stage=base first\n"
    )


def test_preempted_run_says_where_and_exits_with_75():
    done = command("raise distributed.Preempted('mcl_1, step 5')")
    assert done.returncode == 75
    assert done.stdout == "mcl_1, step 5: stopped by SIGTERM; start the same command again to go on\n"


def test_preemption_without_a_command_exits_with_75(capsys):
    with pytest.raises(SystemExit) as stop:
        raise distributed.Preempted("alone")
    assert stop.value.code == distributed.EXIT_PREEMPTED == 75
    assert capsys.readouterr().out == ""


def test_error_without_a_flag_to_add_stays_as_it_is():
    assert cli._fix(ValueError("a thing")) == ""
    if "stage" not in flags.FLAGS:
        assert cli._fix(artifacts.MissingArtifactError("runs/base", "base")) == ""


def test_flags_are_marked_as_parsed_once():
    script = (
        "import sys\nsys.argv += ['--unknown']\nfrom absl import flags\nfrom clipmoe_jax.core import cli\n"
        "flags.DEFINE_integer('n', 3, '')\ncli.mark_flags_parsed()\n"
        "cli.mark_flags_parsed()\nprint(flags.FLAGS.n)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
