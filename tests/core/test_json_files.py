"""JSON that is damaged, or a stranger's: a line that names the file and what is wrong in it."""

import re

import pytest
from etils import epath

from clipmoe_jax.core.json_files import field, parse_json, read_json

DAMAGED = {
    "empty": (b"", "is not valid JSON at line 1 column 1: Expecting value"),
    "cut off": (b'{"a": 1,\n "b"', "is not valid JSON at line 2 column 5: Expecting ':' delimiter"),
    "not text": (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
    "zeros": (bytes(8), "is not valid JSON at line 1 column 1: Expecting value"),
    "nested": (b'{"a":' + b"[" * 200_000, "is not valid JSON: it is nested too deeply"),
    "nested and closed": (b"[" * 200_000 + b"]" * 200_000, "is not valid JSON: it is nested too deeply"),
    "many digits": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
    "a list": (b"[1]", "holds a list, not an object"),
    "a number": (b"7", "holds 7, not an object"),
    "a long string": (b'"' + b"x" * 10**6 + b'"', "holds 'xxx"),
    "null": (b"null", "holds None, not an object"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_named_in_one_line(tmp_path, content, message):
    path = epath.Path(tmp_path / "done.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path} {message}")) as error:
        read_json(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_content_comes_as_it_is(tmp_path):
    path = epath.Path(tmp_path / "ä.json")
    path.write_bytes('\ufeff{"ä": [1, 2.5, null, true]}'.encode())
    assert read_json(path) == {"ä": [1, 2.5, None, True]}
    assert parse_json(b"[1]", "a thing", list) == [1]


FIELDS = {
    "absent": ({}, "c.json: no field 'size'"),
    "a string": ({"size": "3"}, "c.json: size is '3', not a whole number"),
    "a float": ({"size": 3.0}, "c.json: size is 3.0, not a whole number"),
    "a truth": ({"size": True}, "c.json: size is True, not a whole number"),
    "null": ({"size": None}, "c.json: size is None, not a whole number"),
    "an object": ({"size": {"a": 1}}, "c.json: size is an object, not a whole number"),
}


@pytest.mark.parametrize(("content", "message"), FIELDS.values(), ids=FIELDS)
def test_field_is_of_its_kind(content, message):
    assert field({"size": 3}, "size", int, "c.json") == 3
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        field(content, "size", int, "c.json")
