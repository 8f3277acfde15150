"""Several processes as one program: they start, wait for each other, agree, and stop together.

Every process runs the same code on its own devices and its own slice of each batch. Process 0 alone writes
what is not sharded. With one process, every function here returns at once.
"""

import contextlib
import glob
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipmoe_jax.core.paths import with_home

# The exit code of a preempted run (EX_TEMPFAIL of sysexits.h), which asks to be started again.
EXIT_PREEMPTED = 75
# That of a program which Ctrl-C ended, as shells have it: 128 + SIGINT.
EXIT_INTERRUPTED = 130
FAILURE_SECONDS = 5
BARRIER_SECONDS = 3600  # k-means and imports on process 0 take their time
HEARTBEAT_SECONDS = 30  # a process that dies ends the others after these

_barriers = itertools.count()
_tellings = itertools.count()
_polls = 0  # how often `preempted` asked JAX, the same in all processes
_terminated = False
_interrupted = False


class Preempted(SystemExit):
    """Ends the process with EXIT_PREEMPTED after SIGTERM, with EXIT_INTERRUPTED after Ctrl-C; all progress is
    saved.

    where: the stage or phase, and how far it got. code: None is that of the signal which came.
    """

    def __init__(self, where: str, code: int | None = None):
        super().__init__(code or (EXIT_INTERRUPTED if _interrupted else EXIT_PREEMPTED))
        self.where = where

    def __str__(self) -> str:
        cause = "Ctrl-C" if self.code == EXIT_INTERRUPTED else "SIGTERM"
        return f"{self.where}: stopped by {cause}; start the same command again to go on"


class NotStartedError(ValueError):
    """The environment is that of several processes, and nothing started them."""


def initialize(mode: str = "auto", tell: Callable[[str], None] = lambda text: None) -> None:
    """Joins the processes of this run. Call it before anything else touches a device.

    From then on SIGTERM and Ctrl-C are noted, for `preempted`; a second Ctrl-C ends the process at once.

    mode "auto": uses CLIPMOE_COORDINATOR (host:port), CLIPMOE_NUM_PROCESSES and CLIPMOE_PROCESS_ID if they
    are set; otherwise, on a TPU or where SLURM or Open MPI started several processes, lets JAX find them.
    "off": stays a single process, whatever the environment says. Raises ValueError if only some of the
    variables are set or one cannot be, and NotStartedError in an allocation of SLURM without srun.
    tell: is given a line, in process 0, as soon as the first signal comes.
    """
    address = _address() if mode != "off" else None
    if address is not None:
        with _no_proxies():
            jax.distributed.initialize(
                **address, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=300
            )
        _client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())
    _note_signals(tell)


def _address() -> dict[str, Any] | None:
    """Returns the arguments that tell JAX of the others, {} where it finds them, None if there are none."""
    names = ("CLIPMOE_COORDINATOR", "CLIPMOE_NUM_PROCESSES", "CLIPMOE_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given:
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{', '.join(given)} are set and {', '.join(missing)} are not: set all or none")
        coordinator, count, process = given.values()
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"CLIPMOE_COORDINATOR={coordinator} is not host:port")
        if not (count.isdecimal() and process.isdecimal() and int(process) < int(count)):
            raise ValueError(
                f"CLIPMOE_NUM_PROCESSES={count} and CLIPMOE_PROCESS_ID={process} must be whole numbers, the "
                "second from 0 and less than the first"
            )
        return dict(
            coordinator_address=coordinator,
            num_processes=int(count),
            process_id=int(process),
            coordinator_bind_address=_bind_address(coordinator) if int(process) == 0 else None,
        )
    # In an allocation SLURM_NTASKS is that of the job; srun sets both for what it starts.
    slurm, step, mpi = (
        int(os.environ.get(name, 1))
        for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    )
    if slurm > 1 and step != slurm:
        raise NotStartedError(
            f"SLURM_NTASKS={slurm}, but srun has not started them: put srun before the command"
        )
    if mpi > 1 and "OMPI_MCA_orte_hnp_uri" not in os.environ:  # as JAX wants it; Open MPI 5 has it no longer
        raise NotStartedError(
            f"OMPI_COMM_WORLD_SIZE={mpi}, but this Open MPI does not say where the first process is: set "
            f"{', '.join(names)}"
        )
    return {} if slurm > 1 or mpi > 1 or _has_tpu() else None


def _bind_address(coordinator: str) -> str | None:
    """Returns where process 0 listens: at the coordinator's address, if it is one of this machine.

    Returns None, JAX's default of all addresses, where it is none, as that of a service before the machine.
    """
    host, _, port = coordinator.rpartition(":")
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.bind(address)
        numeric = f"[{address[0]}]" if family == socket.AF_INET6 else address[0]
        return f"{numeric}:{port}"
    return None


def _has_tpu() -> bool:
    # On a TPU host, JAX asks the metadata server for the other hosts; there may be none.
    has_tpu = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _no_proxies() -> Iterator[None]:
    """Hides web proxies (http_proxy, …) from gRPC: processes of a run reach each other without.

    Through a proxy that does not know them they would wait until `initialize` gives up.
    """
    proxies = {name: value for name, value in os.environ.items() if "_proxy" in name.lower()}
    for name in proxies:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ |= proxies


def _note_signals(tell: Callable[[str], None]) -> None:
    """Notes SIGTERM and Ctrl-C from now on, wherever the main thread is, and tells of the first.

    Python's own handlers wait until that thread is back from XLA, so another one reads the signals, too.
    """
    if _client() is None:  # JAX handles SIGTERM once it has joined
        signal.signal(signal.SIGTERM, _note)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background process
        return
    signal.signal(signal.SIGINT, _note)
    numbers, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours
    threading.Thread(target=_read_signals, args=[numbers, tell], daemon=True).start()


def _read_signals(numbers: int, tell: Callable[[str], None]) -> None:
    interrupts, told = 0, False
    while number := os.read(numbers, 1)[0]:
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            os._exit(EXIT_INTERRUPTED)
        _note(number)
        if not told and number in (signal.SIGINT, signal.SIGTERM) and is_main():
            told, again = True, "; Ctrl-C again ends it at once" if interrupts else ""
            tell(f"stopping as soon as what is done is saved{again}")


def _note(number: int, frame: object = None) -> None:
    global _interrupted, _terminated
    del frame
    if number == signal.SIGINT and not _interrupted:
        _interrupted = True
        if _client() is not None:
            with contextlib.suppress(Exception):  # of a cluster that is breaking down
                _client().key_value_set(f"interrupted/{jax.process_index()}", "")
            os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others when to stop
    _terminated = _terminated or _client() is None


def leave_signals_to_parent(*_: int) -> None:
    """Makes a worker process deaf to SIGTERM and Ctrl-C, which reach a whole group, and end with its parent.

    Without workers a run that is told to stop could not.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def keep_compiled_programs() -> None:
    """Keeps compiled programs in ~/.cache/clipmoe_jax, by host, so that the same command or program starts
    sooner next time.

    JAX_COMPILATION_CACHE_DIR, or JAX's setting of that name, names another folder; if it is empty, nothing is
    kept. Neither is it without a home folder that can be written.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        # By host: a program compiled for one CPU may not run on another that shares the home.
        with contextlib.suppress(OSError, ValueError):
            folder = with_home(f"~/.cache/clipmoe_jax/{socket.gethostname()}")
            os.makedirs(folder, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", folder)
            # JAX keeps those that took a second: a small run has sixty others.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def process_count() -> int:
    """Returns how many processes have joined. One that is alone is not asked for its devices."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Returns whether this is process 0, the one that writes."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits until every process has reached this point. Raises TimeoutError naming those that did not."""
    if process_count() == 1:
        return
    number, client = next(_barriers), _client()
    client.key_value_set(f"arrived/{number}/{jax.process_index()}", "")
    try:
        client.wait_at_barrier(f"{number} {name}", seconds * 1000)
    except Exception as error:  # the coordination service raises no types of its own
        arrived = {key.rsplit("/", 1)[1] for key, _ in client.key_value_dir_get(f"arrived/{number}/")}
        hosts = dict(client.key_value_dir_get("host/"))
        late = [
            f"process {p} on {hosts.get(f'host/{p}', 'an unknown host')}"
            for p in range(process_count())
            if str(p) not in arrived
        ]
        raise TimeoutError(f"{name}: after {seconds} s these are missing: {', '.join(late)}") from error


def all_fail() -> bool:
    """Returns whether every process calls this within FAILURE_SECONDS, as they do for an error of the config.

    Call it once, before a process that failed ends.
    """
    if (client := _client()) is None:
        return True
    try:
        client.wait_at_barrier("failed", FAILURE_SECONDS * 1000)
        return True
    except jax.errors.JaxRuntimeError:
        return False


def on_main(name: str, work: Callable[[], Any], seconds: int = BARRIER_SECONDS) -> Any:
    """Calls `work` in process 0 while the others wait; returns what it returned, as JSON has it, in all.

    Unlike elsewhere, `work` may call `preempted`, which tells of signals to any process. What it raises ends
    all processes: process 0 raises it, the others Preempted, or SystemExit(1) without a word.
    """
    global _polls
    if process_count() == 1:
        return work()
    key, raised, told = f"told/{next(_tellings)}", None, {}
    if is_main():
        try:
            told["returned"] = work()
        except Preempted as stop:
            raised, told["stopped"] = stop, [stop.where, stop.code]
        except Exception as error:
            raised, told["failed"] = error, str(error)
        _client().key_value_set(key, json.dumps(told | {"polls": _polls}))
    barrier(name, seconds)
    if raised is not None:
        raise raised
    told = json.loads(_client().blocking_key_value_get(key, 60_000))
    _polls = told["polls"]
    if "stopped" in told:
        where, code = told["stopped"]
        raise Preempted(where, code)
    if "failed" in told:
        raise SystemExit(1)
    return told["returned"]


def agree(value: bool) -> bool:
    """Returns process 0's value. For state on a disk that other hosts may see later."""
    if process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def all_are(value: bool) -> bool:
    """Returns whether the value is true in every process."""
    if process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def broadcast(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array."""
    if process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def preempted() -> bool:
    """Returns whether to save and stop, because some process received SIGTERM or Ctrl-C.

    Every process must call this equally often, except in `on_main`; all get the same answer at the same call.
    """
    global _interrupted, _polls, _terminated
    if _client() is not None and not _terminated:  # JAX handles SIGTERM once it has joined, even alone
        # JAX answers True at a single sync point, the same in all processes, so remember it.
        _terminated = multihost_utils.reached_preemption_sync_point(_polls)
        _polls += 1
        if _terminated:
            _interrupted = bool(_client().key_value_dir_get("interrupted/"))
    return _terminated


def _client() -> Any:
    """Returns JAX's coordination client, or None for a process that joined no others."""
    from jax._src import distributed  # JAX's key-value store has no public API; orbax does the same

    return distributed.global_state.client
