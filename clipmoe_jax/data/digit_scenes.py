"""Digit scenes: handwriting composed into small captioned images, the demo's data.

Each 32 x 32 scene has eight attributes, drawn uniformly and independently. Its detailed caption names all of
them; its coarse caption, like alt-text on the web, mostly the three that are easiest to see. digits.npz has
the handwriting of scikit-learn's `load_digits` (UCI's Optical Recognition of Handwritten Digits) without the
second or two that scikit-learn takes to import; other samples serve for training than for test.
"""

import functools
import io
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipmoe_jax.data.sources import Pair

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

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "ink": tuple(INKS),
    "background": tuple(BACKGROUNDS),
    "border": tuple(BORDERS),
    "texture": ("plain", "striped", "dotted", "checked"),
    "mark": tuple(CORNERS),
    "size": tuple(PIXELS),
    "rotation": tuple(ANGLES),
    "digit": DIGITS,
}
COARSE_PROBABILITY = {"ink": 0.9, "background": 0.9, "border": 0.9}
OTHER_PROBABILITY = 0.05

# A phrase for each value, alone: what zero-shot classification asks.
PROMPTS = {
    "ink": "a {} digit",
    "background": "on {} background",
    "border": "with {} border",
    "texture": "on {} background",
    "mark": "mark {}",
    "size": "a {} digit",
    "rotation": "a digit {}",
    "digit": "a {}",
}
ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (3, 0, 1, 2), (2, 0, 1, 3))


class Scene(NamedTuple):
    """image: a BMP file. attributes: a value of each of ATTRIBUTES."""

    image: bytes
    attributes: dict[str, str]
    detailed: str
    coarse: str


def make_scenes(num_scenes: int, *, split: str, seed: int) -> list[Scene]:
    """Draws scenes. split: "train" or "test", which handwriting to use and which random numbers; ValueError
    for another."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: choose 'train' or 'test'")
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as digits:
        part = slice(None, NUM_TRAINING_DIGITS) if split == "train" else slice(NUM_TRAINING_DIGITS, None)
        images, target = digits["images"][part], digits["target"][part]
    glyphs = {name: images[target == i] for i, name in enumerate(DIGITS)}
    rng = np.random.default_rng((seed, split == "test"))

    def choose(values):
        return values[rng.integers(len(values))]

    scenes = []
    for _ in range(num_scenes):
        scene = {name: choose(values) for name, values in ATTRIBUTES.items()}
        image, file = draw(scene, choose(glyphs[scene["digit"]]), rng), io.BytesIO()
        Image.fromarray(image).save(file, "BMP")  # a seventh larger than PNG, in a fifth of the time
        detailed = describe(scene, rng)
        seen = {a: v for a, v in scene.items() if rng.random() < COARSE_PROBABILITY.get(a, OTHER_PROBABILITY)}
        scenes.append(Scene(file.getvalue(), scene, detailed, describe(seen, rng)))
    return scenes


def pairs(scenes: Sequence[Scene], caption: str) -> list[Pair]:
    """What `prepare` reads. caption: "detailed" or "coarse"."""
    return [Pair(f"{i:06d}", scene.image, (getattr(scene, caption),)) for i, scene in enumerate(scenes)]


def draw(scene: dict[str, str], glyph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One scene, uint8 (32, 32, 3); glyph uint8 (8, 8) of 0 to 16."""

    def colour(rgb):
        return np.array(rgb) / 255 * rng.uniform(0.8, 1.1)

    image = np.empty((SIZE, SIZE, 3))
    image[:] = colour(BACKGROUNDS[scene["background"]])
    image += 0.22 * _texture(scene["texture"])

    side = round(PIXELS[scene["size"]] * rng.uniform(0.95, 1.05))
    alpha = Image.fromarray(np.uint8(glyph / 16 * 255)).resize((side, side), Image.BILINEAR)
    canvas = Image.new("L", (SIZE, SIZE))
    offset = (SIZE - side) // 2 + rng.integers(-1, 2, size=2)
    canvas.paste(alpha, tuple(int(o) for o in offset))
    canvas = canvas.rotate(ANGLES[scene["rotation"]] + rng.uniform(-6, 6), Image.BILINEAR)
    alpha = np.clip(np.asarray(canvas) / 255 * 1.5, 0, 1)[:, :, None]
    image = image * (1 - alpha) + alpha * colour(INKS[scene["ink"]])

    down, right = CORNERS[scene["mark"]]
    top, left = (SIZE - 2 * BORDER - MARK) * down + BORDER, (SIZE - 2 * BORDER - MARK) * right + BORDER
    image[top : top + MARK, left : left + MARK] = colour(PURPLE)
    edge = colour(BORDERS[scene["border"]])
    image[:BORDER], image[-BORDER:], image[:, :BORDER], image[:, -BORDER:] = (edge,) * 4
    image += rng.normal(0, 0.06, image.shape)
    return np.uint8(np.clip(image, 0, 1) * 255)


def describe(scene: dict[str, str], rng: np.random.Generator) -> str:
    """A caption that names the attributes that `scene` has, phrases in one of four orders."""

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
def _texture(name: str) -> np.ndarray:
    """(32, 32, 1) of 0 and 1."""
    y, x = np.mgrid[:SIZE, :SIZE]
    return {
        "plain": np.zeros((SIZE, SIZE)),
        "striped": (y // 2) % 2,
        "dotted": (y % 4 == 0) & (x % 4 == 0),
        "checked": (y // 4 + x // 4) % 2,
    }[name].astype(float)[:, :, None]
