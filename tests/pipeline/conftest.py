"""What several files of these tests look at, made once for all workers of `pytest -n`."""

import os
import pathlib
import subprocess
import sys

import filelock
import pytest

SCRIPT = pathlib.Path(__file__).parent / "killed_run.py"


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    """The workdir of killed_run.py with one process of one device, never stopped. Only to be read."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    workdir = shared / "uninterrupted"
    with filelock.FileLock(shared / "uninterrupted.lock"):
        if not (workdir / "moe" / "params" / "done.json").exists():
            environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
            command = [sys.executable, str(SCRIPT), str(workdir), "nowhere"]
            finished = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert finished.returncode == 0, finished.stderr
    return workdir
