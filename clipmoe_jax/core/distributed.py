"""Several processes as one program: starting them, waiting for each other, agreeing, stopping together.

Every process runs the same code on its own devices and its own slice of each batch. Process 0 alone writes
what is not sharded. With one process all of this is nothing.
"""

import glob
import importlib.util
import itertools
import os
import signal
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

# What a preempted run exits with (EX_TEMPFAIL of sysexits.h): start the same command again.
EXIT_PREEMPTED = 75
BARRIER_SECONDS = 3600  # k-means and imports on process 0 take their time
HEARTBEAT_SECONDS = 30  # after which a process that died ends the others

_barriers = itertools.count()
_sync_points = itertools.count()
_terminated = False


class Preempted(SystemExit):
    """SIGTERM came; what was done is saved."""

    def __init__(self, where: str):
        if is_main():
            print(f"{where}: stopped by SIGTERM; start the same command again to go on", flush=True)
        super().__init__(EXIT_PREEMPTED)


def initialize(mode: str = "auto") -> None:
    """Joins the processes of this run, before anything else touches a device.

    mode "auto": by CLIPMOE_COORDINATOR (host:port), CLIPMOE_NUM_PROCESSES and CLIPMOE_PROCESS_ID if they are
    set; else, on a TPU or where SLURM or Open MPI started several, as JAX finds them. "off": one process,
    whatever the environment shows. Raises ValueError for variables that are not all there.
    """
    if mode == "off":
        signal.signal(signal.SIGTERM, _note_termination)
        return
    options = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "initialization_timeout": 300}
    names = ("CLIPMOE_COORDINATOR", "CLIPMOE_NUM_PROCESSES", "CLIPMOE_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if given:
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{', '.join(given)} are set and {', '.join(missing)} are not: set all or none")
        coordinator, num_processes, process_id = (given[name] for name in names)
        jax.distributed.initialize(coordinator, int(num_processes), int(process_id), **options)
    elif _environment_shows_several():
        jax.distributed.initialize(**options)
    else:
        signal.signal(signal.SIGTERM, _note_termination)
        return
    _client().key_value_set(f"host/{jax.process_index()}", socket.gethostname())


def keep_compiled_programs() -> None:
    """Compiled programs are kept in ~/.cache/clipmoe_jax, by host, so that the same command starts sooner the
    next time. JAX_COMPILATION_CACHE_DIR names another folder, and none if it is empty."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # By host: a program compiled for one CPU may not run on another that shares the home.
        folder = os.path.expanduser(f"~/.cache/clipmoe_jax/{socket.gethostname()}")
        jax.config.update("jax_compilation_cache_dir", folder)


def _environment_shows_several() -> bool:
    if any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    # A TPU host asks its metadata for the others, and may be the only one.
    has_tpu = any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))
    return has_tpu and importlib.util.find_spec("libtpu") is not None


def is_main() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits until every process is here. Raises TimeoutError naming those that did not come."""
    if jax.process_count() == 1:
        return
    number = next(_barriers)
    _client().key_value_set(f"arrived/{number}/{jax.process_index()}", "")
    try:
        _client().wait_at_barrier(f"{number} {name}", seconds * 1000)
    except Exception as error:  # the coordination service's errors are no Python types
        arrived = {key.rsplit("/", 1)[1] for key, _ in _client().key_value_dir_get(f"arrived/{number}/")}
        hosts = dict(_client().key_value_dir_get("host/"))
        late = [
            f"process {p} on {hosts.get(f'host/{p}', 'an unknown host')}"
            for p in range(jax.process_count())
            if str(p) not in arrived
        ]
        raise TimeoutError(f"{name}: after {seconds} s these are missing: {', '.join(late)}") from error


def agree(value: bool) -> bool:
    """Process 0's value, for what is read from a disk that others may see later."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def all_are(value: bool) -> bool:
    """Whether it is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def broadcast(array: np.ndarray) -> np.ndarray:
    """Process 0's array, in every process."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def preempted() -> bool:
    """Whether to save and stop: SIGTERM came to any process.

    All processes must ask equally often, and get the same answer at the same time.
    """
    global _terminated
    if _client() is not None and not _terminated:  # then JAX has taken SIGTERM, of a single process too
        # True at one point alone, the same in all processes: from then on it is known.
        _terminated = multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return _terminated


def _note_termination(*_) -> None:
    global _terminated
    _terminated = True


def _client():
    from jax._src import distributed  # as orbax does: JAX has no public way to its key-value store

    return distributed.global_state.client
