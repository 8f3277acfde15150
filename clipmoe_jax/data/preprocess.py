"""CLIP's image preprocessing: image files or PIL images in, uint8 pixels out, equal to OpenAI's transform.

Exported models carry this file: it needs numpy and Pillow alone. Axis letters: H, W image height and width.
"""

import functools
import io
import os
import re
import struct
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pixels that an image may have, unless the environment variable of this name says otherwise: those of an
# 8192x8192 one, more than full-frame cameras take. Decoding takes up to 24 bytes a pixel, in each thread.
MAX_PIXELS = "CLIPMOE_MAX_PIXELS"
DEFAULT_MAX_PIXELS = 2**26
# Pillow's own limits are higher, and its warning names no file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning, append=True)

TILE_WIDTH, TILE_LENGTH = 322, 323  # tags of a TIFF
# A JPEG is decoded once for each of its scans, of which encoders write 10 or so. Pillow skips the comments of
# a PPM of text one by one, and copies what follows each.
MAX_SCANS, MAX_COMMENTS = 100, 100
MAX_ASPECT_RATIO = 500  # a line of 1x100,000 pixels would take gigabytes once its short side is 224
# Pillow opens 16-bit grey as I;16, in these formats (PNG in older Pillows) as I, which has 32 bits.
FORMATS_OF_16_BITS = ("PPM", "PNG")
# Of Pillow's formats those that it decodes itself: for EPS, whatever the file's name, it runs Ghostscript.
# HEIF is there where pillow-heif has registered it. The header of an ICO does not bound its pixels. The first
# are those that Pillow imports for any file.
COMMON_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM")
OTHER_FORMATS = ("AVIF", "HEIF", "JPEG2000", "MPO", "PCX", "QOI", "TGA", "TIFF", "WEBP")


# Of a JPEG: what begins a segment with a length, or ends the image. Marker and length of a segment; the
# markers that a header has, those of a frame that is not progressive, and a scan's.
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xef\xfe]")
SEGMENT = struct.Struct(">HH")
OF_HEADER = frozenset((*range(0xFFC0, 0xFFD0), *range(0xFFDA, 0xFFF0), 0xFFFE))
SEQUENTIAL, SCAN = (0xFFC0, 0xFFC1, 0xFFC9), 0xFFDA


class UnreadableImageError(ValueError):
    """The image is broken, of an unknown format or absurdly large; the message is the reason."""


def preprocess_image(image: Image.Image | bytes, image_size: int) -> np.ndarray:
    """Resizes the short side to image_size (bicubic), crops the centre, converts to RGB.

    Bit equal to torchvision's Resize, CenterCrop and RGB conversion in the order OpenAI's CLIP applies them.
    Like them, it ignores EXIF orientation, shows the colours stored under transparency, and takes an
    animation's first frame.

    Args:
        image: a PIL image, or the contents of an image file; both give the same pixels.
        image_size: pixels a side.

    Returns:
        uint8 (image_size, image_size, 3).

    Raises:
        UnreadableImageError: as `decode_image`; the image is too narrow, or has no RGB form.
    """
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


def decode_image(image: Image.Image | bytes) -> Image.Image:
    """Decodes the contents of an image file, or what a PIL image has not read yet, in full.

    The result has the image's own mode, but for those that PIL cannot resize or convert to RGB rightly: 16
    bits of grey become 8 (PIL clips them to white), a palette with alpha (PA) becomes RGBA (PIL loses the
    palette).

    Raises:
        UnreadableImageError: broken, truncated, of none of `COMMON_FORMATS` and `OTHER_FORMATS`, of more than
            `max_pixels` pixels by its header, of scans or comments that take long to decode, or of a mode
            without a known range (I and F: 32 bits a pixel).
        ValueError: as `max_pixels`.
    """
    limit = max_pixels()
    size = f" ({len(image):,} bytes)" if isinstance(image, bytes) else ""
    if isinstance(image, bytes):
        _check_contents(image)
    try:
        opened = _opened(image) if isinstance(image, bytes) else image
        if (pixels := _num_pixels(opened)) > limit:
            raise UnreadableImageError(
                f"it has {pixels:,} pixels, of which {limit:,} may be decoded: make it smaller, or set the "
                f"environment variable {MAX_PIXELS}"
            )
        opened.load()
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"not an image file{size}") from error
    except Exception as error:  # PIL's format plugins raise anything on a broken file
        raise UnreadableImageError(str(error) or type(error).__name__) from error
    if opened.mode.startswith("I;16") or opened.mode == "I" and opened.format in FORMATS_OF_16_BITS:
        grey = np.array(opened, np.uint32)
        grey += 128  # a division that rounds
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8))
    if opened.mode in ("I", "F"):
        raise UnreadableImageError(
            f"pixels of mode {opened.mode} have no known range: scale them to 0 to 255 and make them mode L"
        )
    return opened.convert("RGBA") if opened.mode == "PA" else opened


def num_pixels(contents: bytes) -> int:
    """Returns the pixels that an image file has by its header, 0 if it is none."""
    try:
        return _num_pixels(_opened(contents))
    except Exception:  # PIL's format plugins raise anything on a broken file
        return 0


def max_pixels() -> int:
    """Returns how many pixels an image may have. Raises ValueError as `limit_of`."""
    return limit_of(MAX_PIXELS, DEFAULT_MAX_PIXELS)


def limit_of(variable: str, default: int) -> int:
    """Returns the limit that an environment variable sets. Raises ValueError if that is no whole number."""
    value = os.environ.get(variable)
    if not value:
        return default
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{variable}={value} is no whole number: set it to one such as {default}")
    return int(value)


def _check_contents(contents: bytes) -> None:
    """Raises UnreadableImageError for a file that takes long to decode, whatever its pixels are."""
    is_jpeg = contents.startswith(b"\xff\xd8")
    if is_jpeg and not _has_one_scan(contents) and _num_scans(contents) > MAX_SCANS:
        raise UnreadableImageError(f"a JPEG of more than {MAX_SCANS} scans: save it anew")
    if contents[:2] in (b"P1", b"P2", b"P3") and contents.count(b"#") > MAX_COMMENTS:
        raise UnreadableImageError(f"a PPM of more than {MAX_COMMENTS} comments: save it anew")


def _has_one_scan(contents: bytes) -> bool:
    """Returns whether a JPEG file is not progressive and its first scan has all colours, as most: nothing is
    decoded behind that. The header alone is read, and one with anything between its segments is not."""
    place, num_colours = 2, -1
    try:
        while True:
            marker, length = SEGMENT.unpack_from(contents, place)
            if marker == SCAN:
                return contents[place + 4] == num_colours
            if marker not in OF_HEADER:
                return False
            if marker in SEQUENTIAL:
                num_colours = contents[place + 9]
            place += 2 + length
    except (IndexError, struct.error):  # cut off
        return False


def _num_scans(contents: bytes) -> int:
    """Returns the scans of a JPEG file before its end, or MAX_SCANS + 1 if there are more."""
    place, scans = 2, 0
    while scans <= MAX_SCANS and (marker := MARKER.search(contents, place)) and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        place = marker.end() + int.from_bytes(contents[marker.end() : marker.end() + 2], "big")
    return scans


def _num_pixels(image: Image.Image) -> int:
    """Returns the pixels that are decoded, of the image or, if that is more, of one of a TIFF's tiles."""
    tags = getattr(image, "tag_v2", {})
    return max(image.width * image.height, tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0))


def _opened(contents: bytes) -> Image.Image:
    """Opens an image file. Raises UnidentifiedImageError for another format, or as PIL's plugins do."""
    try:
        return Image.open(io.BytesIO(contents), formats=COMMON_FORMATS)
    except UnidentifiedImageError:
        return Image.open(io.BytesIO(contents), formats=_other_formats())


@functools.cache
def _other_formats() -> list[str]:
    """Returns those of `OTHER_FORMATS` that this Pillow reads."""
    Image.init()  # slow: it imports them all
    return [name for name in OTHER_FORMATS if name in Image.OPEN]


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
