"""Name tables: one description of a foreign checkpoint format, used in both directions.

A row gives the place of a foreign tensor in our param tree, and the layout of its axes:

    Row("transformer.resblocks.{i}.experts.{e}.c_fc.weight", "text/resblocks_{i}/moe/c_fc/kernel[{e}]",
    LINEAR)

`{i}` and other lower-case fields stand for numbers. Our name may end in `[{e}]`, the e-th slice of a stacked
leaf, or in `[q]`, `[k]`, `[v]`, a third of a fused projection's last axis. Rows with the same foreign name
differ in the number of its axes. All arrays are numpy's.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipmoe_jax.interop.tensor_files import Tensors

Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """Permutations of axes from the foreign layout to ours and back; None leaves an array as it is."""

    to_ours: tuple[int, ...] | None
    to_foreign: tuple[int, ...] | None

    def has_axes(self, number: int) -> bool:
        """Returns whether arrays of this layout have so many axes; without permutations any number fits."""
        return self.to_ours is None or len(self.to_ours) == number


SAME = Layout(None, None)
BIAS = Layout((0,), (0,))  # (out,)
STACKED_BIAS = Layout((0, 1), (0, 1))  # (E, out)
LINEAR = Layout((1, 0), (1, 0))  # (out, in) <-> (in, out)
STACKED_LINEAR = Layout((0, 2, 1), (0, 2, 1))  # (E, out, in) <-> (E, in, out)
CONV = Layout((2, 3, 1, 0), (3, 2, 0, 1))  # (out, in, H, W) <-> (H, W, in, out)


class Row(NamedTuple):
    """A foreign tensor's name, its name in our param tree, and its layout."""

    foreign: str
    ours: str
    layout: Layout = SAME


def to_ours(
    table: Sequence[Row], tensors: Tensors, finish: Callable[[str, np.ndarray], Any]
) -> dict[str, Any]:
    """Converts foreign tensors to {our name: finish(our name, array)}.

    Takes the tensors out of the dict. Reads those of one leaf at a time and frees them when it is finished.
    Raises ValueError for a name that no row has; `check_shapes` names all of them.
    """
    patterns = [(_pattern(row.foreign), row) for row in table]
    parts: dict[str, dict[str, tuple[str, Layout]]] = {}
    for name, tensor in tensors.items():
        rows = (each for each in patterns if each[1].layout.has_axes(len(tensor.shape)))
        matches = ((pattern.fullmatch(name), row) for pattern, row in rows)
        fields, row = next(((match.groupdict(), row) for match, row in matches if match), ({}, None))
        if row is None:
            raise ValueError(f"the format has no name {name}")
        ours, part = _split(row.ours.format(**fields))
        parts.setdefault(ours, {})[part] = name, row.layout

    def size(ours: str) -> int:
        return sum(math.prod(tensors[name].shape) for name, _ in parts[ours].values())

    leaves = {}
    for ours in sorted(parts, key=size, reverse=True):  # large leaves first, while memory is still free
        sources = parts[ours]
        pieces = {
            part: _permuted(tensors.pop(name).read(), layout.to_ours)
            for part, (name, layout) in sources.items()
        }
        leaves[ours] = finish(ours, _join(pieces))
    return leaves


def check_shapes(
    table: Sequence[Row], expected: Mapping[str, tuple[int, ...]], tensors: Tensors, source: str
) -> None:
    """Raises ValueError naming the tensors that are missing, unexpected or of another shape.

    expected: {our name: shape} of the architecture. The message has the file's own names, at most ten of each
    kind.
    """
    # Views of a single zero have a shape and take no memory.
    stand_ins = {name: np.broadcast_to(np.float32(0), shape) for name, shape in expected.items()}
    wanted = {name: array.shape for name, array in to_foreign(table, stand_ins)[0].items()}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            f"{name} is {tensors[name].shape}, not {shape}"
            for name, shape in wanted.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:10])}" + (", …" if len(names) > 10 else "")
            for kind, names in problems.items()
            if names
        )
        raise ValueError(f"{source} does not fit the architecture that it says it has: {lists}")


def to_foreign(table: Sequence[Row], arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """Converts {our name: array} to {foreign name: array}. Returns also our names that no row has."""
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
    """Splits `name[part]` into (name, part); part is "" if there is none."""
    name, _, part = ours.partition("[")
    return name, part.removesuffix("]")


def _permuted(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return array if axes is None else array.transpose(axes)


def _join(pieces: dict[str, np.ndarray]) -> np.ndarray:
    """Joins {part: array} of one leaf. The inverse of `_pieces`."""
    if "" in pieces:
        return pieces[""]
    if "q" in pieces:
        return np.concatenate([pieces[part] for part in "qkv"], axis=-1)
    return np.stack([pieces[str(e)] for e in range(len(pieces))])


def _pieces(array: np.ndarray, part: str) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Yields the pieces of one of our arrays that a row names, each with the number for the row's field."""
    if part == "":
        yield {}, array
    elif part in ("q", "k", "v"):
        yield {}, np.split(array, 3, axis=-1)["qkv".index(part)]
    else:
        for e, piece in enumerate(array):
            yield {part.strip("{}"): e}, piece
