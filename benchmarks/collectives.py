"""Reads what a compiled program's collectives move from its text."""

import collections
import math
import re

ITEM_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def sent(compiled: str) -> dict[str, float]:
    """{operation: bytes that a device sends} of a compiled program's collectives, as the plan counts."""
    found = collections.Counter()
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
            found[operation[2]] += (times[name] or 1) * size * (n - 1) / n * to_all
    return found


def _computations(compiled: str) -> dict[str, list[str]]:
    """{name: lines} of a program's computations; the entry's name is ""."""
    found, name = {}, None
    for line in compiled.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "" if begins[1] else begins[2]
            found[name] = []
        elif name is not None:
            found[name].append(line)
    return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each runs: the body of a loop as often as the compiler knows, once where it does not."""
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
    """Of `{{0,1,2,3},…}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`: devices of a group."""
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", text):
        return int(counted[1])
    sizes, axes = re.match(r"mesh\[(.*?)\].*? \{(.*?)\}", text).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
