"""All captions of a data set, each with the image that it belongs to."""

from typing import NamedTuple

import numpy as np

from clipmoe_jax.data.records import Records


class Captions(NamedTuple):
    """T captions.

    Attributes:
        texts: (T,), in the order of their images.
        image_of_text: (T,) int64, the index of each caption's record.
    """

    texts: list[str]
    image_of_text: np.ndarray


def read_captions(records: Records) -> Captions:
    """Reads every caption of a data set."""
    captions = [records[i]["captions"] for i in range(len(records))]
    image_of_text = np.repeat(np.arange(len(captions)), [len(of_one) for of_one in captions])
    return Captions([caption for of_one in captions for caption in of_one], image_of_text)
