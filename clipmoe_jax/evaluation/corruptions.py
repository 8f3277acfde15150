"""Corruptions of images at five severities, after Hendrycks and Dietterich (arXiv 1903.12261).

Of their families those that a formula defines: noise, a blur, brightness, contrast, boxes of pixels and JPEG.
Strengths are those that they publish for ImageNet-C: for 224 pixels a side. Images are corrupted as the model
takes them.

Letters: H, W image height and width.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
import scipy  # scipy.ndimage is imported where it is first used
from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)


def gaussian_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Adds normal noise of that standard deviation. As all below: (H, W, 3) float64 in 0 … 1, in and out,
    where what leaves the range is clipped after."""
    return image + rng.normal(0, strength, image.shape)


def shot_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Counts photons, of which white has that many."""
    return rng.poisson(image * strength) / strength


def impulse_noise(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Makes that share of values black or white."""
    drawn = rng.random(image.shape)
    return np.where(drawn < strength / 2, 0.0, np.where(drawn < strength, 1.0, image))


def gaussian_blur(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Blurs by that many pixels of standard deviation."""
    return scipy.ndimage.gaussian_filter(image, (strength, strength, 0), mode="nearest")


def brightness(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Adds to the value of HSV, the largest of a pixel's colours, and keeps hue and saturation."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + strength, 1)
    return np.where(value > 0, image * brighter / np.maximum(value, 1e-12), brighter)


def contrast(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Scales each colour's distance from its mean."""
    mean = image.mean(axis=(0, 1))
    return (image - mean) * strength + mean


def pixelate(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Shrinks to that share of the size and enlarges again, by boxes."""
    small = (max(1, int(image.shape[1] * strength)), max(1, int(image.shape[0] * strength)))
    picture = _picture(image).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize(image.shape[1::-1], Image.Resampling.BOX)) / 255


def jpeg_compression(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Compresses as JPEG of that quality."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=int(strength))
    return np.asarray(Image.open(file)) / 255


# The strengths of severities 1 to 5.
CORRUPTIONS: dict[Callable[..., np.ndarray], tuple[float, ...]] = {
    gaussian_noise: (0.08, 0.12, 0.18, 0.26, 0.38),
    shot_noise: (60, 25, 12, 5, 3),
    impulse_noise: (0.03, 0.06, 0.09, 0.17, 0.27),
    gaussian_blur: (1, 2, 3, 4, 6),
    brightness: (0.1, 0.2, 0.3, 0.4, 0.5),
    contrast: (0.4, 0.3, 0.2, 0.1, 0.05),
    pixelate: (0.6, 0.5, 0.4, 0.3, 0.25),
    jpeg_compression: (25, 18, 15, 10, 7),
}


def corrupt(
    corruption: Callable[..., np.ndarray], severity: int, image: np.ndarray, index: int
) -> np.ndarray:
    """Returns an image with a corruption of CORRUPTIONS at a severity from 1 to 5, uint8 (H, W, 3) both.

    index: of the image in its data set; noise depends on it, the corruption and the severity alone.
    """
    rng = np.random.default_rng((zlib.crc32(corruption.__name__.encode()), severity, index))
    changed = corruption(image / 255, CORRUPTIONS[corruption][severity - 1], rng)
    return np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(image * 255).astype(np.uint8))
