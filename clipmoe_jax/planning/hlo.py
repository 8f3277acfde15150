"""Reads the text of a compiled program (`compiled.as_text()`): instructions, their FLOPs and their bytes."""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# They start no kernel: names for what is there, and the ends of what another instruction began.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"),
    *("copy-done", "async-done", "async-update", "slice-done", "opt-barrier", "add-dependency"),
}
SLICES = {"dynamic-slice", "slice", "gather"}  # they read no more than they return
ALLOCATIONS = {"AllocateBuffer"}  # of custom calls


class Array(NamedTuple):
    """A value. layout: the order of its dimensions, on a TPU also tiles and the memory it lies in."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> float:
        """Returns what a kernel moves to read or write all of it: whole tiles, and nothing where it lies in a
        TPU's own memory."""
        if "S(" in self.layout:
            return 0.0
        dims = list(self.dims)
        if tiled := re.match(r"\{([\d,]*):T\(([\d,]+)\)", self.layout):
            axes, sizes = (map(int, re.findall(r"\d+", numbers)) for numbers in tiled.groups())
            for axis, size in zip(axes, reversed([*sizes]), strict=False):  # the innermost first
                dims[axis] = math.ceil(dims[axis] / size) * size
        bits = re.search(r"\d+", self.dtype)
        size = int(bits[0]) / 8 if bits else self.dtype == "pred"  # tokens have none
        return math.prod(dims) * size


class Instruction(NamedTuple):
    """One line. arrays: of its result, several of a tuple. attributes: what follows its operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> float:
        """Returns the bytes of its result."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def num_values(self) -> int:
        """Returns the values of its first array."""
        return math.prod(self.arrays[0].dims)

    def attribute(self, pattern: str) -> str:
        """Returns the group of a pattern in its attributes, "" if there is none."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def numbers(self, name: str) -> list[int]:
        """Returns a list of numbers among its attributes: name={1,2} or "name":["1","2"]."""
        return [int(n) for n in re.findall(r"\d+", self.attribute(rf'{name}"?[=:] ?[{{\[]([^}}\]]*)'))]

    @property
    def target(self) -> str:
        """Returns the library function or kernel that a custom call names."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def op_name(self) -> str:
        """Returns where in the traced program it comes from."""
        return self.attribute(r'op_name="((?:[^"\\]|\\.)*)"')

    @property
    def callees(self) -> list[str]:
        """Returns the computations that it names."""
        pattern = r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
        return [
            name for names in re.findall(pattern, self.attributes) for name in re.findall(r"[\w.\-]+", names)
        ]

    @property
    def trip_count(self) -> int:
        """Returns the turns of a loop that the compiler knows, 0 if it does not."""
        return int(self.attribute(r'known_trip_count":\{"n":"(\d+)"') or 0)


class Program(NamedTuple):
    """computations: their instructions by name, in order; `entry` is the one that runs."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def flops(self, instruction: Instruction, of: dict[str, Instruction]) -> float:
        """Returns the FLOPs of the products that an instruction of a computation computes."""
        if instruction.opcode == "fusion":
            [callee] = (self.computations[name] for name in instruction.callees)
            return sum(self.flops(inner, callee) for inner in callee.values())
        if instruction.opcode == "convolution":
            return _convolution_flops(
                instruction, *(of[name].arrays[0].dims for name in instruction.operands[:2])
            )
        if instruction.opcode == "dot" or instruction.target.startswith("__cublas$"):
            dims = of[instruction.operands[0]].arrays[0].dims
            summed = instruction.numbers("lhs_contracting_dim(?:ension)?s")
            return 2.0 * instruction.num_values * math.prod(dims[i] for i in summed)
        if instruction.opcode == "custom-call":
            operands = [array.dims for name in instruction.operands for array in of[name].arrays]
            return sum(_grouped_flops(operands, array.dims) for array in instruction.arrays[:1])
        return 0.0

    def traffic(self, instruction: Instruction, of: dict[str, Instruction]) -> float:
        """Returns the bytes that an instruction reads and writes: of what it slices or updates in place only
        the slice."""
        operands = [of[name] for name in instruction.operands]
        if instruction.opcode != "fusion":
            read = sum(_read(instruction, operand.name, operand.num_bytes, {}) for operand in operands)
            return read + _written(instruction, of, _results(instruction))
        [callee] = (self.computations[name] for name in instruction.callees)
        users: dict[str, list[Instruction]] = {}
        for inner in callee.values():
            for name in dict.fromkeys(inner.operands):
                users.setdefault(name, []).append(inner)
        parameters = [inner for inner in callee.values() if inner.opcode == "parameter"]
        parameters.sort(key=lambda inner: int(inner.operands[0]))
        read = 0.0
        for operand, parameter in zip(operands, parameters, strict=True):
            parts = (
                _read(user, parameter.name, operand.num_bytes, users)
                for user in users.get(parameter.name, [])
            )
            read += min(operand.num_bytes, sum(parts))
        [root] = (inner for inner in callee.values() if inner.is_root)
        return read + _written(root, callee, instruction.arrays)


def parse(text: str) -> Program:
    """Returns the program of an optimised HLO text. Raises ValueError if it has no entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = computations[opened[2]] = {}
            entry = opened[2] if opened[1] else entry
        elif " = " in line and line.startswith(" "):
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY computation")
    return Program(computations, entry)


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line)
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opcode, _, _ = right.partition("(")
    right = right[len(opcode) :]
    end = _closing(right)
    inside = right[1 : end - 1]
    operands = [inside] if opcode == "parameter" else re.findall(r"%([\w.\-]+)", inside)
    arrays = tuple(_arrays(shape))
    root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").removeprefix("%")
    return Instruction(name, opcode, arrays, tuple(operands), right[end:], root)


def _closing(text: str) -> int:
    """Returns the place behind the bracket that closes the one with which a text begins."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"a bracket is not closed in {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        sizes = tuple(int(size) for size in re.findall(r"\d+", dims))
        yield Array(dtype, sizes, layout)


def _read(user: Instruction, name: str, whole: float, users: dict[str, list[Instruction]]) -> float:
    """Returns the bytes that an instruction, and within a fusion those after it, read of an operand."""
    if user.opcode == "bitcast":
        return sum(_read(after, user.name, whole, users) for after in users.get(user.name, []))
    if name == user.operands[0] and user.opcode == "dynamic-update-slice":
        return 0
    if name == user.operands[0] and user.opcode in SLICES:
        return min(whole, user.num_bytes)
    return whole


def _written(root: Instruction, of: dict[str, Instruction], arrays: Iterable[Array]) -> float:
    """Returns the bytes that are written for a root's result. arrays: where they go."""
    if root.opcode == "bitcast":
        return _written(of[root.operands[0]], of, arrays)
    if root.opcode == "tuple":
        places = iter(arrays)
        parts = (of[name] for name in root.operands)
        return sum(_written(part, of, [next(places) for _ in part.arrays]) for part in parts)
    whole = sum(array.num_bytes for array in arrays)
    return min(whole, of[root.operands[1]].num_bytes) if root.opcode == "dynamic-update-slice" else whole


def _results(instruction: Instruction) -> tuple[Array, ...]:
    """Returns the arrays that it writes: a library's come before its scratch memory, a copy's before what it
    copies."""
    if instruction.opcode.endswith("-start"):
        return instruction.arrays[:1]
    has_scratch = instruction.target.startswith("__cu") and len(instruction.arrays) > 1
    return instruction.arrays[: -1 if has_scratch else None]


def _grouped_flops(operands: list[tuple[int, ...]], result: tuple[int, ...]) -> float:
    """Returns the FLOPs of a kernel whose shapes are those of `lax.ragged_dot` or its gradient, else 0: rows
    (R, K) of groups by the groups' matrices (E, K, N), in any order of K and N, to (R, N); (R, K) by (R, N)
    to (E, K, N)."""
    for rows, others in itertools.permutations(operands, 2):
        ranks = len(rows), len(others), len(result)
        if ranks == (2, 3, 2) and rows[0] == result[0]:
            if sorted(others[1:]) == sorted((rows[1], result[1])):
                return 2.0 * math.prod(rows) * result[1]
        if ranks == (2, 2, 3) and rows[0] == others[0] and (rows[1], others[1]) == result[1:]:
            return 2.0 * math.prod(rows) * others[1]
    return 0.0


def _convolution_flops(instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """Returns the FLOPs of a convolution, a TPU's form of every product, without those that padding or
    dilation make zero."""
    of_lhs, of_rhs, of_out = (
        instruction.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)").replace("->", "_").split("_")
    )
    out, flops = instruction.arrays[0].dims, 2.0
    flops *= out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
    fields = dict(re.findall(r"(\w+)=([\dx_\-]+)", instruction.attribute(r"window=\{([^}]*)\}")))
    for i, label in enumerate(sorted(set(of_lhs) & set("0123456789"))):
        stride, lhs_dilate, rhs_dilate = (
            int(fields[name].split("x")[i]) if name in fields else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low = int(fields["pad"].split("x")[i].split("_")[0]) if "pad" in fields else 0
        sizes = lhs[of_lhs.index(label)], rhs[of_rhs.index(label)], out[of_out.index(label)]
        flops *= _num_valid(*sizes, stride, lhs_dilate, rhs_dilate, low)
    return flops


@functools.cache
def _num_valid(
    size: int, window: int, out: int, stride: int, dilate: int, window_dilate: int, low: int
) -> int:
    """Returns how many pairs of an output and a window's position meet a value, in one spatial dimension."""
    places = (o * stride + w * window_dilate - low for o in range(out) for w in range(window))
    return sum(place % dilate == 0 and 0 <= place < size * dilate for place in places)
