"""Makes torchvision importable, and gives PyTorch one thread.

Code of models that transformers copies stays here. Threads gain nothing on tiny models, and wait for each
other where test processes share the cores.
"""

import sys

import pytest
import torch

from benchmarks import torchvision_operators


def pytest_configure():
    torch.set_num_threads(1)
    torchvision_operators.declare()


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of models that it runs: not the user's home."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
