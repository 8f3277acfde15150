"""Parameters of tests: some cells of a grid in every run, the others with --all."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def grid(*quick: Any, rest: Iterable[Any] = ()) -> list[Any]:
    """Returns argvalues for `parametrize`: those that always run, and the rest marked as exhaustive."""
    return [*quick, *map(_marked, rest)]


def quick(cases: Mapping[str, Any], *names: str) -> list[Any]:
    """Returns the cases of a dict with their names as ids; all but the named ones are exhaustive."""
    if unknown := set(names) - cases.keys():
        raise KeyError(f"no such cases: {sorted(unknown)}")
    return [
        pytest.param(*_values(case), id=name, marks=() if name in names else exhaustive)
        for name, case in cases.items()
    ]


def _marked(value: Any) -> Any:
    if hasattr(value, "marks"):  # a pytest.param
        return pytest.param(*value.values, id=value.id, marks=(*value.marks, exhaustive))
    return pytest.param(*_values(value), marks=exhaustive)


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
