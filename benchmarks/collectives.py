"""Reads what a compiled program's collectives move from its text."""

import collections
import math
import re

ITEM_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "pred": 1}


def sent(compiled: str) -> dict[str, float]:
    """{operation: bytes that a device sends} of a compiled program's collectives, as the plan counts."""
    found = collections.Counter()
    for line in compiled.splitlines():
        operation = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(-start)?\(", line)
        if not operation:
            continue
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
        size = sum(ITEM_BYTES[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in shapes)
        n = group_size(line.split("replica_groups=")[1])
        if operation[2] == "reduce-scatter":  # whose result is one part
            size *= n
        found[operation[2]] += size * (n - 1) / n * (2 if operation[2] == "all-reduce" else 1)
    return found


def group_size(text: str) -> int:
    """Of `{{0,1,2,3},…}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`: devices of a group."""
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.match(r"\[\d+,(\d+)\]", text):
        return int(counted[1])
    sizes, axes = re.match(r"mesh\[(.*?)\].*? \{(.*?)\}", text).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", axes))
