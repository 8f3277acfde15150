"""Processes of a run: how they find each other, and what signals do. tests/pipeline/test_processes.py has
several."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import grain
import jax
import pytest

from clipmoe_jax.core import distributed
from clipmoe_jax.data import loader

VARIABLES = ("CLIPMOE_COORDINATOR", "CLIPMOE_NUM_PROCESSES", "CLIPMOE_PROCESS_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment to that of a process which a launcher started, without a TPU."""
    monkeypatch.setattr(distributed, "_has_tpu", lambda: False)

    def set_variables(**variables):
        for name in [*VARIABLES, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    set_variables()
    return set_variables


FOUND = {
    "alone": ({}, None),
    "one task": (dict(SLURM_NTASKS=1), None),
    "one process of srun in an allocation of one": (dict(SLURM_NTASKS=1, SLURM_STEP_NUM_TASKS=1), None),
    "srun": (dict(SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=4), {}),
    "mpirun": (dict(OMPI_COMM_WORLD_SIZE=2, OMPI_MCA_orte_hnp_uri="x"), {}),
    "told": (
        dict(zip(VARIABLES, ("host:12", 2, 1), strict=True)),
        dict(coordinator_address="host:12", num_processes=2, process_id=1, coordinator_bind_address=None),
    ),
}


@pytest.mark.parametrize(("variables", "address"), FOUND.values(), ids=FOUND)
def test_other_processes_are_found(environment, variables, address):
    environment(**variables)
    assert distributed._address() == address


NOT_STARTED = {
    "salloc, or sbatch without srun": (
        dict(SLURM_NTASKS=4),
        "SLURM_NTASKS=4, .*put srun before the command$",
    ),
    "salloc as a step of one": (dict(SLURM_NTASKS=4, SLURM_STEP_NUM_TASKS=1), "put srun before"),
    "Open MPI 5": (dict(OMPI_COMM_WORLD_SIZE=2), "set CLIPMOE_COORDINATOR, CLIPMOE_NUM_PROCESSES, "),
}


@pytest.mark.parametrize(("variables", "message"), NOT_STARTED.values(), ids=NOT_STARTED)
def test_allocation_without_a_launcher_is_told_of_it(environment, variables, message):
    environment(**variables)
    with pytest.raises(distributed.NotStartedError, match=message):
        distributed.initialize()


BAD = {
    "half set": (
        ("127.0.0.1:1234", "", ""),
        "CLIPMOE_COORDINATOR are set and CLIPMOE_NUM_PROCESSES, CLIPMOE_PRO",
    ),
    "no port": (("host", 2, 1), "CLIPMOE_COORDINATOR=host is not host:port"),
    "no number": (("host:1", "two", 1), "CLIPMOE_NUM_PROCESSES=two and CLIPMOE_PROCESS_ID=1 must be whole"),
    "one too many": (("host:1", 2, 2), "CLIPMOE_NUM_PROCESSES=2 and CLIPMOE_PROCESS_ID=2 must be whole"),
}


@pytest.mark.parametrize(("values", "message"), BAD.values(), ids=BAD)
def test_variables_that_cannot_be_are_refused_by_name(environment, values, message):
    environment(**dict(zip(VARIABLES, values, strict=True)))
    with pytest.raises(ValueError, match=message):
        distributed.initialize()


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:12", "127.0.0.1:12"),
        ("localhost:12", "127.0.0.1:12"),
        ("192.0.2.1:12", None),  # of no machine (RFC 5737)
        ("no-such-host.invalid:12", None),
    ],
)
def test_coordinator_listens_where_its_address_says(coordinator, address, monkeypatch):
    known = {"localhost": "127.0.0.1"}
    getaddrinfo = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **kw: getaddrinfo(known.get(host, host), *a, **kw)
    )
    assert distributed._bind_address(coordinator) == address


LISTEN = """
import os, pathlib
from clipmoe_jax.core import distributed
distributed.initialize()
port = f"{int(os.environ['CLIPMOE_COORDINATOR'].rpartition(':')[2]):04X}"
for table in ("tcp", "tcp6"):
    for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if address.endswith(f":{port}") and state == "0A":
            print("listens", address.partition(":")[0])
"""


def test_coordinator_on_this_machine_is_not_heard_from_others():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    variables = dict(zip(VARIABLES, (f"127.0.0.1:{port}", "1", "0"), strict=True))
    done = subprocess.run(
        [sys.executable, "-c", LISTEN], env=os.environ | variables, capture_output=True, text=True
    )
    heard = [line for line in done.stdout.splitlines() if line.startswith("listens")]
    assert len(heard) == 1, done.stderr[-2000:]
    assert heard[0].endswith("0100007F")  # 127.0.0.1, in IPv6 too


def test_processes_reach_each_other_without_a_proxy(environment, monkeypatch):
    """Through one that does not know them they would wait for five minutes."""
    environment(**dict(zip(VARIABLES, ("host:12", 2, 1), strict=True)))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    seen = []

    def join(**arguments):
        seen.extend(name for name in os.environ if "_proxy" in name.lower())
        raise InterruptedError

    monkeypatch.setattr(jax.distributed, "initialize", join)
    with pytest.raises(InterruptedError):
        distributed.initialize()
    assert seen == []
    assert os.environ["http_proxy"] == os.environ["HTTPS_PROXY"] == "http://127.0.0.1:1"


@pytest.fixture
def no_cache(monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("chosen", [None, "elsewhere", ""])
def test_compiled_programs_are_kept_at_home_unless_jax_has_a_folder(tmp_path, monkeypatch, no_cache, chosen):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", chosen)
    distributed.keep_compiled_programs()
    kept = jax.config.jax_compilation_cache_dir
    assert kept == (f"{tmp_path}/.cache/clipmoe_jax/{socket.gethostname()}" if chosen is None else chosen)


@pytest.mark.usefixtures("no_cache")
def test_home_that_cannot_be_written_keeps_no_compiled_programs(tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(jax.config, "update", lambda *update: updates.append(update))
    (tmp_path / "file").touch()
    with contextlib.chdir(tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
        distributed.keep_compiled_programs()
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
        distributed.keep_compiled_programs()
    assert updates == [] and [path.name for path in tmp_path.iterdir()] == ["file"]


SIGNALLED = """
import hashlib, os, signal, threading
from clipmoe_jax.core import cli, distributed

distributed.initialize(tell=cli.say_aside)
assert not distributed.preempted()
os.kill(os.getpid(), signal.SIGINT)
while not distributed.preempted():
    pass
print(distributed.Preempted("here"), distributed.Preempted("here").code, flush=True)
threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which Python's own handlers do not run
"""


def test_first_ctrl_c_is_noted_and_the_second_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=60)
    told = "stopping as soon as what is done is saved; Ctrl-C again ends it at once\n"
    assert (done.returncode, done.stderr) == (130, told)
    assert done.stdout == "here: stopped by Ctrl-C; start the same command again to go on 130\n"


WORKER = """
import multiprocessing, os, signal, sys, time
from clipmoe_jax.core import distributed

def work(started):
    distributed.leave_signals_to_parent(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    started.set()
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=work, args=[started])
    worker.start()
    started.wait()
    print(worker.pid, worker.is_alive(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_hears_no_signal_and_ends_with_its_parent():
    """Its pipe, which `run` reads to the end, closes when it has ended."""
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGKILL and done.stdout.split()[1] == "True"


def test_workers_that_decode_hear_no_signal(monkeypatch):
    begins = []
    monkeypatch.setattr(
        grain.IterDataset, "mp_prefetch", lambda self, options, begin: begins.append(begin) or self
    )
    loader._read_ahead(None, range(2), num_workers=2)
    assert begins == [distributed.leave_signals_to_parent]
