"""Checks of what comes from a stranger's file: single values of any type, and sizes."""

import dataclasses
import reprlib
from typing import Any

EXPANDED, EXPANSION = 2**28, 50  # the bytes that any file may expand to, and how many times its own size


def whole_number(name: str, value: object, most: int, least: int = 1) -> int:
    """Returns a value that is a whole number in a range. Raises ValueError naming it for any other."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    shown = reprlib.repr(value)
    raise ValueError(f"{name}={shown} must be a whole number from {least:,} to {most:,}")


def number(name: str, value: object, most: float, least: float = 0.0) -> float:
    """Returns a value that is a number in a range. Raises ValueError naming it for any other."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
        return value  # NaN compares as False
    raise ValueError(f"{name}={reprlib.repr(value)} must be a number from {least:g} to {most:g}")


def fields_of(kind: Any, name: str, fields: object) -> dict[str, Any]:
    """Returns a dict of fields that a dataclass has. Raises ValueError naming it if it is none."""
    if not isinstance(fields, dict):
        raise ValueError(f"{name}={reprlib.repr(fields)} must be an object with fields")
    if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{name} has unknown fields: {', '.join(map(reprlib.repr, unknown[:10]))}")
    return fields


def check_expansion(num_bytes: int, expanded: int) -> None:
    """Raises ValueError if files of so many bytes become far more in memory, as zeros do, or one value that
    comes again and again."""
    if expanded > max(EXPANDED, EXPANSION * num_bytes):
        most = f"more than {EXPANSION} times as many"
        raise ValueError(f"its {num_bytes:,} bytes expand to {expanded:,} bytes, {most}")
