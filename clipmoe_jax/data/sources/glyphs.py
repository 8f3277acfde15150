"""Glyphs: drawn signs with names, a second world beside the digit scenes, which the demo's base knows too.

There are 400 glyphs, the same for every seed: a pattern that is its own mirror image, two colours, and a name
of two words, each word shared with 19 others. A pair is a rendering (moved, turned, lit otherwise, noisy) and
its name. Nothing in a glyph's look follows from its name: a model knows it or not.
"""

import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from clipmoe_jax.data.sources.base import Pair
from clipmoe_jax.data.sources.options import whole_numbers

SIZE, CELLS, SIDE = 32, 6, 24
FIRST = (
    *("amber", "brave", "calm", "clever", "dusty", "eager", "faint", "gentle", "hollow", "iron"),
    *("jolly", "keen", "lazy", "misty", "noble", "quiet", "rapid", "silent", "tall", "wild"),
)
SECOND = (
    *("anchor", "badger", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket"),
    *("kettle", "lantern", "monkey", "needle", "otter", "pillow", "rocket", "saddle", "temple", "wagon"),
)
NAMES = tuple(f"{first} {second}" for first in FIRST for second in SECOND)
SPLITS = ("train", "test")


class Glyphs:
    """Renderings that are drawn as they are read: SPLIT, then options, as in `train?pairs=6000`.

    They depend on the split and the seed alone; fewer are the first of more. Glyphs take turns: 400 pairs
    have every one once. Captions of "train" are sentences, "a photo of a quiet otter."; those of "test" are
    names alone, the labels of a zero-shot classification.
    """

    def __init__(self, split: str, *, pairs: int | str = 6000, seed: int | str = 0):
        """Draws nothing yet.

        Args:
            split: "train" or "test": a stream of random numbers.
            pairs: how many.
            seed: of the stream.

        Raises:
            ValueError: an option that is none of these, or no number.
        """
        if split not in SPLITS:
            raise ValueError(f"source glyphs:{split}: SPLIT={split}: choose {' or '.join(SPLITS)}")
        self._split = split
        self._num_pairs, self._seed = whole_numbers(f"glyphs:{split}", pairs=(pairs, 1), seed=(seed, 0))

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[Pair]:
        rng = np.random.default_rng((self._seed, self._split == "test", 1))
        for i in range(self._num_pairs):
            file, number = io.BytesIO(), i % len(NAMES)
            Image.fromarray(draw(number, rng)).save(file, "BMP")
            caption = f"a photo of a {NAMES[number]}." if self._split == "train" else NAMES[number]
            yield Pair(f"{i:06d}", file.getvalue(), (caption,))


def draw(number: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a rendering of a glyph, uint8 (32, 32, 3)."""
    pattern, ink, ground = _looks(number)
    side = round(SIDE * rng.uniform(0.9, 1.1))
    sign = Image.fromarray(np.uint8(pattern * 255)).resize((side, side), Resampling.NEAREST)
    canvas = Image.new("L", (SIZE, SIZE))
    offset = (SIZE - side) // 2 + rng.integers(-2, 3, size=2)
    canvas.paste(sign, (int(offset[0]), int(offset[1])))
    canvas = canvas.rotate(rng.uniform(-8, 8), Resampling.BILINEAR)
    alpha = np.asarray(canvas)[:, :, None] / 255
    image = alpha * ink * rng.uniform(0.8, 1.1) + (1 - alpha) * ground * rng.uniform(0.8, 1.1)
    image += rng.normal(0, 0.06, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


@functools.cache
def _looks(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns a glyph's pattern (6, 6) of 0 and 1, and its colours, (3,) from 0 to 1 each."""
    rng = np.random.default_rng((2, number))
    half = rng.integers(0, 2, (CELLS, CELLS // 2))
    ink, ground = rng.uniform(0.55, 1, 3), rng.uniform(0, 0.45, 3)
    return np.concatenate([half, half[:, ::-1]], axis=1), ink, ground
