"""JSON files, which may be damaged or a stranger's: one way to read them and their fields."""

import json
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from clipmoe_jax.core.checks import MAX_BYTES, read_bytes

_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def read_json(path: epath.Path | pathlib.Path, kind: type = dict, most: int = MAX_BYTES) -> Any:
    """Returns the content of a JSON file.

    kind: of its outermost value. most: bytes. Raises ValueError naming the file and what is wrong in it.
    """
    return parse_json(read_bytes(path, most), str(path), kind)


def parse_json(content: bytes, where: str, kind: type = dict) -> Any:
    """Returns the value of JSON in UTF-8. where: names it in errors. As for `read_json`."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{where} is not valid JSON at {place}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if type(value) is not kind:
        raise ValueError(f"{where} holds {_described(value)}, not {_KINDS[kind]}")
    return value


def field(content: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """Returns a field of an object.

    kind: of its value. where: names the object, if the caller does not. Raises ValueError if it has no such
    field, or of another kind.
    """
    prefix = f"{where}: " if where else ""
    if name not in content:
        raise ValueError(f"{prefix}no field {name!r}")
    if type(content[name]) is not kind:
        raise ValueError(f"{prefix}{name} is {_described(content[name])}, not {_KINDS[kind]}")
    return content[name]


def _described(value: object) -> str:
    """Returns a value in words: its kind if it is large, itself if it is a number or the like."""
    return _KINDS[type(value)] if isinstance(value, (dict, list)) else reprlib.repr(value)
