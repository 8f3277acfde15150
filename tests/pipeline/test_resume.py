"""kill -9 in the middle of every kind of stage, and the run goes on as if nothing had happened."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest

from clipmoe_jax.models.model_folder import load_model

SCRIPT = pathlib.Path(__file__).parent / "killed_run.py"
sys.path.insert(0, str(SCRIPT.parent))
from killed_run import PLACES  # noqa: E402


def run(workdir, place: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(workdir), place], env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """(one uninterrupted run, one killed at each place in turn and then finished)."""
    folder = tmp_path_factory.mktemp("resume")
    whole, killed = folder / "whole", folder / "killed"
    finished = run(whole, "nowhere")
    assert finished.returncode == 0, finished.stderr
    for place in PLACES:
        stopped = run(killed, place)
        assert stopped.returncode == -signal.SIGKILL, f"not killed at {place!r}: {stopped.stderr[-2000:]}"
    finished = run(killed, "nowhere")
    assert finished.returncode == 0, finished.stderr
    return whole, killed


@pytest.mark.parametrize("model", ["base", "stage_1/params", "moe/upcycled", "moe/params"])
def test_parameters_equal_an_uninterrupted_run_bit_for_bit(workdirs, model):
    (expected_config, expected), (config, found) = (load_model(workdir / model) for workdir in workdirs)
    assert config == expected_config
    chex.assert_trees_all_equal(found, expected)


def test_features_and_labels_are_equal_too(workdirs):
    whole, killed = workdirs
    arrays = sorted(p.relative_to(whole) for p in whole.glob("stage_1/*/*.npy"))
    assert len(arrays) == 2 * 4 + 3  # four parts of image and of text features, the labels, and them sorted
    for array in arrays:
        np.testing.assert_array_equal(np.load(killed / array), np.load(whole / array), str(array))


def test_nothing_unfinished_is_left(workdirs):
    leftovers = [p for p in workdirs[1].rglob("*") if p.suffix in (".unfinished", ".tmp")]
    assert leftovers == []


def test_what_is_done_is_not_done_again(workdirs):
    killed = workdirs[1]
    before = {p: p.stat().st_mtime_ns for p in killed.glob("**/done.json")}
    again = run(killed, "router, after a checkpoint")  # would be killed if it trained
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in killed.glob("**/done.json")} == before
