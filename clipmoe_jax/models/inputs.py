"""Inputs of the models: token ids, packed captions, and how pixels are normalised and resized.

Letters: B captions, R rows, L row length.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

START_ID = 49406
END_ID = 49407
PAD_ID = 0
SPECIAL_IDS = {"<|startoftext|>": START_ID, "<|endoftext|>": END_ID}

# OpenAI CLIP's mean and standard deviation of red, green and blue, for pixels from 0 to 1.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class PackedText(NamedTuple):
    """Captions that share rows, as the text tower takes them; arrays of numpy or JAX.

    tokens (R, L) int32. segments (R, L) int32: 1, 2, … for the captions of a row, 0 is padding. ends (B,)
    int32: the position (row * L + column) of each caption's end token among the rows of its shard, which are
    those that one device has of a microbatch.
    """

    tokens: Any
    segments: Any
    ends: Any


def check_normalisation(fields: Mapping[str, Any], names: tuple[str, str], source: str) -> None:
    """Raises ValueError if a checkpoint states another mean or deviation than MEAN and STD."""
    for name, constant in zip(names, (MEAN, STD), strict=True):
        if name in fields and not np.allclose(fields[name], constant, atol=1e-3):
            raise ValueError(
                f"{source} normalises pixels by {name}={fields[name]}; this program always uses OpenAI's, "
                f"{constant.tolist()}"
            )


def check_resizing(resizing: Mapping[str, tuple[Any, Any]], source: str) -> None:
    """Raises ValueError if a checkpoint states another resizing or cropping than `preprocess_image` does.

    resizing: {field: (value, the value it has to have)}.
    """
    for name, (value, expected) in resizing.items():
        if value != expected:
            raise ValueError(
                f"{source} has {name}={value!r}, but this program resizes the short side, bicubic, and crops "
                f"the centre ({expected!r}), so the model would see other images than it was trained on. To "
                f"fine-tune it on such images, set {name} to {expected!r} in the file"
            )
