"""Makes torchvision importable where its compiled operators do not load, and gives PyTorch one thread.

Code of models that transformers copies stays here. Threads gain nothing on tiny models, and wait for each
other where test processes share the cores.

open_clip needs torchvision, whose wheels for Linux are built for CUDA. Beside a CPU build of PyTorch its
operators are missing, and then it fails to import, and transformers with it, unless the two operators that it
describes while it is imported are declared.
"""

import importlib.util
import sys

import pytest
import torch


def pytest_configure():
    torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        import torchvision  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of models that it runs: not the user's home."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        yield
