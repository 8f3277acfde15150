"""Text that is shown: on a terminal, in a report."""

import contextlib
import contextvars
import re
import unicodedata
from collections.abc import Iterable, Iterator

# What moves a cursor or changes colours, turns the direction of text, cannot be seen, or is no text.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
MOST_CHARACTERS = 4000  # of an error's line, which may quote a name in a stranger's file
_JOINERS = "\u200c\u200d"  # of these, what emoji and some scripts are written with

_read: contextvars.ContextVar[Iterable[object]] = contextvars.ContextVar("read", default=())


@contextlib.contextmanager
def reading(names: Iterable[object]) -> Iterator[None]:
    """Names what a block reads, such as a file: a warning that a library has of it is told with these."""
    token = _read.set(names)
    try:
        yield
    finally:
        _read.reset(token)


def warning_line(warning: object, place: str) -> str:
    """Returns the line that tells a library's warning. place: where in its code that is."""
    name = " or ".join(map(str, dict.fromkeys(_read.get()))) or place
    return f"warning: {printable_line(name)}: {printable(' '.join(str(warning).split()))}"


def printable(text: str) -> str:
    """Returns a text to show: control characters, as of strangers' names and captions, become escapes.

    Line breaks and tabs stay.
    """
    return re.sub(r"[^ -~\n\t]", _shown, text)


def printable_line(text: object) -> str:
    """Returns a text to show in one line, such as a path: line breaks and tabs become escapes, too."""
    return printable(str(text)).replace("\n", r"\n").replace("\t", r"\t")


def duration(seconds: float) -> str:
    """Returns a time as people say it: 38 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def shortened(text: str, most: int) -> str:
    """Returns a text of at most `most` characters: without its middle, if it is longer."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"


def _shown(match: re.Match) -> str:
    character = match[0]
    is_shown = character in _JOINERS or unicodedata.category(character) not in _HIDDEN
    return character if is_shown else ascii(character)[1:-1]
