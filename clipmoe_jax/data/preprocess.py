"""CLIP's image preprocessing: encoded files in, uint8 pixels out, equal to OpenAI's transform.

Axis letters: H, W image height and width.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_ASPECT_RATIO = 500  # a line of 1x100,000 pixels would take gigabytes once its short side is 224


class UnreadableImageError(ValueError):
    """The image is broken, of an unknown format or absurdly large; the message is the reason."""


def preprocess_image(image: Image.Image | bytes, image_size: int) -> np.ndarray:
    """Resizes the short side to image_size (bicubic), crops the centre, converts to RGB.

    Bit equal to torchvision's Resize, CenterCrop and RGB conversion in the order OpenAI's CLIP
    applies them. Like them, it ignores EXIF orientation and takes an animation's first frame.

    Args:
        image: a PIL image, or the contents of an image file.
        image_size: pixels a side.

    Returns:
        uint8 (image_size, image_size, 3).

    Raises:
        UnreadableImageError: the image does not decode or has no RGB form.
    """
    if isinstance(image, bytes):
        image = decode_image(image)
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnreadableImageError(f"{width}x{height} pixels is too narrow to resize")
    if width != image_size or height != image_size:
        image = _resize_and_crop(image, image_size)
    try:
        return np.array(image.convert("RGB"))
    except ValueError as error:  # a few modes have no conversion, LAB in older Pillows
        raise UnreadableImageError(str(error)) from error


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file in full, in its own mode; 16 bits of grey become 8, which PIL clips to white.

    Raises:
        UnreadableImageError: broken, truncated, of an unknown format, or so many pixels that PIL
            takes it for a decompression bomb.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image file ({len(data):,} bytes)") from error
    except Exception as error:  # PIL's format plugins raise anything on a broken file
        raise UnreadableImageError(str(error) or type(error).__name__) from error
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image


def _resize_and_crop(image: Image.Image, image_size: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        image = _resize(image, image_size, int(image_size * height / width))
    else:
        image = _resize(image, int(image_size * width / height), image_size)
    left = int(round((image.width - image_size) / 2.0))  # rounds a half to even, as torchvision
    top = int(round((image.height - image_size) / 2.0))
    return image.crop((left, top, left + image_size, top + image_size))


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.height <= 2 * image.width:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    # Pillow 13 resizes tall images columns first, and rounding in between changes the pixels.
    # Rows first, by hand, gives every version those of the earlier ones. A transparent image
    # stays premultiplied on the way, as it does inside PIL.
    mode = image.mode
    if mode in ("RGBA", "LA"):
        image = image.convert(mode[:-1] + "a")
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
