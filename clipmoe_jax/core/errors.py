"""Collects the errors of several checks and raises them together: all that is wrong is told at once."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from clipmoe_jax.core.terminal import MOST_CHARACTERS, printable, reading, shortened


class SeveralErrors(ValueError):
    """Several things that are wrong.

    messages: a line for each.
    """

    def __init__(self, messages: Sequence[str]):
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)


class Errors:
    """The errors of several checks, collected by `of` and raised by `raise_all`.

    A message that comes again is told once, with all that it is of.
    """

    def __init__(self):
        self._errors: dict[str, BaseException] = {}  # by message
        self._whats: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def of(self, what: str = "") -> Iterator[None]:
        """Collects the ValueError or FileNotFoundError that ends a block. what: goes before its message."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            for message in messages_of(error):
                self._errors.setdefault(message, error)
                self._whats.setdefault(message, []).append(what)

    def add(self, message: str) -> None:
        """Collects a message as a ValueError."""
        with self.of():
            raise ValueError(message)

    def any(self) -> bool:
        """Returns whether anything was collected."""
        return bool(self._errors)

    def raise_all(self) -> None:
        """Raises what was collected: one error as it came, with what it is of, several as SeveralErrors."""
        if not self._errors:
            return
        (message, error), *others = self._errors.items()
        if others:
            raise SeveralErrors(list(map(self._told, self._errors))) from error
        if self._told(message) == message and messages_of(error) == (message,):
            raise error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(self._told(message)) from error

    def _told(self, message: str) -> str:
        whats = dict.fromkeys(self._whats[message])
        return message if "" in whats else f"{', '.join(whats)}: {message}"


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Puts what a ValueError that ends a block is of, such as a file, before each of its messages."""
    try:
        yield
    except ValueError as error:
        messages = [f"{what}: {message}" for message in messages_of(error)]
        raise (SeveralErrors(messages) if len(messages) > 1 else ValueError(*messages)) from error


@contextlib.contextmanager
def naming_files(files: Iterable[object]) -> Iterator[None]:
    """Turns any error of a block that computes with what files hold into a ValueError that names them.

    Those of the file system stay, and ValueErrors that name one of the files. Warnings name them, too. files:
    read so far when an error comes.
    """
    try:
        with reading(files):
            yield
    except OSError:
        raise
    except Exception as error:  # of odd values: KeyError, ZeroDivisionError, matplotlib's, …
        names = list(map(str, dict.fromkeys(files)))
        if isinstance(error, ValueError) and any(name in str(error) for name in names):
            raise
        raise ValueError(
            f"{' or '.join(names)} is damaged, or of another version ({type(error).__name__}: "
            f"{first_line(error)[:200]}); --debug tells more"
        ) from error


@contextlib.contextmanager
def printable_errors() -> Iterator[None]:
    """Shortens and escapes the text of an error that ends a block or a function, and of those it comes from.

    It may quote names in a stranger's file. Commands print errors so; this is for functions that Python
    programs call.
    """
    try:
        yield
    except Exception as error:
        found, seen = error, set()
        while found and id(found) not in seen:
            seen.add(id(found))
            found.args = tuple(_shown(part) if isinstance(part, str) else part for part in found.args)
            if isinstance(found, SeveralErrors):
                found.messages = tuple(map(_shown, found.messages))
            found = found.__cause__ or found.__context__
        raise


def _shown(text: str) -> str:
    return printable(shortened(text, MOST_CHARACTERS))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def messages_of(error: BaseException) -> tuple[str, ...]:
    """Returns the lines that tell an error, one for each thing that is wrong."""
    return error.messages if isinstance(error, SeveralErrors) else (str(error),)
