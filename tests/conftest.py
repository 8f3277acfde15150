"""Eight fake CPU devices for every test, whatever machine runs them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import pathlib

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """What the released PyTorch code computed on tiny random weights (tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "golden.npz"))
