"""The command line: parses flags, prints what a command says, and turns errors into one line."""

import contextlib
import dis
import errno
import inspect
import os
import pathlib
import re
import resource
import shlex
import sys
import sysconfig
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from clipmoe_jax.core import artifacts, distributed, paths
from clipmoe_jax.core.errors import SeveralErrors
from clipmoe_jax.core.manual import NEEDED, manual
from clipmoe_jax.core.terminal import (
    MOST_CHARACTERS,
    printable,
    printable_line,
    shortened,
    warning_line,
)

# Where this package lies.
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

# What ml_collections' OSErrors begin with.
_OF_CONFIG_FILES = ("Failed loading config file", "Configuration is not available")
HELP = {"--help", "-help", "-h", "--helpshort"}
MOST_FILES = 2**16  # open at a time: some systems allow a billion, and programs then loop over all of them


def run(main: Callable[[list[str]], str | None], renamed: Mapping[str, str] | None = None) -> None:
    """Parses the flags, calls main(argv) as absl's app.run does, and prints the text that it returns.

    Every error becomes one line on stderr and exit code 1. Errors made for people say it all: bad flags,
    unknown config fields, files that cannot be opened, and every ValueError or KeyError that this package
    raises. Any other was not foreseen: its line names a log file, which has the stack trace. --debug prints
    the stack trace of every error instead. A library's warning is a line, too.
    renamed: {config field or flag of an earlier version: what it is now}, to say so where one is set. A run
    that SIGTERM or Ctrl-C stopped says so and exits with the code of `distributed.Preempted`; a command that
    Ctrl-C ends says so in one line. In flags and in strings of a config, `~` is the home folder where a path
    begins.
    """

    def main_with_clear_errors(argv: list[str]) -> None:
        if argv[1:]:
            _fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
        with _ending_the_others(), _clear_errors():
            for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
                if isinstance(flag.value, ConfigDict):
                    _expand_home(flag.value)
            with announced_preemption():
                text = main(argv)
        if text:
            print(printable(text), flush=True)

    def parse(argv: list[str]) -> list[str]:
        with _clear_errors():
            return _parse_flags(argv, renamed or {})

    _raise_file_limit()
    if "debug" not in flags.FLAGS:
        flags.DEFINE_bool("debug", False, "Prints an error with its stack trace.")
    for flag in flags.FLAGS.get_flags_for_module(__name__):  # or --help would list the command's own alone
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    if HELP & {*sys.argv[1:]}:
        print(_manual(main))
        sys.exit()
    warnings.showwarning = _show_warning
    logging.get_absl_handler().setFormatter(_PrintableLog())
    if not _debugs():
        # An error that ends a read or a write has others behind it, which nobody waits for any more.
        sys.unraisablehook = lambda unraisable: None
    app.run(main_with_clear_errors, flags_parser=parse)


def _config_file(text: str) -> str:
    """Returns --config with the file in place of the name of a config that comes with this package."""
    name, colon, argument = text.partition(":")
    if not re.fullmatch(r"\w+", name):
        return text
    known = {file.stem: file for file in sorted(config_folder().glob("*.py"))}
    if name not in known:
        raise ValueError(
            f"no such config: choose one of {', '.join(known)}, or give a file (configs/demo.py)"
        )
    return f"{known[name]}{colon}{argument}"


def _parse_config(text: str, parse: Callable[[str], Any]) -> Any:
    """Returns the config of FILE or FILE:ARGUMENT, as `parse` of ml_collections, with errors of our own.

    Raises ValueError for a file that is not there or has no `get_config`, and for an argument that this does
    not take, or lacks.
    """
    file, colon, argument = text.partition(":")
    if not os.path.exists(file) or os.path.isdir(file):
        raise ValueError("no such file: give the name of a config (demo), or a file (configs/demo.py)")
    try:
        return parse(text)
    except AttributeError as error:
        if error.name != "get_config":
            raise
        raise ValueError(f"{file} has no get_config(), which returns the config: define it there") from error
    except TypeError as error:
        *_, (frame, _) = traceback.walk_tb((error.__context__ or error).__traceback__)
        if frame.f_code.co_filename != inspect.getfile(parse):  # but in what the call ran
            raise
        fix = f"takes no arguments: leave out :{argument}"
        if not colon:
            fix = f"needs an argument: write {file}:ARGUMENT"
        raise ValueError(f"the config of {file} {fix}") from error


def _manual(main: Callable) -> str:
    """Returns the text of --help for a command: its module's docstring, then its flags."""
    module = main.__globals__
    text = module["__doc__"] or ""
    if sys.argv[0].startswith("clipmoe "):  # as it was called
        text = text.replace(f"python -m {module['__spec__'].name}", sys.argv[0])
    return manual(text, flags.FLAGS.get_key_flags_for_module(sys.argv[0]))


def _raise_file_limit() -> None:
    """Lets this process, and those that it starts, have more files open, where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def say(text: str) -> None:
    """Prints a line on the console at once, even if stdout is a file."""
    print(printable_line(text), flush=True)


def say_aside(text: str) -> None:
    """Prints a line on stderr at once, above any progress bar."""
    tqdm.write(printable_line(text), file=sys.stderr)


@contextlib.contextmanager
def announced_preemption() -> Iterator[None]:
    """Prints, on process 0, where a run stopped if SIGTERM or Ctrl-C stops it in this block."""
    try:
        yield
    except distributed.Preempted as stop:
        if distributed.is_main():
            say(str(stop))
        raise


def config_folder() -> pathlib.Path:
    """Returns where the configs that come with this package lie: in it, or beside it in the repository."""
    installed = pathlib.Path(_PACKAGE, "configs")
    return installed if installed.exists() else installed.parents[1] / "configs"


def define_config_flag() -> None:
    """Defines --config, which every command that works on a config needs."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "The name of a config (demo, vit_b32, …) or a file, with its arguments after a colon: "
        "demo:controls,seeds=3. Every field of it is an option too: --config.mcl.batch_size=400.",
    )
    parser = flags.FLAGS["config"].parser
    parse = parser.parse
    parser.parse = lambda argument: _parse_config(_config_file(argument), parse)
    flags.mark_flag_as_required("config")


def define_model_flags() -> None:
    """Defines a flag for each thing that a file of a model may not say."""
    flags.DEFINE_integer("num_selected_experts", None, "K of a CLIP-MoE whose file does not say it.")
    flags.DEFINE_enum(
        "activation", None, ["quick_gelu", "gelu"], "Of a bare state dict, which does not say it."
    )
    flags.DEFINE_integer("vision_head_width", None, "Of a bare state dict too.")
    flags.DEFINE_integer("text_head_width", None, "Of a bare state dict too.")
    flags.DEFINE_integer("context_length", None, "248 stretches 77 text positions.")
    flags.DEFINE_integer("image_size", None, "Resizes the vision tower's grid of positions.")


def model_options() -> dict[str, Any]:
    """Returns the values of `define_model_flags` as arguments of `interop.load.read_model`."""
    names = ("num_selected_experts", "activation", "vision_head_width", "text_head_width")
    return {name: flags.FLAGS[name].value for name in (*names, "context_length", "image_size")}


def mark_flags_parsed() -> None:
    """Lets a library read its own absl flags in a program that did not parse any, such as a notebook.

    Otherwise the library fails, or takes that program's arguments for its own.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Ends the program with a line for the error, or for Ctrl-C, that ends a block."""
    try:
        yield
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        sys.exit(distributed.EXIT_INTERRUPTED)
    except Exception as error:
        if _debugs():
            raise
        if full := _full_disk(error):
            print(f"error: {printable(full)}", file=sys.stderr, flush=True)
            os._exit(1)  # at once, or what else was being written would complain at length
        _fail(*_lines(error))


@contextlib.contextmanager
def _ending_the_others() -> Iterator[None]:
    """Ends this process at once if it fails alone, so that the others end too.

    Python's own end would first wait minutes for those that wait for this one.
    """
    try:
        yield
    except distributed.Preempted:
        raise
    except BaseException as error:
        if distributed.all_fail():
            raise
        if not isinstance(error, SystemExit):  # which --debug shows
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _show_warning(message: object, category: type, filename: str, lineno: int, *_: Any) -> None:
    """Prints a warning in place of `warnings.showwarning`, which prints what it says as it is."""
    del category
    line = warning_line(message, f"{filename}, line {lineno}")
    tqdm.write(shortened(line, MOST_CHARACTERS), file=sys.stderr)  # above a progress bar


class _PrintableLog(logging.PythonFormatter):
    """Formats what libraries log."""

    def format(self, record: Any) -> str:
        """Returns the text of a record, escaped."""
        return printable(super().format(record))


def _debugs() -> bool:
    """Returns whether --debug is given, also before flags are parsed."""
    return "--debug" in sys.argv or ("debug" in flags.FLAGS and bool(flags.FLAGS["debug"].value))


def _parse_flags(argv: list[str], renamed: Mapping[str, str]) -> list[str]:
    """Parses absl flags and ml_collections' config overrides; returns what is left of argv."""
    try:
        left = flags.FLAGS([paths.with_home(argument) for argument in argv])
    except (flags.Error, AttributeError, KeyError, ValueError) as error:
        if _debugs():
            raise
        if place := _place(error):
            _fail(f"{_summary(error)}{place}{_renaming(str(error), renamed)}")
        text, is_flag = _one_line(error), isinstance(error, flags.UnrecognizedFlagError)
        text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
        text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
        if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
            if "config" in flags.FLAGS:  # which defines the flags of its fields
                _fail("--config is missing: --help describes it")
        if NEEDED in text:
            text = f"{text.split()[1].partition('=')[0]} is missing: --help describes it"
        hint = _renaming(text, renamed)
        if is_flag and text.endswith(" ?"):  # absl's "Did you mean: workdir ?"
            text = f"{text[:-2]}?"
        elif is_flag and not hint:
            hint = ": --help describes those that there are"
        is_field = not is_flag and (hint or isinstance(error, AttributeError))
        _fail(f"no such config field: {text}{hint}" if is_field else text + hint)
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if flag.present > 1 and not isinstance(flag, flags.MultiFlag):  # absl takes the last one
            _fail(f"--{name} is given {flag.present} times and has one value: give it once")
    return left


def _renaming(text: str, renamed: Mapping[str, str]) -> str:
    """Says what fields and flags of an earlier version are now, where the text of an error names some."""
    words = set(re.findall(r"[\w.]+", text.replace("config.", "")))
    new = [f"{old} is now {now}" for old, now in renamed.items() if words & {old, old.rpartition(".")[2]}]
    return f"; {'; '.join(new)}" if new else ""


def _is_for_people(error: Exception) -> bool:
    """Returns whether an error's text is for people: of files, or what a `raise` of this package raised."""
    if not isinstance(error, (ValueError, KeyError)):
        return isinstance(error, OSError)
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not trace or not (code := trace.tb_frame.f_code).co_filename.startswith(_PACKAGE):
        return False
    # The last instruction: int("x") and {}["x"] have no frame of their own.
    return dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _expand_home(config: ConfigDict) -> None:
    """Replaces `~` by the home folder in every string of a config."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_home(value)
        elif isinstance(value, str):
            config[name] = paths.with_home(value)
        elif isinstance(value, (list, tuple)):
            config[name] = type(value)(paths.with_home(v) if isinstance(v, str) else v for v in value)


def _full_disk(error: BaseException | None) -> str:
    """Returns the line that tells of a full disk, if an error comes from one: "" for others.

    Libraries that write with threads of their own raise errors of any type.
    """
    for reason in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)):
        if reason in str(error):
            path = re.search(r"""["'](/[^"']*)""", str(error))
            where = f": {path[1].rstrip('/')}" if path else ""
            return f"{reason}{where}: make room, and start the same command again"
    return _full_disk(error.__cause__ or error.__context__) if error else ""


def _lines(error: Exception) -> list[str]:
    """Returns the lines to print for an error, one for each thing that is wrong."""
    if isinstance(error, SeveralErrors):
        return [" ".join(message.split()) for message in error.messages]
    if _is_for_people(error):
        return [_one_line(error) + _fix(error)]
    return [f"{_summary(error)}{_place(error)}; {_logged(error)}"]


def _summary(error: Exception) -> str:
    """Returns the type and the first line of an error that was not foreseen."""
    if isinstance(error, flags.Error):
        return _one_line(error)
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:300] for line in lines[:1])])


def _place(error: BaseException) -> str:
    """Returns where in a user's own file, such as a config, an error came from; "" if it came from elsewhere.

    A ValueError was made for people there, and needs no place.
    """
    if isinstance(error, flags.Error):  # absl and ml_collections tell a config's own TypeError as theirs
        while error.__context__:
            error = error.__context__
    if isinstance(error, (ValueError, flags.Error)):
        return ""
    libraries = [sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            return ""
        if not file.startswith(("<", *libraries)):
            return f" ({file}, line {line})"
    return ""


def _logged(error: Exception) -> str:
    """Writes the stack trace of an error to a log file of its own; returns where that is, in words."""
    trace = "".join(traceback.format_exception(error))
    try:
        number, name = tempfile.mkstemp(".log", f"clipmoe_jax-{os.getpid()}-")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{shlex.join(sys.argv)}\n{trace}")
    except OSError:
        return "--debug prints where it came from"
    return f"{name} has its stack trace, --debug prints it"


def _one_line(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], Exception):  # ml_collections nests them
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # Not splitlines: a stranger's file name may hold any of the characters that it takes for line breaks.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if isinstance(error, flags.Error) or text.startswith(_OF_CONFIG_FILES):
        # Where ml_collections puts a config file's own error, after its trace.
        lines = [line.removeprefix("ValueError: ") for line in lines[-1:]]
    return " ".join(lines) or type(error).__name__


def _fix(error: Exception) -> str:
    """Returns what mends an error, where the error itself does not say it."""
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"; a process may open {limit:,} here: raise the limit (ulimit -n)"
    if isinstance(error, artifacts.MissingArtifactError) and "stage" in flags.FLAGS:
        return f"; run the same command with --stage={error.stage} first"
    if isinstance(error, distributed.NotStartedError) and "distributed" in flags.FLAGS:
        return ", or add --distributed=off to run it in this process alone"
    return ""


def _fail(*messages: str) -> NoReturn:
    for message in messages:
        print(f"error: {printable(shortened(message, MOST_CHARACTERS))}", file=sys.stderr)
    sys.exit(1)
