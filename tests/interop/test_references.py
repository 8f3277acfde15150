"""Pixels and tokens against the libraries that CLIP's users have: torchvision and open_clip really run."""

import hashlib

import numpy as np
import pytest
from grids import exhaustive
from PIL import Image

from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer

MODES = ("RGB", "L", "LA", "RGBA", "CMYK", "P", "1")


def random_images(count, seed):
    """Noise of random sizes up to 5:1 and in random modes."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        short = int(rng.integers(8, 120))
        sides = [short, int(short * rng.uniform(1, 5))]
        width, height = rng.permutation(sides)
        rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
        mode = MODES[rng.integers(len(MODES))]
        yield rgba.convert(mode) if mode.endswith("A") else rgba.convert("RGB").convert(mode)


def test_pixels_equal_torchvisions_openai_transform():
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            lambda image: np.asarray(image.convert("RGB")),
        ]
    )
    for i, image in enumerate(random_images(300, seed=0)):
        # Pillow 13 resizes tall images columns first, which changes pixels; torchvision then follows it.
        if image.height <= 2 * image.width:
            found = preprocess_image(image, 32)
            np.testing.assert_array_equal(found, reference(image), err_msg=f"{i}: {image.mode} {image.size}")


def test_pixels_are_those_of_every_pillow():
    """Made with Pillow 13.0.0, the same with 10.4.0, 11.3.0 and 12.0.0, tall images among them."""
    digest = hashlib.sha256()
    for image in random_images(300, seed=1):
        digest.update(preprocess_image(image, 32).tobytes())
    assert digest.hexdigest() == "446a69bc7188a89029872fa7b9f22f5c39240f084e3e21516ab81cdc37af0193"


def random_texts(count, seed):
    """Letters, punctuation, digits, scripts, spaces, entities and emoji in random order."""
    rng = np.random.default_rng(seed)
    alphabets = [
        [chr(c) for c in range(32, 127)],
        [chr(c) for c in range(0xC0, 0x17F)],
        [chr(c) for c in range(0x410, 0x450)],
        [chr(c) for c in range(0x4E00, 0x4E80)],
        [chr(c) for c in range(0x1F600, 0x1F640)],
        list("  \t\n"),
        ["&amp;", "&lt;", "it's", "we'll", "don't", "…", "“", "”", "½", "ﬁ"],
    ]
    shares = np.array([0.7, 0.1, 0.05, 0.05, 0.02, 0.05, 0.03])
    for _ in range(count):
        kinds = rng.choice(len(alphabets), int(rng.integers(1, 60)), p=shares)
        yield "".join(alphabets[kind][rng.integers(len(alphabets[kind]))] for kind in kinds)


@exhaustive
@pytest.mark.parametrize("context_length", [77, 248])
def test_tokens_equal_open_clips_on_random_strings(context_length):
    open_clip = pytest.importorskip("open_clip")
    texts = list(random_texts(10_000, seed=context_length))
    reference = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)
    expected = reference(texts).numpy()
    found = Tokenizer(context_length)(texts)
    for text, a, b in zip(texts, found, expected, strict=True):
        assert a.tolist() == b.tolist(), repr(text)
