"""What is timed, and how a failure of it is told; without JAX or PyTorch."""

import argparse
import math
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

LEAST_SECONDS = 0.1  # of a measurement: quick calls are repeated, one behind the other
OUT_OF_MEMORY = "out of memory"
SIGNS_OF_IT = ("resource_exhausted", "out of memory", "outofmemory", "can't allocate memory", "memoryerror")


def moe_parser(description: str) -> argparse.ArgumentParser:
    """The sizes of a MoE block: of the README's table unless told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--selected", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    return parser


class Program(NamedTuple):
    """What is timed: `wait(call())`. `call` may return before the work is done, `wait` does not.

    flops: of one call, by models/flops.py. pairs: that one call takes, 0 where that means nothing. against:
    names of the programs that it is compared with.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    flops: float
    pairs: int = 0
    against: tuple[str, ...] = ()


def prepare(build: Callable[[], Program]) -> tuple[tuple[Program, int] | None, dict[str, Any]]:
    """Builds a program and calls it twice, the second time to see how often to call it in a measurement.

    Returns (program, how often), None if it does not run; and what to tell of it, an "error" if it does not.
    """
    began = time.perf_counter()
    try:
        program = build()
        program.wait(program.call())
        told = {"first_call_s": time.perf_counter() - began}
        seconds = seconds_of(program, 1)
    except Exception as error:
        return None, failure(error)
    told |= {"flops": program.flops, "pairs": program.pairs, "against": program.against}
    return (program, math.ceil(LEAST_SECONDS / max(seconds, 1e-6))), told


def measure(prepared: tuple[Program, int]) -> dict[str, Any]:
    """{"seconds": of one call}, or an "error"."""
    try:
        return {"seconds": seconds_of(*prepared)}
    except Exception as error:
        return failure(error)


def seconds_of(program: Program, repeats: int) -> float:
    """Seconds of one call, of several behind one another."""
    began = time.perf_counter()
    for _ in range(repeats):
        result = program.call()
    program.wait(result)
    return (time.perf_counter() - began) / repeats


def failure(error: Exception) -> dict[str, str]:
    """{"error": a line}; anything but a lack of memory also goes to stderr in full."""
    text = f"{type(error).__name__}: {error}"
    if any(sign in text.lower() for sign in SIGNS_OF_IT):
        return {"error": OUT_OF_MEMORY}
    traceback.print_exception(error)
    return {"error": text.splitlines()[0]}
