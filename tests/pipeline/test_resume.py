"""kill -9 in the middle of every kind of stage, and the run goes on as if nothing had happened."""

import os
import pathlib
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest
from grids import grid
from killed_run import PLACES

from clipmoe_jax.models.model_folder import load_model

SCRIPT = pathlib.Path(__file__).parent / "killed_run.py"


def run(workdir, place: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(workdir), place], env=environment, capture_output=True, text=True
    )


KILLED = grid(["mcl, after a checkpoint"], rest=[[place for place in PLACES if "one part" not in place]])


@pytest.fixture(scope="module", params=KILLED, ids=["one place", "every place"])
def killed(request, tmp_path_factory):
    """The workdir of a run killed at each of these places in turn and then finished."""
    workdir = tmp_path_factory.mktemp("killed") / "workdir"
    for place in request.param:
        stopped = run(workdir, place)
        assert stopped.returncode == -signal.SIGKILL, f"not killed at {place!r}: {stopped.stderr[-2000:]}"
    finished = run(workdir, "nowhere")
    assert finished.returncode == 0, finished.stderr
    return workdir


@pytest.mark.parametrize("model", ["base", "stage_1/params", "dense/params", "moe/upcycled", "moe/params"])
def test_resume_after_kill_gives_the_same_params_bit_for_bit(uninterrupted, killed, model):
    expected_config, expected = load_model(uninterrupted / model)
    config, found = load_model(killed / model)
    assert config == expected_config
    chex.assert_trees_all_equal(found, expected)


def test_resume_after_kill_gives_the_same_features_and_labels(uninterrupted, killed):
    arrays = sorted(p.relative_to(uninterrupted) for p in uninterrupted.glob("stage_1/*/*.npy"))
    assert len(arrays) == 2 * 4 + 3  # four parts of image and of text features, the labels, and them sorted
    for array in arrays:
        found, expected = np.load(killed / array), np.load(uninterrupted / array)
        np.testing.assert_array_equal(found, expected, str(array))


def test_resume_leaves_nothing_unfinished(killed):
    leftovers = [p for p in killed.rglob("*") if p.suffix in (".unfinished", ".tmp")]
    assert leftovers == []


def test_finished_stages_are_not_made_again(killed):
    before = {p: p.stat().st_mtime_ns for p in killed.glob("**/done.json")}
    again = run(killed, "router, after a checkpoint")  # would be killed if it trained
    assert again.returncode == 0, again.stderr
    assert f"{killed}: nothing was trained, as all of its models are there" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in killed.glob("**/done.json")} == before
