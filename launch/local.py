"""Starts a run as several processes on this machine, to try out what happens on several hosts.

    python launch/local.py --processes=2 --devices=4 -- --config=configs/demo.py:small --workdir=runs/two

What follows `--` goes to `python -m clipmoe_jax.main`. Each process has `--devices` CPU devices. Process 0
writes to this console, process N to local-N.log in the folder --logs. When a process fails, the others are
ended. SIGTERM and Ctrl-C reach all of them, and they save. After SIGTERM they exit with 75, and start again
with --restarts; after Ctrl-C they exit with 130. A second Ctrl-C ends them at once.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

# As in clipmoe_jax.core.distributed, without importing JAX.
EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130
# What a process may end with that did not fail; Ctrl-C ends one that is still starting as such.
EXPECTED = (None, 0, EXIT_PREEMPTED, EXIT_INTERRUPTED, -signal.SIGINT)
ROOT = pathlib.Path(__file__).resolve().parents[1]


def commands(arguments: argparse.Namespace, port: int) -> list[tuple[dict[str, str], list[str]]]:
    """Returns for each process what it adds to the environment, and its command."""
    command = [sys.executable, "-m", "clipmoe_jax.main", *arguments.main]
    return [
        (
            {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(arguments.devices),
                "CLIPMOE_COORDINATOR": f"127.0.0.1:{port}",
                "CLIPMOE_NUM_PROCESSES": str(arguments.processes),
                "CLIPMOE_PROCESS_ID": str(process),
            },
            command,
        )
        for process in range(arguments.processes)
    ]


def run_once(arguments: argparse.Namespace) -> int:
    """Starts all processes and waits; returns 0, 75, 130, or the code of the first that failed."""
    arguments.logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        processes = []
        for i, (environment, command) in enumerate(commands(arguments, free_port())):
            log = None
            if i:
                log = stack.enter_context((arguments.logs / f"local-{i}.log").open("a"))
            # In a group of its own, or a terminal's Ctrl-C would reach it twice.
            started = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log, process_group=0
            )
            processes.append(stack.enter_context(started))

        def pass_on(number: int, _: object) -> None:
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            for process in processes:
                process.send_signal(sent)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, pass_on)
        return wait(processes)


def wait(processes: list[subprocess.Popen]) -> int:
    """Returns the code of the first process that failed, when all have ended; else 130, 75 or 0."""
    failed = None
    while any(process.poll() is None for process in processes):
        codes = [process.returncode for process in processes]
        failed = next((code for code in codes if code not in EXPECTED), None)
        if failed is not None:
            print(
                f"process {codes.index(failed)} failed with {failed}: the others are ended", file=sys.stderr
            )
            end(processes)
            break
        time.sleep(0.2)
    codes = [process.wait() for process in processes]
    return failed or max(EXIT_INTERRUPTED if code == -signal.SIGINT else code for code in codes)


def end(processes: list[subprocess.Popen]) -> None:
    """Sends SIGTERM, and SIGKILL to those that still wait for a dead process after five seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 5
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))
        process.kill()


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def at_least(least: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `least` on."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return int(text)

    return parse


def folder(text: str) -> pathlib.Path:
    """Returns a path with `~` as the home folder."""
    return pathlib.Path(text).expanduser()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=at_least(1), default=2)
    parser.add_argument("--devices", type=at_least(1), default=1, help="CPU devices of each process")
    parser.add_argument("--logs", type=folder, default=pathlib.Path("."), help="where local-N.log go")
    parser.add_argument("--restarts", type=at_least(0), default=0, help="how often to start again after 75")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("main", nargs="*", help="after --: arguments of clipmoe_jax.main")
    arguments = parser.parse_args()
    if arguments.dry_run:
        for environment, command in commands(arguments, port=12345):
            print(
                *(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)
            )
        return 0
    for _ in range(arguments.restarts + 1):
        code = run_once(arguments)
        if code != EXIT_PREEMPTED:
            return code
    return EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
