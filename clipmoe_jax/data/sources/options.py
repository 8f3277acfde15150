"""Options at the end of a line, KIND:PATH?name=value&name=value: one grammar for sources and evaluations."""

from urllib.parse import unquote

MAX_DIGITS = 18  # of a number that counts something


def whole_numbers(source: str, **options: tuple[int | str, int]) -> list[int]:
    """Returns the values of options {name: (value, the least it may be)} as whole numbers.

    Raises:
        ValueError: the source and an option that is none, less, or of more than 18 digits.
    """
    for name, (value, least) in options.items():
        if len(str(value)) > MAX_DIGITS:
            raise ValueError(
                f"source {source}: {name}={str(value)[:MAX_DIGITS]}… has more than {MAX_DIGITS} digits"
            )
        if not str(value).isdecimal() or int(value) < least:
            raise ValueError(f"source {source}: {name}={value} must be a whole number from {least}")
    return [int(value) for value, _ in options.values()]


def parse_options(query: str) -> dict[str, str]:
    """Returns {name: value} of `name=value&name=value`.

    Percent escapes are decoded (%26 is an ampersand), and a plus is a plus.

    Raises:
        ValueError: a part that is not name=value, or an option that is given twice.
    """
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if not name or not value:
            raise ValueError("options are written ?name=value&name=value")
        if name in options:
            raise ValueError(f"option {name} is given twice")
        options[name] = unquote(value)
    return options
