"""Checks of what comes from a stranger's file: single values of any type, and sizes."""

import dataclasses
import errno
import os
import reprlib
from typing import Any

from etils import epath

from clipmoe_jax.core.paths import check_plain_file, in_bucket

EXPANDED, EXPANSION = 2**28, 50  # the bytes that any file may expand to, and how many times its own size
SPARSE, SPARSENESS = 2**20, 10  # a file of more bytes must have a tenth of them on the disk
MAX_BYTES = 2**26  # of a file that is read whole, such as JSON, if nothing else is said


def whole_number(name: str, value: object, most: int, least: int = 1) -> int:
    """Returns a value that is a whole number in a range. Raises ValueError naming it for any other."""
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    shown = reprlib.repr(value)
    raise ValueError(f"{name}={shown} must be a whole number from {least:,} to {most:,}")


def number(name: str, value: object, most: float) -> float:
    """Returns a value that is a number from 0 to `most`. Raises ValueError naming it for any other."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most:
        return value  # NaN compares as False
    raise ValueError(f"{name}={reprlib.repr(value)} must be a number from 0 to {most:g}")


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


def stored_bytes(path: os.PathLike | str) -> int:
    """Returns the bytes of a file without its holes, which are read as zeros and take no room on a disk.

    A device or a pipe has none.
    """
    if in_bucket(path):
        return epath.Path(path).stat().length
    if not os.path.isfile(path):
        return 0
    status = os.stat(path)
    if 512 * status.st_blocks >= status.st_size:  # most files: it has no holes
        return status.st_size
    stored = end = 0
    with open(path, "rb") as file:
        while True:
            try:  # not st_blocks, which some file systems set late or never
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data up to the end
                    return stored
                raise
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            stored += end - start


def check_not_sparse(path: os.PathLike | str, status: os.stat_result | None = None) -> None:
    """Raises ValueError for a large file that is mostly holes: a few bytes of a stranger's would be read as
    terabytes of zeros. status: of the file, if it is known."""
    if in_bucket(path):
        return
    status = status or os.stat(path)
    length, blocks = status.st_size, 512 * status.st_blocks
    if length <= max(SPARSE, SPARSENESS * blocks):  # most files, without looking for holes
        return
    if length > SPARSENESS * (stored := stored_bytes(path)):
        raise ValueError(
            f"{path} has {length:,} bytes and only {stored:,} of them on the disk: copy it again"
        )


def check_size(path: os.PathLike | str, most: int = MAX_BYTES, fix: str = "") -> None:
    """Raises ValueError for a file of more bytes, for a large one that is mostly holes, and for a device or a
    pipe. fix: says what to do about a file that is too large."""
    check_plain_file(path)
    if (length := epath.Path(path).stat().length) > most:
        raise ValueError(f"{path} has {length:,} bytes, of which {most:,} may be read{fix}")
    check_not_sparse(path)


def read_bytes(path: os.PathLike | str, most: int = MAX_BYTES) -> bytes:
    """Returns the contents of a plain file. Raises ValueError as `check_size`."""
    check_size(path, most)
    return epath.Path(path).read_bytes()
