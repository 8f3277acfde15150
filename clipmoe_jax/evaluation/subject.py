"""A model as evaluations see it: data sets, image files and sentences in, unit features out.

Letters: N images, T texts, d embedding, M models.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from clipmoe_jax.data.decoding import map_decoding, preprocess_file
from clipmoe_jax.data.loader import Pairs, StreamedPairs, decode
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder

# From an image as a model takes it, uint8 (H, W, 3), and its index to another.
Change = Callable[[np.ndarray, int], np.ndarray]


class Subject(Protocol):
    """A model, as far as evaluations ask."""

    def images(self, records: Records) -> np.ndarray:
        """Returns (N, d) float32 unit features of a data set's images, in order."""
        ...

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (T, d) float32 unit features."""
        ...

    def pictures(self, files: Sequence[Path]) -> np.ndarray:
        """Returns (N, d) float32 unit features of image files. Raises ValueError if one is broken."""
        ...

    def changed_images(self, records: Records, change: Change) -> np.ndarray:
        """Returns (N, d) float32 unit features of a data set's images, in order, each changed before it is
        encoded."""
        ...


class ModelSubject:
    """An encoder with the tokenizer and the image size of its model."""

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        image_size: int,
        num_workers: int = 0,
        open_pairs: Callable[[Records], Pairs] | None = None,
    ):
        """num_workers: processes that decode data sets, as of `loader.batches`. open_pairs: opens a data set
        at the image size; None streams it, decoded anew by each subject."""
        self.encoder = encoder
        self._tokenizer, self._image_size, self._num_workers = tokenizer, image_size, num_workers
        self._open_pairs = open_pairs or (lambda records: StreamedPairs(records, tokenizer, image_size))
        self._image_features: dict[tuple[str, str], np.ndarray] = {}  # several evaluations share a data set

    def images(self, records: Records) -> np.ndarray:
        """Returns (N, d) float32 unit features of a data set's images, in order. Encodes each once."""
        key = records.path, records.split
        if key not in self._image_features:
            pairs = self._open_pairs(records)
            features = self.encoder.pairs(pairs, inputs=["image"], num_workers=self._num_workers)
            self._image_features[key] = features["image"]
        return self._image_features[key]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (T, d) float32 unit features, the same of equal texts: each is encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return self.encoder.texts(self._tokenizer(list(rows)))[[rows[text] for text in texts]]

    def pictures(self, files: Sequence[Path]) -> np.ndarray:
        """Returns (N, d) float32 unit features of image files. Raises ValueError if one is broken.

        Each file is read once, and a few batches are in memory at a time.
        """
        rows = {file: row for row, file in enumerate(dict.fromkeys(files))}
        images = map_decoding(lambda file: preprocess_file(file, self._image_size), rows)
        return self._encoded(images)[[rows[file] for file in files]]

    def changed_images(self, records: Records, change: Change) -> np.ndarray:
        """Returns (N, d) float32 unit features of a data set's images, in order, each changed before it is
        encoded. A few batches are in memory at a time."""

        def changed(index: int) -> np.ndarray:
            return change(decode(records[index], index, self._image_size), index)

        return self._encoded(map_decoding(changed, range(len(records))))

    def _encoded(self, images: Iterator[np.ndarray]) -> np.ndarray:
        """Returns unit features of images, a batch at a time."""
        features = []
        while batch := list(itertools.islice(images, self.encoder.batch_size)):
            features.append(self.encoder.images(np.stack(batch)))
        return np.concatenate(features)


class EnsembleSubject:
    """Several models as one: their features side by side, whose similarity is the mean of the models'."""

    def __init__(self, members: Sequence[Subject]):
        self._members = members

    def images(self, records: Records) -> np.ndarray:
        """Returns (N, M * d) float32 unit features of a data set's images, in order."""
        return self._joined(lambda member: member.images(records))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (T, M * d) float32 unit features."""
        return self._joined(lambda member: member.texts(texts))

    def pictures(self, files: Sequence[Path]) -> np.ndarray:
        """Returns (N, M * d) float32 unit features of image files."""
        return self._joined(lambda member: member.pictures(files))

    def changed_images(self, records: Records, change: Change) -> np.ndarray:
        """Returns (N, M * d) float32 unit features of a data set's images, in order, each changed before it
        is encoded."""
        return self._joined(lambda member: member.changed_images(records, change))

    def _joined(self, encode: Callable[[Subject], np.ndarray]) -> np.ndarray:
        features = np.concatenate([encode(member) for member in self._members], axis=1)
        return features / np.float32(np.sqrt(len(self._members)))
