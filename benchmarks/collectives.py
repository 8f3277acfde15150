"""Counts the bytes that a compiled program's collectives send, from its text."""

import collections
import math
import re

ITEM_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def sent(compiled: str) -> dict[str, float]:
    """Returns {operation: bytes that a device sends} of a compiled program's collectives, as plans count."""
    num_bytes: dict[str, float] = collections.defaultdict(float)
    computations = _computations(compiled)
    times = _times(computations)
    for name, lines in computations.items():
        for line in lines:
            operation = re.search(
                r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(", line
            )
            if not operation:
                continue
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
            if operation[3] and operation[2] != "all-reduce":  # operands, then results
                shapes = shapes[len(shapes) // 2 :]
            size = sum(ITEM_BYTES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in shapes)
            n = group_size(line.split("replica_groups=")[1])
            if operation[2] == "reduce-scatter":  # whose result is one part
                size *= n
            to_all = 2 if operation[2] == "all-reduce" else 1
            num_bytes[operation[2]] += (times[name] or 1) * size * (n - 1) / n * to_all
    return num_bytes


def _computations(compiled: str) -> dict[str, list[str]]:
    """Returns {name: lines} of a program's computations; the entry's name is ""."""
    computations, name = {}, None
    for line in compiled.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "" if begins[1] else begins[2]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    return computations


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """Returns how often each runs: a loop's body as often as the compiler knows, once where it does not."""
    times = collections.Counter()

    def count(name: str, number: int) -> None:
        times[name] += number
        for line in computations[name]:
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for called in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                count(called, number * (int(trips[1]) if trips else 1))

    count("", 1)
    return times


def group_size(text: str) -> int:
    """Returns the devices of a group: of `{{0,1,2,3},…}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`."""
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", text):
        return int(counted[1])
    sizes, axes = re.match(r"mesh\[(.*?)\].*? \{(.*?)\}", text).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
