"""Makes torchvision importable where its compiled operators do not load.

open_clip needs torchvision, whose wheels for Linux are built for CUDA. Beside a CPU build of PyTorch its
operators are missing, and then it fails to import, and transformers with it, unless the two operators that it
describes while it is imported are declared.
"""

import importlib.util
import sys


def declare() -> None:
    """Imports torchvision, with its operators or without, where it is installed."""
    import torch

    if sys.modules.get("torchvision", torch) is None:  # as `timing` has it for transformers alone
        del sys.modules["torchvision"]
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        import torchvision  # noqa: F401
