"""Commands: their text, their errors and their exit codes."""

import errno
import os
import resource
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest
from absl import flags
from grids import grid
from ml_collections import ConfigDict, config_flags

from clipmoe_jax.core import artifacts, cli, distributed
from clipmoe_jax.core.errors import Errors


def command(body: str, *arguments: str, before: Any = None) -> subprocess.CompletedProcess:
    """Runs a command whose main(argv) has this body."""
    script = (
        "from absl import flags\nfrom clipmoe_jax.core import artifacts, cli, distributed\n"
        f"flags.DEFINE_string('stage', '', '')\ndef main(argv):\n    {body}\ncli.run(main)\n"
    )
    started = [sys.executable, "-c", script, *arguments]
    return subprocess.run(started, capture_output=True, text=True, preexec_fn=before)


def test_missing_artifact_is_completed_with_the_flag_that_makes_it():
    done = command("artifacts.require('runs/base', 'base')")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: runs/base does not exist yet: stage base makes it; "
        "run the same command with --stage=base first\n"
    )


def test_preemption_without_a_command_exits_with_75(capsys):
    with pytest.raises(SystemExit) as stop:
        raise distributed.Preempted("alone")
    assert stop.value.code == distributed.EXIT_PREEMPTED == 75
    assert capsys.readouterr().out == ""


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a command's main in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command sets

    def run(main):
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        return stop.value.code, *capsys.readouterr()

    return run


def raising(error):
    def main(argv):
        raise error

    return main


def test_returned_text_is_printed(run_here):
    assert run_here(lambda argv: "made base") == (None, "made base\n", "")


def test_command_that_returns_nothing_prints_nothing(run_here):
    assert run_here(lambda argv: None) == (None, "", "")


def test_preempted_run_says_where_and_exits_with_75(run_here):
    told = "mcl_1, step 5: stopped by SIGTERM; start the same command again to go on\n"
    assert run_here(raising(distributed.Preempted("mcl_1, step 5"))) == (75, told, "")


def test_every_thing_that_is_wrong_has_its_line(run_here):
    errors = Errors()
    errors.add("mcl.b1=2 is wrong")
    errors.add("two\nlines")
    done = run_here(lambda argv: errors.raise_all())
    assert done == (1, "", "error: mcl.b1=2 is wrong\nerror: two lines\n")


HOSTILE = "photo\x1b[2J\u202egnp.\x07\udcff\u200e\u200f\u061c\u200b\ufeff\U000e0041"
ESCAPED = r"photo\x1b[2J\u202egnp.\x07\udcff\u200e\u200f\u061c\u200b\ufeff\U000e0041"


def test_an_error_that_quotes_a_long_name_is_one_short_line(run_here):
    code, out, err = run_here(raising(OSError(f"x.pt names {'k' * 300_000}: mend it")))
    assert (code, out) == (1, "") and len(err) < 5000
    assert err.startswith("error: x.pt names kkk") and err.endswith("kkk: mend it\n") and "kkk…kkk" in err


@pytest.mark.parametrize("messages", [(HOSTILE,), (HOSTILE, "other")], ids=["one", "several"])
def test_control_characters_reach_no_terminal_as_they_are(run_here, messages):
    """Of a stranger's file name: it could clear the screen, or show another name than it is."""

    def main(argv):
        errors = Errors()
        for message in messages:
            errors.add(message)
        errors.raise_all()

    code, out, err = run_here(main)
    assert (code, out) == (1, "") and f"error: {ESCAPED}\n" in err


def test_text_of_a_command_is_escaped_too(run_here):
    assert run_here(lambda argv: f"1\t{HOSTILE}\nä 東京 👩‍🚀") == (None, f"1\t{ESCAPED}\nä 東京 👩‍🚀\n", "")


def test_line_has_no_breaks(capsys):
    cli.say(f"{HOSTILE}\nerror:\tall is lost")
    assert capsys.readouterr().out == f"{ESCAPED}\\nerror:\\tall is lost\n"


def test_help_lists_the_flags_of_every_command():
    done = command("flags.FLAGS.stage", "--help")
    assert done.returncode == 0 and "  --stage=…\n" in done.stdout
    assert "  --debug\n      Prints an error with its stack trace.\n" in done.stdout


def test_warning_of_a_library_is_one_line_that_names_what_was_read():
    body = "import warnings; from clipmoe_jax.core.terminal import reading\n"
    body += "    with reading(['photo\\x1b[2J.png']): warnings.warn('odd\\x1b[2J\\ntags')\n"
    done = command(f"{body}    warnings.warn('nowhere')")
    expected = [r"warning: photo\x1b[2J.png: odd\x1b[2J tags", "warning: <string>, line 7: nowhere"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "", expected)


def test_what_a_library_logs_is_escaped():
    done = command("from absl import logging; logging.warning('%s is gone', 'photo\\x1b[2J.png')")
    assert done.stderr.endswith(r"] photo\x1b[2J.png is gone" + "\n")


def test_ctrl_c_ends_a_command_in_one_line(run_here):
    assert run_here(raising(KeyboardInterrupt())) == (130, "", "ended by Ctrl-C\n")


def test_run_that_ctrl_c_stopped_says_where_and_exits_with_130(run_here, monkeypatch):
    monkeypatch.setattr(distributed, "_interrupted", True)
    told = "mcl_1, step 5: stopped by Ctrl-C; start the same command again to go on\n"
    assert run_here(raising(distributed.Preempted("mcl_1, step 5"))) == (130, told, "")


def chained(error, cause):
    error.__cause__ = cause
    return error


# As tensorstore tells orbax, which raises it in another place.
FULL = (
    'RESOURCE_EXHAUSTED: Error writing "proj/0.0" in OCDBT database at local file "/runs/base/4/": Failed to '
    "write 6595 bytes to file 15: No space left on device [os_error_code='28']"
)
FULL_DISKS = {
    "tensorstore": (ValueError(FULL), ": /runs/base/4"),
    "behind another error": (chained(RuntimeError("no checkpoint"), ValueError(FULL)), ": /runs/base/4"),
    "a file": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/x.npy"), ": /runs/x.npy"),
    "an open file": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ""),
    "a quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/runs/x"), ": /runs/x"),
}


@pytest.mark.parametrize(("error", "place"), FULL_DISKS.values(), ids=FULL_DISKS)
def test_full_disk_is_one_line(run_here, monkeypatch, error, place):
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, out, told = run_here(raising(error))
    reason = "Disk quota exceeded" if isinstance(error, OSError) and error.errno == errno.EDQUOT else None
    reason = reason or "No space left on device"
    assert (code, out) == (1, "")
    assert told == f"error: {reason}{place}: make room, and start the same command again\n"


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ((64, 90), "90\n"),
        (
            (64, 64),
            "error: [Errno 24] Too many open files: '/dev/null'; a process may open 64 here: raise the ",
        ),
    ],
)
def test_command_may_open_as_many_files_as_the_system_allows(limits, told):
    body = (
        "import os, resource; [os.open('/dev/null', 0) for _ in range(70)]; "
        "return str(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    done = command(body, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))
    assert (done.stdout + done.stderr).startswith(told)


def test_memory_that_is_exhausted_is_no_full_disk():
    assert cli._full_disk(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")) == ""


def test_process_that_nothing_started_is_told_the_flag_for_one(monkeypatch):
    monkeypatch.setattr(cli, "flags", SimpleNamespace(FLAGS={"distributed": "auto"}))
    assert "--distributed=off" in cli._fix(distributed.NotStartedError("no srun"))


def test_home_is_expanded_in_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mine")
    given = []

    class Parsed(list):  # of no flags
        def __call__(self, argv):
            given.append(argv)

    monkeypatch.setattr(cli, "flags", SimpleNamespace(FLAGS=Parsed()))
    cli._parse_flags(["command", "--out=~/set", "--source=folder:~/a?images=~/b"], {})
    assert given == [["command", "--out=/home/mine/set", "--source=folder:/home/mine/a?images=/home/mine/b"]]


def test_home_is_expanded_in_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/mine")
    config = ConfigDict({"n": 1, "data": {"train": "~/train"}, "lines": ("knn:~/a?train=~/b", 2)})
    cli._expand_home(config.lock())
    lines = ("knn:/home/mine/a?train=/home/mine/b", 2)
    assert config.to_dict() == {"n": 1, "data": {"train": "/home/mine/train"}, "lines": lines}


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


CONFIG = """
import ml_collections

def get_config(arch="small"):
    if arch != "small":
        raise ValueError(f"unknown arch {arch!r}: use small")
    return ml_collections.ConfigDict({"num_steps": 10, "data": {"batch_size": 8}})
"""

CONFIG_COMMAND = """
from absl import flags
from clipmoe_jax.core import cli
from clipmoe_jax.data.tokenizer import Tokenizer

cli.define_config_flag()

def main(argv):
    steps = flags.FLAGS.config.num_steps
    if steps == 11:
        Tokenizer(context_length=2)  # an error of this package, made for people
    if steps == 12:
        int("twelve")  # an error from anywhere else
    print("steps", steps)

cli.run(main)
"""


def parse(monkeypatch, tmp_path, *arguments):
    """Parses a command's arguments in this process; returns its flags."""
    (tmp_path / "config.py").write_text(CONFIG.replace('"num_steps": 10', '"num_steps": 10, "seeds": (0,)'))
    given, argv = flags.FlagValues(), ["command", f"--config={tmp_path}/config.py", *arguments]
    flags.DEFINE_string("split", "train", "", flag_values=given)
    flags.DEFINE_bool("experts", False, "", short_name="e", flag_values=given)
    flags.DEFINE_multi_string("source", None, "", flag_values=given)
    config_flags.DEFINE_config_file("config", flag_values=given)
    monkeypatch.setattr(flags, "FLAGS", given)
    monkeypatch.setattr(sys, "argv", argv)
    assert cli._parse_flags(argv, {}) == ["command"]
    return given


@pytest.mark.parametrize(
    "arguments",
    [
        ["--split=a", "--split=b"],
        ["--split=a", "--split", "a"],
        ["--experts", "--noexperts"],
        ["-e", "--experts"],
        ["--config=config.py"],
        ["--config.num_steps=1", "--config.num_steps=2"],
        ["--config.data.batch_size=1", "--config.num_steps=1", "--config.data.batch_size=1"],
    ],
)
def test_flag_of_one_value_is_not_given_twice(monkeypatch, tmp_path, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        parse(monkeypatch, tmp_path, *arguments)
    message = capsys.readouterr().err
    assert "is given 2 times and has one value: give it once" in message
    assert message.startswith("error: --") and message.count("\n") == 1


def test_flag_of_many_values_is_given_many_times(monkeypatch, tmp_path):
    given = parse(monkeypatch, tmp_path, "--source=a", "--source=b", "--config.seeds=1", "--config.seeds=2")
    assert given.source == ["a", "b"] and given.config.seeds == (1, 2)
    assert given.split == "train" and given.config.num_steps == 10


@pytest.fixture
def run_command(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    (tmp_path / "command.py").write_text(CONFIG_COMMAND)

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
    grid(
        ("--config.nothing=1", "no such config field: 'nothing'"),
        ("--config.num_steps=11", "context_length=2 is too short: use 3 or more"),
        ("--config=nowhere.py", "--config=nowhere.py: no such file: give the name of a config (demo), or a"),
        ("config.num_steps=3", "unexpected argument 'config.num_steps=3'"),
        rest=[
            ("--config.data.batchsize=1", "'batchsize' Did you mean \"batch_size\""),
            ("--config.num_steps=many", "--config.num_steps=many: 'many' is not a whole number"),
            ("--config=config.py:huge", "error: unknown arch 'huge': use small"),
            ("--nowhere=1", "'nowhere': --help describes those that there are"),
            ("--cofig=config.py", "Did you mean: config?"),
        ],
    ),
)
def test_errors_are_one_line(run_command, argument, message):
    done = run_command(*([] if argument.startswith("--config=") else ["--config=config.py"]), argument)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_field_without_a_config_says_that_the_config_is_missing(run_command):
    done = run_command("--config.num_steps=3")
    assert (done.returncode, done.stderr) == (1, "error: --config is missing: --help describes it\n")


FILES = {
    "no get_config": ("x = 1", "mine.py", "mine.py has no get_config(), which returns the config: define it"),
    "an argument": ("def get_config(): ...", "mine.py:seeds=3", "takes no arguments: leave out :seeds=3"),
    "no argument": ("def get_config(arch): ...", "mine.py", "needs an argument: write mine.py:ARGUMENT"),
    "its own": ("def get_config():\n    return 1 + ''", "mine.py", "'int' and 'str' (mine.py, line 2)"),
}


@pytest.mark.parametrize(("text", "config", "message"), FILES.values(), ids=FILES)
def test_config_file_that_cannot_be_called_is_named(run_command, tmp_path, text, config, message):
    (tmp_path / "mine.py").write_text(text)
    done = run_command(f"--config={config}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr


def test_error_that_nobody_foresaw_is_one_line_and_a_log(run_command, tmp_path):
    done = run_command("--config=config.py", "--config.num_steps=12", TMPDIR=str(tmp_path))
    (log,) = tmp_path.glob("clipmoe_jax-*.log")
    assert done.returncode == 1 and done.stderr == (
        "error: ValueError: invalid literal for int() with base 10: 'twelve'; "
        f"{log} has its stack trace, --debug prints it\n"
    )
    command, *trace = log.read_text().splitlines()
    assert command == "command.py --config=config.py --config.num_steps=12"
    assert trace[0].startswith("Traceback") and '    int("twelve")' in "\n".join(trace)
    assert log.stat().st_mode & 0o077 == 0  # a path may be nobody else's business


@pytest.mark.parametrize("steps", ["11", "many"])
def test_debug_prints_the_stack_trace_of_every_error(run_command, tmp_path, steps):
    done = run_command("--config=config.py", f"--config.num_steps={steps}", "--debug", TMPDIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert not list(tmp_path.glob("*.log"))


CONFIGS = {
    "no name": ("return arch.nothing", "AttributeError: 'str' object has no attribute 'nothing'"),
    "no key": ("return {}['a']", "KeyError: 'a'"),
    "no sum": ("return arch + 1", 'TypeError: can only concatenate str (not "int") to str'),
    "no Python": ("retrn arch", "SyntaxError: invalid syntax"),
}


@pytest.mark.parametrize(("body", "message"), CONFIGS.values(), ids=CONFIGS)
def test_error_in_a_config_file_names_its_line(monkeypatch, tmp_path, capsys, body, message):
    """Whoever wrote the file needs no log."""
    (tmp_path / "mine.py").write_text(f"def get_config(arch='small'):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=given)
    monkeypatch.setattr(flags, "FLAGS", given)
    monkeypatch.setattr(sys, "argv", ["command", "--config=mine.py"])
    with pytest.raises(SystemExit, match="1"), cli._clear_errors():
        cli._parse_flags(sys.argv, {})
    assert capsys.readouterr().err.startswith(f"error: {message} (mine.py, line 2)")


def from_the_package(text):
    """Raises as this package's modules do what a text says."""
    exec(compile(text, cli._PACKAGE + "module.py", "exec"))


SLIPS = ["{}['measured']", "int('twelve')", "a, b = 1, 2, 3", "raise ValueError(int('twelve'))"]


@pytest.mark.parametrize("text", SLIPS)
def test_slip_in_this_package_is_not_taken_for_a_message(run_here, monkeypatch, tmp_path, text):
    """These are KeyErrors and ValueErrors, too, and would name no file."""
    (tmp_path / "module.py").write_text(f"{text}\n")
    monkeypatch.setattr(cli, "_PACKAGE", f"{tmp_path}{os.sep}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, err = run_here(lambda argv: from_the_package(text))
    assert code == 1 and err.startswith(("error: KeyError: ", "error: ValueError: "))
    assert err.count("\n") == 1 and str(os.getpid()) in err and len(list(tmp_path.glob("*.log"))) == 1


def test_message_is_told_where_the_source_is_not_at_hand(run_here):
    done = run_here(lambda argv: from_the_package("raise \\\n    ValueError(\n'a thing')"))
    assert done == (1, "", "error: a thing\n")


def test_unforeseen_errors_line_is_short(run_here, monkeypatch, tmp_path):
    """XLA's have hundreds of lines, and some a line of megabytes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, err = run_here(raising(RuntimeError("x" * 5000 + "\nsecond")))
    assert code == 1 and len(err) < 600 and err.count("\n") == 1
    (log,) = tmp_path.glob("*.log")
    assert "second" in log.read_text()


def test_unforeseen_error_is_told_where_no_log_can_be_written(run_here, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null/nowhere")
    code, _, err = run_here(raising(RuntimeError("a thing")))
    assert code == 1 and err.startswith("error: RuntimeError: a thing ")
    assert err.endswith("; --debug prints where it came from\n")


@pytest.mark.parametrize("mark", ["\n", "\u2028", "\x85", "\v"])
def test_a_file_name_cannot_write_the_error_line(mark):
    done = command(
        f"raise FileNotFoundError('no such file: a{mark.encode('unicode_escape').decode()}all is well')"
    )
    assert done.stderr.startswith("error: no such file: a") and done.stderr.count("\n") == 1
