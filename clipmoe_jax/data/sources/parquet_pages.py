"""Sums what the pages of a Parquet file expand to, by their own headers.

The footer says it too, but a page is expanded to what its header says. Headers are structs in Thrift's
compact protocol, read as Thrift does (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md).
"""

from typing import BinaryIO

EXPANDED_SIZE, PACKED_SIZE = 2, 3  # fields of a page's header
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(14)
BYTES = {STOP: 0, TRUE: 1, FALSE: 1, BYTE: 1, DOUBLE: 8, UUID: 16}  # of a value
MOST_NESTED = 200  # values in values; Thrift takes 64


class _DamagedError(ValueError):
    """Bytes that Thrift cannot read."""


def expanded_bytes(file: BinaryIO, start: int, end: int) -> int:
    """Returns what the pages between two places of a file expand to: those before the first damaged one, as
    none behind it is read."""
    expanded = 0
    while start < end:
        file.seek(start)
        try:
            sizes = _read_struct(file, 0)
        except _DamagedError:
            break
        if min(sizes.get(EXPANDED_SIZE, -1), sizes.get(PACKED_SIZE, -1)) < 0:
            break
        expanded += sizes[EXPANDED_SIZE]
        start = file.tell() + sizes[PACKED_SIZE]
    return expanded


def _read_struct(file: BinaryIO, depth: int) -> dict[int, int]:
    """Reads a struct; returns its fields of 32 bits by their numbers."""
    fields, number = {}, 0
    while (header := _byte(file)) & 15:
        kind, step = header & 15, header >> 4
        number = (number + step if step else _signed(_number(file))) & 0xFFFF
        if kind == I32:
            fields[number] = _signed(_number(file))
        elif kind not in (TRUE, FALSE):  # the value of such a field is in its header
            _skip(file, kind, depth + 1)
    return fields


def _skip(file: BinaryIO, kind: int, depth: int) -> None:
    """Passes over a value."""
    if depth > MOST_NESTED:
        raise _DamagedError
    if kind in BYTES:
        file.seek(BYTES[kind], 1)
    elif kind in (I16, I32, I64):
        _number(file)
    elif kind == BINARY:
        file.seek(_length(file), 1)
    elif kind in (LIST, SET):
        header = _byte(file)
        _skip_all(file, header >> 4 if header >> 4 < 15 else _length(file), (header & 15,), depth)
    elif kind == MAP:
        if length := _length(file):
            kinds = _byte(file)
            _skip_all(file, length, (kinds >> 4, kinds & 15), depth)
    elif kind == STRUCT:
        _read_struct(file, depth)
    else:
        raise _DamagedError


def _skip_all(file: BinaryIO, length: int, kinds: tuple[int, ...], depth: int) -> None:
    """Passes over the values of a list or a map."""
    if all(kind in BYTES for kind in kinds):
        file.seek(length * sum(map(BYTES.__getitem__, kinds)), 1)
        return
    for _ in range(length):
        for kind in kinds:
            _skip(file, kind, depth + 1)


def _byte(file: BinaryIO) -> int:
    if not (read := file.read(1)):
        raise _DamagedError
    return read[0]


def _length(file: BinaryIO) -> int:
    if (length := _number(file)) >= 2**31:
        raise _DamagedError
    return length


def _number(file: BinaryIO) -> int:
    """Returns the lowest 32 bits of a whole number: seven bits in each byte, the lowest first."""
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        number |= (byte & 127) << shift
        if byte < 128:
            return number & 0xFFFFFFFF
    raise _DamagedError


def _signed(number: int) -> int:
    """Returns 0, -1, 1, -2, … for 0, 1, 2, 3, …"""
    return number >> 1 ^ -(number & 1)
