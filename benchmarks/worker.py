"""A process that runs one side of a section of `benchmarks.run`, and times it when it is told to.

Our side and PyTorch's are processes of their own: neither's threads, libraries or memory are in the other's
way, and one that dies takes nothing with it. While one runs the other waits.
"""

import dataclasses
import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import timing

OURS, THEIRS = "clipmoe_jax", "PyTorch"


class Died(Exception):
    """The process ended; why, as far as that can be seen."""


class Worker:
    """A side of a section, seen from outside."""

    def __init__(self, side: str, section: str, sizes: dict[str, Any]):
        """Starts the process. sizes: fields of Workload; what is missing or empty is chosen by platform."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side, section, sizes), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *question: str) -> Any:
        """The answer, see `_serve`; without a question what it says at first. Raises Died if none comes."""
        try:
            if question:
                self._connection.send(question)
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            raise Died(f"{timing.OUT_OF_MEMORY} (killed)" if code == -9 else f"ended with {code}") from None
        if isinstance(answer, Died):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(30)
        self._process.kill()


def _serve(connection: Connection, side: str, section: str, sizes: dict[str, Any]) -> None:
    """Tells {"device", "workload", "groups"}, then answers ("open", group), ("time", program), ("close",)."""
    try:
        programs, device, sizes = _ours(sizes) if side == OURS else _theirs(sizes)
        from benchmarks.workload import Workload

        workload = Workload(**sizes)
        connection.send(
            {"device": device, "workload": dataclasses.asdict(workload), "groups": workload.groups(section)}
        )
    except Exception as error:
        connection.send(Died(timing.failure(error)["error"]))
        return
    running: dict[str, Any] = {}
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return  # the other end is closed
        match question:
            case ("open", group):
                told = {}
                for name, build in programs.SECTIONS[section](workload, group).items():
                    running[name], told[name] = timing.prepare(build)
                connection.send(told)
            case ("time", name):
                connection.send(timing.measure(running[name]))
            case ("close",):
                running.clear()
                programs.free_memory()
                connection.send({})


def _ours(sizes: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs a part of the memory
    from benchmarks import ours

    device = ours.describe()
    on_cpu = device["platform"] == "cpu"
    defaults = {
        "variant": "ViT-B/32" if on_cpu else "ViT-L/14",
        "batch": 32 if on_cpu else 100,
        "dtype": "float32" if on_cpu else "bfloat16",
        "remat": "none" if on_cpu else "dots",
    }
    given = {name: value for name, value in sizes.items() if value}
    return ours, device, defaults | given | {"platform": device["platform"]}


def _theirs(sizes: dict[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    os.environ["JAX_PLATFORMS"] = "cpu"  # which makes parameters and nothing else
    # CLIPModel needs none of torchvision, and does not import beside one that was built for another torch.
    sys.modules.setdefault("torchvision", None)
    from benchmarks import peers

    return peers, peers.describe(sizes["platform"]), sizes
