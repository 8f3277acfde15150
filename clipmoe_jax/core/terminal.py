"""Text that is shown: on a terminal, in a report."""

import re

# What moves a terminal's cursor, changes its colours or turns the direction of text, and what is no text.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns a text to show: control characters, as of strangers' names and captions, become escapes.

    Line breaks and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def shortened(text: str, most: int) -> str:
    """Returns a text of at most `most` characters: without its middle, if it is longer."""
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"
