"""Several processes as one program: they start, wait for each other, agree, and stop together.

Every process runs the same code on its own devices and its own slice of each batch. Process 0 alone writes
what is not sharded. With one process, every function here returns at once.
"""

import functools
import glob
import importlib.util
import itertools
import os
import signal
import socket
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# The exit code of a preempted run (EX_TEMPFAIL of sysexits.h), which asks to be started again.
EXIT_PREEMPTED = 75
BARRIER_SECONDS = 3600  # k-means and imports on process 0 take their time
HEARTBEAT_SECONDS = 30  # a process that dies ends the others after these

_barriers = itertools.count()
_sync_points = itertools.count()
_terminated = False


class Preempted(SystemExit):
    """Ends the process with EXIT_PREEMPTED: SIGTERM came, and all progress is saved.

    where: the stage or phase, and how far it got.
    """

    def __init__(self, where: str):
        super().__init__(EXIT_PREEMPTED)
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: stopped by SIGTERM; start the same command again to go on"


def initialize(mode: str = "auto") -> None:
    """Joins the processes of this run. Call it before anything else touches a device.

    mode "auto": uses CLIPMOE_COORDINATOR (host:port), CLIPMOE_NUM_PROCESSES and CLIPMOE_PROCESS_ID if they
    are set; otherwise, on a TPU or where SLURM or Open MPI started several processes, lets JAX find them.
    "off": stays a single process, whatever the environment says. Raises ValueError if only some of the
    variables are set.
    """
    if mode == "off":
        signal.signal(signal.SIGTERM, _note_termination)
        return
    join = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=300
    )
    names = ("CLIPMOE_COORDINATOR", "CLIPMOE_NUM_PROCESSES", "CLIPMOE_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given:
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{', '.join(given)} are set and {', '.join(missing)} are not: set all or none")
        coordinator, num_processes, process_id = (given[name] for name in names)
        join(coordinator, int(num_processes), int(process_id))
    elif _environment_shows_several():
        join()
    else:
        signal.signal(signal.SIGTERM, _note_termination)
        return
    _client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())


def keep_compiled_programs() -> None:
    """Keeps compiled programs in ~/.cache/clipmoe_jax, by host, so that the same command starts sooner next
    time.

    JAX_COMPILATION_CACHE_DIR names another folder; if it is empty, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # By host: a program compiled for one CPU may not run on another that shares the home.
        folder = os.path.expanduser(f"~/.cache/clipmoe_jax/{socket.gethostname()}")
        jax.config.update("jax_compilation_cache_dir", folder)


def _environment_shows_several() -> bool:
    if any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    # On a TPU host, JAX asks the metadata server for the other hosts; there may be none.
    has_tpu = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
    """Returns whether this is process 0, the one that writes."""
    return jax.process_index() == 0


def barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits until every process has reached this point. Raises TimeoutError naming those that did not."""
    if jax.process_count() == 1:
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
            for p in range(jax.process_count())
            if str(p) not in arrived
        ]
        raise TimeoutError(f"{name}: after {seconds} s these are missing: {', '.join(late)}") from error


def agree(value: bool) -> bool:
    """Returns process 0's value. For state on a disk that other hosts may see later."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def all_are(value: bool) -> bool:
    """Returns whether the value is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def broadcast(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def preempted() -> bool:
    """Returns whether to save and stop, because some process received SIGTERM.

    Every process must call this equally often; all get the same answer at the same call.
    """
    global _terminated
    if _client() is not None and not _terminated:  # JAX handles SIGTERM once it has joined, even alone
        # JAX answers True at a single sync point, the same in all processes, so remember it.
        _terminated = multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return _terminated


def _note_termination(*_) -> None:
    global _terminated
    _terminated = True


def _client() -> Any:
    """Returns JAX's coordination client, or None for a process that joined no others."""
    from jax._src import distributed  # JAX's key-value store has no public API; orbax does the same

    return distributed.global_state.client
