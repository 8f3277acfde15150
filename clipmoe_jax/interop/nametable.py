"""Name tables: one description of a foreign checkpoint format, used in both directions.

A row says where one foreign tensor lies in our tree and how its axes are laid out:

    Row("transformer.resblocks.{i}.experts.{e}.c_fc.weight", "text/resblocks_{i}/moe/c_fc/kernel[{e}]",
    LINEAR)

`{i}` and other lower-case fields stand for numbers. A name of ours may end in `[{e}]`, the e-th slice of a
stacked leaf, or in `[q]`, `[k]`, `[v]`, a third of a fused projection's last axis. Arrays are numpy
throughout.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """A permutation of axes from the foreign layout to ours; None leaves an array as it is."""

    to_ours: tuple[int, ...] | None
    to_foreign: tuple[int, ...] | None


SAME = Layout(None, None)
LINEAR = Layout((1, 0), (1, 0))  # (out, in) <-> (in, out)
CONV = Layout((2, 3, 1, 0), (3, 2, 0, 1))  # (out, in, H, W) <-> (H, W, in, out)


class Row(NamedTuple):
    foreign: str
    ours: str
    layout: Layout = SAME


def to_ours(table: Sequence[Row], arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """Foreign arrays to {our name: array}, and the foreign names that no row knows.

    Raises ValueError if slices of a stacked leaf are missing.
    """
    patterns = [(_pattern(row.foreign), row) for row in table]
    parts: dict[str, dict[str, np.ndarray]] = {}
    unknown = []
    for name, array in arrays.items():
        for pattern, row in patterns:
            if match := pattern.fullmatch(name):
                ours, part = _split(row.ours.format(**match.groupdict()))
                parts.setdefault(ours, {})[part] = _permuted(array, row.layout.to_ours)
                break
        else:
            unknown.append(name)
    return {ours: _join(ours, pieces) for ours, pieces in parts.items()}, unknown


def to_foreign(table: Sequence[Row], arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """{our name: array} to foreign arrays, and our names that no row knows."""
    patterns = [(_pattern(_split(row.ours)[0]), _split(row.ours)[1], row) for row in table]
    foreign, unknown = {}, []
    for name, array in arrays.items():
        matches = [
            (match.groupdict(), part, row)
            for pattern, part, row in patterns
            if (match := pattern.fullmatch(name))
        ]
        if not matches:
            unknown.append(name)
        for fields, part, row in matches:
            for piece_fields, piece in _pieces(array, part):
                key = row.foreign.format(**fields, **piece_fields)
                foreign[key] = _permuted(piece, row.layout.to_foreign)
    return foreign, unknown


def _pattern(template: str) -> re.Pattern:
    escaped = re.escape(template)
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", escaped))


def _split(ours: str) -> tuple[str, str]:
    """`name[part]` -> (name, part); part is "" where there is none."""
    match = re.fullmatch(r"([^\[]+)(?:\[(.+)\])?", ours)
    return match[1], match[2] or ""


def _permuted(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """The array with its axes in the given order."""
    return array if axes is None else array.transpose(axes)


def _join(name: str, pieces: dict[str, np.ndarray]) -> np.ndarray:
    if "" in pieces:
        return pieces[""]
    if set(pieces) <= set("qkv"):
        if missing := set("qkv") - set(pieces):
            raise ValueError(f"{name}: the checkpoint lacks its part(s) {sorted(missing)} of q, k, v")
        return np.concatenate([pieces[p] for p in "qkv"], axis=-1)
    indices = sorted(int(p) for p in pieces)
    if indices != list(range(len(indices))):
        raise ValueError(f"{name}: the checkpoint has experts {indices}, not 0 to {max(indices)}")
    return np.stack([pieces[str(e)] for e in indices])


def _pieces(array: np.ndarray, part: str):
    """The pieces of one of our arrays that a row names, with the field that each one fills."""
    if part == "":
        yield {}, array
    elif part in ("q", "k", "v"):
        yield {}, np.split(array, 3, axis=-1)["qkv".index(part)]
    else:
        for e, piece in enumerate(array):
            yield {part.strip("{}"): e}, piece
