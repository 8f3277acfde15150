"""Parameters of tests: some cells of a grid in every run, the others with --all."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

exhaustive = pytest.mark.exhaustive


def grid(*quick: Any, rest: Iterable[Any] = ()) -> list[Any]:
    """Returns argvalues for `parametrize`: those that always run, and the rest marked as exhaustive.

    A tuple holds a value for each argument, also where there is one argument alone.
    """
    return [*map(_param, quick), *(_param(value, exhaustive) for value in rest)]


def quick(cases: Mapping[str, Any], *names: str) -> list[Any]:
    """Returns the cases of a dict with their names as ids; all but the named ones are exhaustive."""
    if unknown := set(names) - cases.keys():
        raise KeyError(f"no such cases: {sorted(unknown)}")
    return [_param(case, *(() if name in names else (exhaustive,)), id=name) for name, case in cases.items()]


def _param(case: Any, *marks: pytest.MarkDecorator, id: str | None = None) -> Any:
    if hasattr(case, "marks"):  # a pytest.param
        return pytest.param(*case.values, id=case.id, marks=(*case.marks, *marks))
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), id=id, marks=marks)
