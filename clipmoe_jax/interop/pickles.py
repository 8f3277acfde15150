"""Pickles of strangers, read by Python's own reader with limits.

A tuple may hold another twice, that one a third twice, and so on: a few bytes make one that nobody can hash
or show. Keys of a dict that are no text may all have one hash, or fill the places that others are looked for
in. Pickle's reader in C also makes room for as many values as a pickle says that it has.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

MOST_TUPLES = 10_000  # in a tuple, one counted each time that it comes; a state dict's hold one or two
MOST_KEYS, LONGEST_KEY = 10_000, 10  # that are no text, an optimizer's numbers of tensors; and of a tuple
MOST_COPIED = 2**24  # characters and values that calls make others of
MOST_NAMES, LONGEST_NAME = 200_000, 1000  # of what is in dicts in dicts


_Reader: Any = pickle._Unpickler  # its type is that of the one in C, which lacks the methods


class Unpickler(_Reader):
    """Reads a pickle. Raises UnpicklingError for a tuple of more than MOST_TUPLES tuples, and for more than
    MOST_KEYS keys that are no text."""

    dispatch = dict(_Reader.dispatch)

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="bytes")  # of Python 2's text, which a state dict has none of
        # By id: how many tuples are in it, and the tuple itself, so that it stays.
        self._tuples: dict[int, tuple[int, tuple]] = {}
        self._num_keys = 0

    def count_tuples(self) -> None:
        """Counts the tuples in the one that was made last."""
        made = self.stack[-1]
        count = 1 + sum(self._tuples[id(part)][0] for part in made if id(part) in self._tuples)
        if count > MOST_TUPLES:
            raise pickle.UnpicklingError(f"a tuple holds more than {MOST_TUPLES:,} tuples")
        self._tuples[id(made)] = count, made

    def count_keys(self, keys: Iterable[Any]) -> None:
        """Counts keys of dicts and values of sets, before they are hashed."""
        others = [key for key in keys if not isinstance(key, str)]
        self._num_keys += len(others)
        if self._num_keys > MOST_KEYS:
            raise pickle.UnpicklingError(f"more than {MOST_KEYS:,} keys are no text")
        for key in others:
            if isinstance(key, tuple) and (
                len(key) > LONGEST_KEY or any(isinstance(part, tuple) for part in key)
            ):
                raise pickle.UnpicklingError("a key is a long tuple, or one of tuples")


def _counting(load: Callable[[Any], None]) -> Callable[[Unpickler], None]:
    def load_tuple(unpickler: Unpickler) -> None:
        load(unpickler)
        unpickler.count_tuples()

    return load_tuple


def _counting_keys(load: Callable[[Any], None], keys: slice) -> Callable[[Unpickler], None]:
    def load_keys(unpickler: Unpickler) -> None:
        unpickler.count_keys(unpickler.stack[keys])
        load(unpickler)

    return load_keys


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    Unpickler.dispatch[_code[0]] = _counting(Unpickler.dispatch[_code[0]])
for _code, _keys in (
    (pickle.SETITEM, slice(-2, -1)),
    (pickle.SETITEMS, slice(None, None, 2)),
    (pickle.DICT, slice(None, None, 2)),
    (pickle.ADDITEMS, slice(None)),
    (pickle.FROZENSET, slice(None)),
):
    Unpickler.dispatch[_code[0]] = _counting_keys(Unpickler.dispatch[_code[0]], _keys)


def check_pickle(file: IO[bytes]) -> None:
    """Reads a pickle to its end and makes nothing of it.

    Raises UnpicklingError if it is damaged, has more than `Unpickler` reads, or does what no state dict's
    does: PyTorch would call `bytearray`, which makes gigabytes of a number, and encodings that take minutes.
    """
    try:
        _Checker(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise pickle.UnpicklingError(str(error) or type(error).__name__) from error


class _StandIn:
    """In place of what a pickle makes by a call, or of a storage."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


# What the pickles of tensors, state dicts, and optimizers' and schedules' states call.
_MAKES_TENSORS = (
    *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"),
    *("_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"),
)
_CALLS = {
    *(("torch._utils", name) for name in _MAKES_TENSORS),
    *(("torch", "device"), ("torch.serialization", "_get_layout")),
    *(("builtins", "complex"), ("__builtin__", "complex")),
}
_COPIES = {
    *(("torch", "Size"), ("collections", "OrderedDict"), ("collections", "Counter")),
    *(("builtins", "set"), ("__builtin__", "set")),
}


class _Checker(Unpickler):
    dispatch = dict(Unpickler.dispatch)

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self._num_copied = 0

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands in for a function; for anything else its name, which cannot be called."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) in _COPIES:
            return self._copy
        return _StandIn if (module, name) in _CALLS else name

    def count_copied(self, value: Any) -> None:
        """Counts what is in a value that comes to be in another, too."""
        self._num_copied += len(value)
        if self._num_copied > MOST_COPIED:
            raise pickle.UnpicklingError(f"its calls copy more than {MOST_COPIED:,} values")

    def _copy(self, values: Any = ()) -> _StandIn:
        self.count_copied(values)
        self.count_keys(values)
        return _StandIn()

    def _encode(self, text: str, encoding: str) -> _StandIn:
        if encoding != "latin1":  # the one that bytes are saved by
            raise pickle.UnpicklingError("a text in another encoding than Latin-1")
        self.count_copied(text)
        return _StandIn()

    def load_build(self) -> None:
        self.count_copied(self.stack[-1])
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

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
