"""Pickles of strangers, read by Python's own reader with a limit on tuples.

A tuple may hold another twice, that one a third twice, and so on: a few bytes make one that nobody can hash
or show. Pickle's reader in C also makes room for as many values as a pickle says that it has.
"""

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

MOST_TUPLES = 10_000  # in a tuple, one counted each time that it comes; a state dict's hold one or two
MOST_NAMES, LONGEST_NAME = 200_000, 1000  # of what is in dicts in dicts


_Reader: Any = pickle._Unpickler  # its type is that of the one in C, which lacks the methods


class Unpickler(_Reader):
    """Reads a pickle. Raises UnpicklingError for a tuple of more than MOST_TUPLES tuples."""

    dispatch = dict(_Reader.dispatch)

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="bytes")  # of Python 2's text, which a state dict has none of
        self._tuples: dict[
            int, tuple[int, tuple]
        ] = {}  # by id: how many are in it, and itself, so that it stays

    def count_tuples(self) -> None:
        """Counts the tuples in the one that was made last."""
        made = self.stack[-1]
        count = 1 + sum(self._tuples[id(part)][0] for part in made if id(part) in self._tuples)
        if count > MOST_TUPLES:
            raise pickle.UnpicklingError(f"a tuple holds more than {MOST_TUPLES:,} tuples")
        self._tuples[id(made)] = count, made


def _counting(load: Callable[[Any], None]) -> Callable[[Unpickler], None]:
    def load_tuple(unpickler: Unpickler) -> None:
        load(unpickler)
        unpickler.count_tuples()

    return load_tuple


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    Unpickler.dispatch[_code[0]] = _counting(Unpickler.dispatch[_code[0]])


def check_pickle(file: IO[bytes]) -> None:
    """Reads a pickle to its end and makes nothing of it.

    Raises UnpicklingError if it is damaged, has more tuples in one than `Unpickler` reads, or does what no
    state dict's does.
    """
    try:
        _Checker(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


class _StandIn:
    """In place of any class, function or storage that a pickle names."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Checker(Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()


def named_values(content: Any, inside: Callable[[Any], Mapping[Any, Any] | None]) -> dict[str, Any]:
    """Returns {name: value} of what is in dicts in dicts, `a.b` for b in a, in their order.

    inside: returns the dict that a value is, None if it is none. What has no text for a key, or a long one,
    is left out. Raises ValueError for dicts that have no end, or share others too often.
    """
    values, waiting, count = {}, [("", content)], 0
    while waiting:
        name, value = waiting.pop()
        if (found := inside(value)) is None:
            values[name] = value
            continue
        keys = [key for key in found if isinstance(key, str) and len(key) <= LONGEST_NAME]
        if (count := count + len(keys)) > MOST_NAMES or len(name) > LONGEST_NAME:
            raise ValueError(f"its dicts are nested without end, or have more than {MOST_NAMES:,} names")
        prefix = f"{name}." if name else ""
        waiting += [(prefix + key, found[key]) for key in reversed(keys)]
    return values
