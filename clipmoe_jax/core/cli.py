"""The command line: parses flags, prints what a command says, and turns errors into one line."""

import contextlib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

from absl import app, flags

from clipmoe_jax.core import artifacts, distributed

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def run(main: Callable[[list[str]], str | None], renamed: Mapping[str, str] | None = None) -> None:
    """Parses the flags, calls main(argv) as absl's app.run does, and prints the text that it returns.

    Errors made for people become one line on stderr and exit code 1: bad flags, unknown config fields, files
    that cannot be opened, and every ValueError or KeyError raised by this package. An error from inside a
    library keeps its stack trace, and so does every error if the environment variable CLIPMOE_DEBUG is set.
    renamed: {config field or flag of an earlier version: what it is now}, to say so where one is set. A run
    that SIGTERM stopped says so and exits with `distributed.EXIT_PREEMPTED`.
    """

    def main_with_clear_errors(argv: list[str]) -> None:
        if argv[1:]:
            _fail(f"unexpected argument {argv[1]!r}: options are written --name=value")
        try:
            with announced_preemption():
                text = main(argv)
        except (ValueError, OSError, KeyError) as error:
            if not _is_for_people(error):
                raise
            _fail(_one_line(error) + _fix(error))
        if text:
            say(text)

    app.run(main_with_clear_errors, flags_parser=functools.partial(_parse_flags, renamed=renamed or {}))


def say(text: str) -> None:
    """Prints text on the console at once, even if stdout is a file."""
    print(text, flush=True)


@contextlib.contextmanager
def announced_preemption() -> Iterator[None]:
    """Prints, on process 0, where a run stopped if SIGTERM stops it in this block."""
    try:
        yield
    except distributed.Preempted as stop:
        if distributed.is_main():
            say(str(stop))
        raise


def mark_flags_parsed() -> None:
    """Lets a library read its own absl flags in a program that did not parse any, such as a notebook.

    Otherwise the library fails, or takes that program's arguments for its own.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _parse_flags(argv: list[str], renamed: Mapping[str, str]) -> list[str]:
    """Parses absl flags and ml_collections' config overrides; returns what is left of argv."""
    try:
        left = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError) as error:
        if "CLIPMOE_DEBUG" in os.environ:
            raise
        text = _one_line(error)
        hint = _renaming(text, renamed)
        is_flag = isinstance(error, flags.UnrecognizedFlagError)
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
    if "CLIPMOE_DEBUG" in os.environ:
        return False
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, OSError) or innermost.f_code.co_filename.startswith(_PACKAGE)


def _one_line(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], Exception):  # ml_collections nests them
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, (flags.Error, OSError)):
        lines = lines[-1:]  # where ml_collections puts a config file's own error, after its trace
    return " ".join(lines) or type(error).__name__


def _fix(error: Exception) -> str:
    """Returns the flag that mends an error, where the error itself knows no flags."""
    if isinstance(error, artifacts.MissingArtifactError) and "stage" in flags.FLAGS:
        return f"; run the same command with --stage={error.stage} first"
    return ""


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
