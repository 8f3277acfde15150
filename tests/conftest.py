"""Eight fake CPU devices for every test, whatever machine runs them."""

import atexit
import os
import shutil
import tempfile

import jaxlib.version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
# Tests, their workers and the commands they start compile the same programs: each session keeps them once, in
# a folder of its own, so that nothing is left of an earlier one and nothing goes to the user's home.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="clipmoe_jax-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Most time goes into compiling programs that run for milliseconds, half of it into LLVM's passes, and half of
# the rest into MLIR's for fusions, for which XLA on CPU has another way (until JAX 0.11, which does not start
# with the flag). XLA's own passes stay: fusion, partitioning and the collectives that tests look for. (The
# demo's test has all but LLVM's as a user has it.)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = ""
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

import pathlib
import signal

import numpy as np
import pytest

pytest_plugins = ["trained_moe"]

# Commands that a test starts hear Ctrl-C, also where pytest itself runs in the background of a script, whose
# processes begin with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These take longest, in this order; workers of `pytest -n` get files in the order of the tests.
LONGEST = (
    "pipeline/test_pipeline.py",
    "pipeline/test_processes.py",
    "pipeline/test_resume.py",
    "train/test_training.py",
    "planning/test_plan.py",
    "pipeline/test_sweep.py",
    "pipeline/test_users_data.py",
    "interop/test_convert.py",
    "models/test_moe.py",
    "models/test_clip.py",
    "pipeline/test_new_recipe.py",
    "interop/test_benchmarks.py",
    "test_launch.py",
    "evaluation/test_evaluations.py",
    "core/test_cli.py",
    "data/test_loader.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true", help="the exhaustive grids too (-m exhaustive: only these)"
    )
    parser.addoption(
        "--nightly", action="store_true", help="what takes many minutes too (-m nightly: only it)"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "exhaustive: one more cell of a grid; runs with --all")
    config.addinivalue_line("markers", "nightly: takes many minutes; runs with --nightly")


def pytest_collection_modifyitems(config, items):
    """Exhaustive tests run with --all alone, nightly ones with --nightly.

    The longest files come first: no worker is left with one.
    """
    for mark, option in (("exhaustive", "--all"), ("nightly", "--nightly")):
        if not config.getoption(option):
            config.hook.pytest_deselected(items=[item for item in items if mark in item.keywords])
            items[:] = [item for item in items if mark not in item.keywords]
    tests = pathlib.Path(__file__).parent
    ranks = {tests / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """What the released PyTorch code computed on tiny random weights (tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "golden.npz"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> pathlib.Path:
    """96 digit scenes prepared as a user's data would be, with detailed captions."""
    from clipmoe_jax.data.preparation import prepare
    from clipmoe_jax.data.sources import open_source

    folder = tmp_path_factory.mktemp("scenes") / "prepared"
    prepare(open_source("digit_scenes:train?pairs=96"), str(folder))
    return folder
