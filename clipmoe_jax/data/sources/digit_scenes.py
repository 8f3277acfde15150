"""Digit scenes: handwriting composed into small captioned images, the demo's data.

Each 32 x 32 scene has eight attributes, drawn uniformly and independently. Its detailed caption names all of
them; its coarse caption, like alt-text on the web, mostly the three that are easiest to see. digits.npz has
the handwriting of scikit-learn's `load_digits` (UCI's Optical Recognition of Handwritten Digits) without the
second or two that scikit-learn takes to import; other samples serve for training than for test.
"""

import functools
import io
from collections.abc import Iterator
from importlib import resources

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from clipmoe_jax.data.sources.base import AttributeSpec, Pair
from clipmoe_jax.data.sources.options import whole_numbers

SIZE, BORDER, MARK = 32, 2, 5
NUM_TRAINING_DIGITS = 1200

INKS = {
    "white": (250, 250, 250),
    "yellow": (250, 235, 60),
    "pink": (255, 150, 190),
    "cyan": (90, 235, 240),
    "lime": (160, 250, 70),
    "peach": (255, 190, 130),
}
BACKGROUNDS = {
    "navy": (20, 25, 110),
    "maroon": (110, 15, 30),
    "forest": (15, 85, 35),
    "gray": (85, 85, 85),
    "black": (12, 12, 12),
    "plum": (95, 30, 95),
}
BORDERS = {
    "red": (225, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 80, 230),
    "orange": (250, 140, 20),
    "brown": (130, 80, 40),
    "teal": (20, 140, 140),
}
PURPLE = (170, 60, 220)
CORNERS = {"northwest": (0, 0), "northeast": (0, 1), "southwest": (1, 0), "southeast": (1, 1)}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANGLES = {"upright": 0, "clockwise": -35, "anticlockwise": 35}
PIXELS = {"small": 15, "large": 23}

# A prompt names one value alone, as zero-shot classification does.
ATTRIBUTES = {
    "ink": AttributeSpec("a {} digit", tuple(INKS)),
    "background": AttributeSpec("on {} background", tuple(BACKGROUNDS)),
    "border": AttributeSpec("with {} border", tuple(BORDERS)),
    "texture": AttributeSpec("on {} background", ("plain", "striped", "dotted", "checked")),
    "mark": AttributeSpec("mark {}", tuple(CORNERS)),
    "size": AttributeSpec("a {} digit", tuple(PIXELS)),
    "rotation": AttributeSpec("a digit {}", tuple(ANGLES)),
    "digit": AttributeSpec("a {}", DIGITS),
}
COARSE_PROBABILITY = {"ink": 0.9, "background": 0.9, "border": 0.9}
OTHER_PROBABILITY = 0.05

CAPTIONS = ("detailed", "coarse")
ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (2, 0, 1, 3))


class DigitScenes:
    """Scenes that are drawn as they are read: SPLIT, then options, as in `train?pairs=8000&captions=coarse`.

    The scenes and both captions of each depend on the split and the seed alone; fewer are the first of more.
    """

    attribute_table = ATTRIBUTES

    def __init__(
        self, split: str, *, pairs: int | str = 8000, captions: str = "detailed", seed: int | str = 0
    ):
        """Draws nothing yet.

        Args:
            split: "train" or "test": the handwriting, and a stream of random numbers.
            pairs: how many.
            captions: "detailed" or "coarse".
            seed: of the stream.

        Raises:
            ValueError: an option that is none of these, or no number.
        """
        for name, value, known in (("SPLIT", split, ("train", "test")), ("captions", captions, CAPTIONS)):
            if value not in known:
                raise ValueError(f"source digit_scenes:{split}: {name}={value}: choose {' or '.join(known)}")
        self._split, self._captions = split, captions
        numbers = whole_numbers(f"digit_scenes:{split}", pairs=(pairs, 1), seed=(seed, 0))
        self._num_pairs, self._seed = numbers

    def __len__(self) -> int:
        return self._num_pairs

    def __iter__(self) -> Iterator[Pair]:
        glyphs = _read_glyphs(self._split)
        rng = np.random.default_rng((self._seed, self._split == "test"))

        def choose(values):
            return values[rng.integers(len(values))]

        for i in range(self._num_pairs):
            scene = {name: choose(attribute.values) for name, attribute in ATTRIBUTES.items()}
            image, file = draw(scene, choose(glyphs[scene["digit"]]), rng), io.BytesIO()
            Image.fromarray(image).save(file, "BMP")  # a seventh larger than PNG, in a fifth of the time
            detailed = describe(scene, rng)
            seen = {
                name: value
                for name, value in scene.items()
                if rng.random() < COARSE_PROBABILITY.get(name, OTHER_PROBABILITY)
            }
            coarse = describe(seen, rng)  # drawn in any case: the next scene is the same for both captions
            caption = detailed if self._captions == "detailed" else coarse
            yield Pair(f"{i:06d}", file.getvalue(), (caption,), scene)


def draw(scene: dict[str, str], glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the image of a scene, uint8 (32, 32, 3); glyph uint8 (8, 8) of 0 to 16."""

    def colour(rgb):
        return np.array(rgb) / 255 * rng.uniform(0.8, 1.1)

    image = np.empty((SIZE, SIZE, 3))
    image[:] = colour(BACKGROUNDS[scene["background"]])
    image += 0.22 * _texture(scene["texture"])

    side = round(PIXELS[scene["size"]] * rng.uniform(0.95, 1.05))
    alpha = Image.fromarray(np.uint8(glyph / 16 * 255)).resize((side, side), Resampling.BILINEAR)
    canvas = Image.new("L", (SIZE, SIZE))
    offset = (SIZE - side) // 2 + rng.integers(-1, 2, size=2)
    canvas.paste(alpha, (int(offset[0]), int(offset[1])))
    canvas = canvas.rotate(ANGLES[scene["rotation"]] + rng.uniform(-6, 6), Resampling.BILINEAR)
    alpha = np.clip(np.asarray(canvas) / 255 * 1.5, 0, 1)[:, :, None]
    image = image * (1 - alpha) + alpha * colour(INKS[scene["ink"]])

    down, right = CORNERS[scene["mark"]]
    top, left = (SIZE - 2 * BORDER - MARK) * down + BORDER, (SIZE - 2 * BORDER - MARK) * right + BORDER
    image[top : top + MARK, left : left + MARK] = colour(PURPLE)
    edge = colour(BORDERS[scene["border"]])
    image[:BORDER], image[-BORDER:], image[:, :BORDER], image[:, -BORDER:] = (edge,) * 4
    image += rng.normal(0, 0.06, image.shape)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def describe(scene: dict[str, str], rng: np.random.Generator) -> str:
    """Returns a caption that names the attributes in `scene`, its phrases in one of four orders."""

    def words(*names):
        return " ".join(scene[name] for name in names if name in scene)

    subject = " ".join(filter(None, [words("size", "ink"), scene.get("digit", "digit"), words("rotation")]))
    ground, border, corner = words("texture", "background"), words("border"), words("mark")
    phrases = [
        f"a {subject}",
        f"on {ground} background" if ground else "",
        f"with {border} border" if border else "",
        f"mark {corner}" if corner else "",
    ]
    return " ".join(filter(None, (phrases[i] for i in ORDERS[rng.integers(len(ORDERS))])))


@functools.cache
def _read_glyphs(split: str) -> dict[str, np.ndarray]:
    """Returns {digit: uint8 (n, 8, 8) of 0 to 16}: its samples of handwriting."""
    with (
        resources.files("clipmoe_jax.data.sources").joinpath("digits.npz").open("rb") as file,
        np.load(file) as digits,
    ):
        part = slice(None, NUM_TRAINING_DIGITS) if split == "train" else slice(NUM_TRAINING_DIGITS, None)
        images, target = digits["images"][part], digits["target"][part]
    return {name: images[target == i] for i, name in enumerate(DIGITS)}


@functools.cache
def _texture(name: str) -> np.ndarray:
    """Returns the pattern, (32, 32, 1) of 0 and 1."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return {
        "plain": np.zeros((SIZE, SIZE)),
        "striped": (y // 2) % 2,
        "dotted": (y % 4 == 0) & (x % 4 == 0),
        "checked": (y // 4 + x // 4) % 2,
    }[name].astype(float)[:, :, None]
