"""Both sides of a section of `benchmarks.run`, taking turns."""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.worker import OURS, THEIRS, Died, Worker

Row = dict[str, Any]
_began = time.monotonic()


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"{time.monotonic() - _began:6.0f} s  {text}", file=sys.stderr, flush=True)


class Sides:
    """The processes of a section. device, workload (Workload's fields) and groups: what they said.

    missing: {side: why}, if it cannot be had at all.
    """

    def __init__(self, section: str, sizes: Mapping[str, Any]):
        self._section, self._workers = section, {}
        self.missing: dict[str, str] = {}
        told = self._start(OURS, sizes)
        if OURS in self.missing:
            raise SystemExit(f"{section}: {self.missing[OURS]}")
        self.workload, self.groups = told["workload"], told["groups"]
        self.device = told["device"] | self._start(THEIRS, self.workload).get("device", {})

    def _start(self, side: str, sizes: Mapping[str, Any]) -> dict[str, Any]:
        worker = Worker(side, self._section, dict(sizes))
        try:
            told = worker.ask()
        except Died as died:
            worker.close()
            self.missing[side] = str(died)
            say(f"{self._section}: {side} cannot be measured: {died}")
            return {}
        self._workers[side] = worker
        return told

    def measure(self, group: str, rounds: int) -> list[Row]:
        """Opens a group on both sides, lets its programs take turns, and closes it."""
        told: dict[str, dict[str, Any]] = {}
        side_of: dict[str, str] = {}
        for side in (OURS, THEIRS):
            if side not in self._workers and side not in self.missing:  # it died of an earlier group
                self._start(side, self.workload)
            opened = self._ask(side, "open", group)
            opened = opened if "error" not in opened else {side: opened}
            for name, found in opened.items():
                state = found.get("error") or f"is warm after {found['first_call_s']:.1f} s"
                say(f"{self._section}, {group}: {name} {state}")
                told[name], side_of[name] = found, side
        seconds: dict[str, list[float]] = {name: [] for name, found in told.items() if "error" not in found}
        for number in range(1, rounds + 1):
            for name in list(seconds):
                found = self._ask(side_of[name], "time", name)
                if "error" in found:
                    told[name] = found
                    del seconds[name]
                else:
                    seconds[name].append(found["seconds"])
            shown = ", ".join(f"{name} {1e3 * times[-1]:.2f} ms" for name, times in seconds.items())
            say(f"{self._section}, {group}: round {number} of {rounds}: {shown}")
        for side in (OURS, THEIRS):
            self._ask(side, "close")
        return rows_of(group, told, seconds)

    def _ask(self, side: str, *question: str) -> dict[str, Any]:
        """The answer; an "error" if this side dies of it; nothing if it is not there."""
        if side in self.missing:
            return {}
        if side not in self._workers:
            return {"error": "died before"}
        try:
            return self._workers[side].ask(*question)
        except Died as died:
            self._workers.pop(side).close()
            return {"error": str(died)}

    def close(self) -> None:
        """Ends both processes."""
        for worker in self._workers.values():
            worker.close()


def rows_of(
    group: str, told: Mapping[str, dict[str, Any]], seconds: Mapping[str, Sequence[float]]
) -> list[Row]:
    """A row for each program of a group.

    told: its flops, pairs and what it is compared with, or an error; seconds: of each round, of those that
    ran.
    """
    rows = []
    for name, found in told.items():
        row: Row = {"group": group, "program": name}
        if "error" in found:
            rows.append(row | {"error": found["error"]})
            continue
        median = statistics.median(seconds[name])
        row |= {"milliseconds": 1e3 * median, "seconds": seconds[name]}
        row |= {"first_call_s": found["first_call_s"], "flops": found["flops"]}
        row["tflops"] = found["flops"] / median / 1e12
        if found["pairs"]:
            row["pairs_per_second"] = found["pairs"] / median
        row["times_as_fast_as"] = {
            other: statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))
            for other in found["against"]
            if other in seconds
        }
        rows.append(row)
    return rows
