"""Programs in processes of their own that take turns, so that a change of the machine's speed reaches all.

Neither side's threads, libraries or memory are in the other's way, and while one runs the other waits. This
module imports neither JAX nor PyTorch.
"""

import argparse
import importlib
import math
import multiprocessing
import os
import sys
import time
import traceback
import unittest.mock
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

LEAST_SECONDS = 0.1  # of a measurement: quick calls are repeated, one behind the other


def moe_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the sizes of a MoE block: those of docs/benchmarks.md by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tokens", type=int, default=1600)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--selected", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    return parser


class Program(NamedTuple):
    """`wait(call())` is timed: `call` may return before the work is done, `wait` does not.

    flops: of one call, by models/flops.py. pairs: that one call takes, 0 for a product of matrices.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any]
    flops: float
    pairs: int = 0

    def seconds(self, repeats: int = 1) -> float:
        """Returns the seconds of one call, of several behind one another."""
        began = time.perf_counter()
        for _ in range(repeats):
            result = self.call()
        self.wait(result)
        return (time.perf_counter() - began) / repeats


class Side(NamedTuple):
    """A module with a function make_program, and the environment that it wants."""

    module: str
    environment: dict[str, str]


class Worker:
    """A process that holds one program, its side's `make_program(kind, sizes)`.

    told: {"sizes": completed by the module, "device": its versions, "flops", "pairs", "first_call_s"}.
    """

    def __init__(self, side: Side, kind: str, sizes: dict[str, Any]):
        """Starts the process and waits until the program has run twice. Raises RuntimeError if it fails."""
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other_end, side.module, kind, sizes), daemon=True
        )
        # Before it starts: JAX reads its variables when it is imported, which spawning does first.
        with unittest.mock.patch.dict(os.environ, side.environment):
            self._process.start()
        other_end.close()
        self.told = self._answer()

    def seconds(self) -> float:
        """Returns the seconds of a call now. Raises RuntimeError if the process dies of it."""
        self._connection.send("go")
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            answer = RuntimeError(f"the process ended with code {self._process.exitcode}")
        if isinstance(answer, RuntimeError):
            self.close()
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(30)
        self._process.kill()


def _serve(connection: Connection, module: str, kind: str, sizes: dict[str, Any]) -> None:
    # CLIPModel needs none of torchvision, and does not import beside one that was built for another torch.
    sys.modules.setdefault("torchvision", None)  # pyright: ignore[reportArgumentType]
    try:
        began = time.perf_counter()
        program, told = importlib.import_module(module).make_program(kind, sizes)
        program.seconds()
        told |= {"first_call_s": time.perf_counter() - began, "flops": program.flops, "pairs": program.pairs}
        repeats = math.ceil(LEAST_SECONDS / max(program.seconds(), 1e-6))
        connection.send(told)
        while connection.recv():
            connection.send(program.seconds(repeats))
    except EOFError:
        return  # the other end is closed
    except Exception as error:
        traceback.print_exc()
        connection.send(RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]))
