"""A model as evaluations see it: data sets, pictures and sentences in, unit features out.

Letters: N images, T texts, d embedding.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipmoe_jax.data.decoding import map_decoding
from clipmoe_jax.data.loader import StreamedPairs
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder


class Subject:
    """An encoder with the tokenizer and the image size of its model."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, image_size: int, num_workers: int = 0):
        """num_workers: processes that decode data sets, as of `loader.batches`."""
        self.encoder = encoder
        self._tokenizer, self._image_size, self._num_workers = tokenizer, image_size, num_workers

    def images(self, records: Records) -> np.ndarray:
        """(N, d) float32: a data set's images, in order."""
        pairs = StreamedPairs(records, self._tokenizer, self._image_size)
        return self.encoder.pairs(pairs, towers=["image"], num_workers=self._num_workers)["image"]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(T, d) float32."""
        return self.encoder.texts(self._tokenizer(texts))

    def captions(self, records: Records) -> tuple[np.ndarray, np.ndarray]:
        """Every caption of a data set: (T, d) float32, and the image that it is of, (T,) int."""
        captions = [records[i]["captions"] for i in range(len(records))]
        image_of_text = np.repeat(np.arange(len(captions)), [len(of_one) for of_one in captions])
        return self.texts([caption for of_one in captions for caption in of_one]), image_of_text

    def pictures(self, files: Sequence[Path]) -> np.ndarray:
        """(N, d) float32: image files. Raises ValueError naming one that does not decode."""

        def decode(file: Path) -> np.ndarray:
            try:
                return preprocess_image(file.read_bytes(), self._image_size)
            except UnreadableImageError as error:
                raise ValueError(f"{file} does not decode: {error}") from error

        return self.encoder.images(np.stack(list(map_decoding(decode, files))))
