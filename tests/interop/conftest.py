"""Gives PyTorch one thread, and makes torchvision importable where its compiled operators do not load.

Threads gain nothing on tiny models, and wait for each other where test processes share the cores.

open_clip needs torchvision, whose wheels for Linux are built for CUDA. Beside a CPU build of PyTorch its
operators are missing, and then it fails to import, and transformers with it, unless the two operators that it
describes while it is imported are declared.
"""

import importlib.util

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
