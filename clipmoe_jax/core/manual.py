"""The text that --help prints."""

import textwrap
from collections.abc import Iterable
from typing import Any

# What stands for a value, by the type of its flag.
VALUES = {"int": "N", "float": "X", "config object": "CONFIG"}
EXIT_CODES = "Exit codes: 0 done; 1 an error, told in a line; 130 stopped by Ctrl-C."
WIDTH = 100
# In absl's messages: of a flag that has no value and needs one, and of one that may be given several times.
NEEDED = "must have a value other than None"
REPEATED = ";\n    repeat this option"


def manual(text: str, options: Iterable[Any]) -> str:
    """Returns the manual of a command.

    text: what it is for, with examples. options: its absl flags, in the order in which they are described.
    """
    return "\n".join([text.strip(), "", "Options:", "", *map(_option, options), "", _wrapped(EXIT_CODES)])


def _option(flag: Any) -> str:
    head, text = f"--{flag.name}", flag.help
    if flag.boolean:
        head = f"--no{flag.name}" if flag.default else head
    elif choices := getattr(flag.parser, "enum_values", None):
        head += f"={'|'.join(choices)}"
        text = text.removeprefix(f"<{'|'.join(choices)}>: ")  # which absl puts there
    else:
        head += f"={VALUES.get(flag.flag_type(), '…')}"
    if any(NEEDED in validator.message for validator in flag.validators):
        head += "  (required)"
    elif not flag.boolean and flag.default not in (None, "", []):
        default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
        head += f"  (default {default})"
    return f"  {head}\n{_wrapped(text.partition(REPEATED)[0], ' ' * 6)}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
