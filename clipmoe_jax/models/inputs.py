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


def check_preprocessing(fields: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Raises ValueError naming all fields by which a checkpoint prepares images otherwise than this program.

    fields: what the file `source` says; a field that is absent or None has the expected value. expected: the
    value that each field must have; numbers may be rounded.
    """
    odd = {
        name: value
        for name, ours in expected.items()
        if (value := fields.get(name)) is not None and value != ours and not _is_rounded(value, ours)
    }
    if odd:
        has = ", ".join(f"{name}={value!r}" for name, value in odd.items())
        wants = ", ".join(f"{name}={expected[name]!r}" for name in odd)
        raise ValueError(
            f"{source} has {has}, so the model was trained on other images than this program makes, which "
            f"has {wants}. To fine-tune it on such images, set these fields so in the file"
        )


def _is_rounded(value: Any, ours: Any) -> bool:
    numbers = np.ndim(ours) == 1 or isinstance(ours, float)
    try:
        return numbers and bool(np.allclose(value, ours, rtol=3e-3, atol=0))
    except (TypeError, ValueError):  # no numbers, or not as many
        return False
