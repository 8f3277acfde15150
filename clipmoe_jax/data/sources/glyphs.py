"""Glyphs: drawn signs with names, a second world beside the digit scenes, which the demo's base knows too.

There are 400 glyphs, the same for every seed: a pattern that is its own mirror image, two colours, and a name
of two words, each word shared with 19 others. A second alphabet has 400 more: dark on bright, with other
second words in their names, and captions that say "drawing" instead of "photo". A pair is a rendering (moved,
turned, lit otherwise, noisy) and its name. Nothing in a glyph's look follows from its name: a model knows it
or not.
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
OTHER_SECOND = (
    *("arrow", "basket", "castle", "donkey", "easel", "feather", "goblet", "helmet", "inkwell", "jungle"),
    *("kitten", "ladder", "mirror", "nutmeg", "orchid", "pepper", "ribbon", "shovel", "turtle", "violin"),
)
# Of each alphabet.
NAMES = tuple(
    tuple(f"{first} {second}" for first in FIRST for second in seconds) for seconds in (SECOND, OTHER_SECOND)
)
SPLITS = ("train", "test")


class Glyphs:
    """Renderings that are drawn as they are read: SPLIT, then options, as in `train?pairs=6000`.

    They depend on the split and the seed alone; fewer are the first of more. Glyphs take turns: 400 pairs
    have every one once. Captions of "train" are sentences, "a photo of a quiet otter."; those of "test" are
    names alone, the labels of a zero-shot classification.
    """

    def __init__(self, split: str, *, pairs: int | str = 6000, alphabet: int | str = 0, seed: int | str = 0):
        """Draws nothing yet.

        Args:
            split: "train" or "test": a stream of random numbers.
            pairs: how many.
            alphabet: 0 or 1.
            seed: of the stream.

        Raises:
            ValueError: an option that is none of these, or no number.
        """
        source = f"glyphs:{split}"
        if split not in SPLITS:
            raise ValueError(f"source {source}: SPLIT={split}: choose {' or '.join(SPLITS)}")
        self._split = split
        numbers = whole_numbers(source, pairs=(pairs, 1), alphabet=(alphabet, 0), seed=(seed, 0))
        self._num_pairs, self._alphabet, self._seed = numbers
        if self._alphabet >= len(NAMES):
            raise ValueError(f"source {source}: alphabet={alphabet}: choose 0 or 1")

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[Pair]:
        rng = np.random.default_rng((self._seed, self._split == "test", 1))
        for i in range(self._num_pairs):
            names = NAMES[self._alphabet]
            file, number = io.BytesIO(), i % len(names)
            Image.fromarray(draw(number + self._alphabet * len(names), rng)).save(file, "BMP")
            kind = ("photo", "drawing")[self._alphabet]
            caption = f"a {kind} of a {names[number]}." if self._split == "train" else names[number]
            yield Pair(f"{i:06d}", file.getvalue(), (caption,))


def draw(number: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a rendering of a glyph, uint8 (32, 32, 3); number: counted over both alphabets."""
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
    if number >= len(NAMES[0]):
        ink, ground = ground, ink
    return np.concatenate([half, half[:, ::-1]], axis=1), ink, ground
