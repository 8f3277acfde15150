"""Preprocessing against torchvision's documented steps, written out in plain PIL."""

import io

import numpy as np
import pytest
from PIL import Image

from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image

BICUBIC = Image.Resampling.BICUBIC


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
    return rgba.convert(mode) if mode.endswith("A") else rgba.convert("RGB").convert(mode)


def encode(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def reference(image, size):
    """Resize(size, BICUBIC), CenterCrop(size), convert("RGB") as torchvision documents them."""
    width, height = image.size
    if width <= height:
        width, height = size, int(size * height / width)
    else:
        width, height = int(size * width / height), size
    pixels = np.asarray(image.resize((width, height), BICUBIC).convert("RGB"))
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("width", "height"),
    [(64, 48), (48, 64), (32, 32), (33, 32), (500, 33), (40, 80), (7, 9), (31, 31), (2, 1)],
)
def test_pixels_equal_torchvisions(width, height):
    image = noise(width, height)
    pixels = preprocess_image(image, 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, reference(image, 32))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_other_modes_become_rgb_last(mode):
    image = noise(61, 47, mode)
    pixels = preprocess_image(image, 32)
    np.testing.assert_array_equal(pixels, reference(image, 32))
    if mode not in ("L", "CMYK"):  # where converting first is something else
        assert (pixels != preprocess_image(image.convert("RGB"), 32)).any()


# The crop starts at round((long - short) / 2), a half to the even side: torchvision's rule.
# It parts from (long - short) // 2 where the difference is 3 modulo 4: 7 and 11 here.
@pytest.mark.parametrize(
    ("long", "start"),
    [(4, 0), (5, 0), (6, 1), (7, 2), (8, 2), (9, 2), (10, 3), (11, 4)],
)
@pytest.mark.parametrize("axis", ["width", "height"])
def test_crop_rounds_as_torchvision(long, start, axis):
    ramp = np.tile(np.arange(long, dtype=np.uint8), (4, 1))
    image = Image.fromarray(ramp if axis == "width" else np.ascontiguousarray(ramp.T))
    pixels = preprocess_image(image, 4)  # the short side is 4 already: nothing is resampled
    line = pixels[0, :, 0] if axis == "width" else pixels[:, 0, 0]
    assert line.tolist() == [start, start + 1, start + 2, start + 3]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P"])
@pytest.mark.parametrize(("width", "height"), [(40, 81), (40, 200), (10, 300), (100, 900)])
def test_tall_images_are_resized_rows_first(width, height, mode):
    # Every Pillow resizes an image whose height stays the same along its rows alone, and one whose
    # width stays along its columns alone; alpha is premultiplied around both.
    image = noise(width, height, mode)
    premultiplied = image.convert({"RGBA": "RGBa", "LA": "La"}.get(mode, mode))
    new_height = int(32 * height / width)
    rows = premultiplied.resize((32, height), BICUBIC)
    both = rows.resize((32, new_height), BICUBIC).convert(mode).convert("RGB")
    top = int(round((new_height - 32) / 2.0))
    np.testing.assert_array_equal(preprocess_image(image, 32), np.asarray(both)[top : top + 32])


def test_file_contents_and_images_give_the_same():
    image = noise(50, 40)
    np.testing.assert_array_equal(preprocess_image(encode(image), 32), preprocess_image(image, 32))


GREY = noise(50, 40, "L")
DEEP = np.asarray(GREY).astype(np.uint16) * 257
# 16 bits of grey, by how Pillow holds them.
DEEP_IMAGES = {
    "I;16": Image.fromarray(DEEP),
    "I;16B": Image.frombytes("I;16B", GREY.size, DEEP.astype(">u2").tobytes()),
    "PNG": encode(Image.fromarray(DEEP)),
    "TIFF": encode(Image.fromarray(DEEP), "TIFF"),
    "JPEG 2000": encode(Image.fromarray(DEEP), "JPEG2000"),
    "PGM, which Pillow opens as I": encode(Image.fromarray(DEEP), "PPM"),
    "PGM of 10 bits": b"P5 50 40 1023\n" + (DEEP >> 6).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("deep", DEEP_IMAGES.values(), ids=DEEP_IMAGES)
def test_16_bits_of_grey_are_as_bright_as_8(deep):
    """From a file, from a PIL image that is not read yet, from one that is."""
    forms = [deep]
    if isinstance(deep, bytes):
        forms += [Image.open(io.BytesIO(deep)), Image.open(io.BytesIO(deep))]
        forms[-1].load()
    for form in forms:
        np.testing.assert_array_equal(preprocess_image(form, 32), preprocess_image(GREY, 32))


def test_a_palette_with_alpha_keeps_its_colours():
    """PIL loses the palette of mode PA when it resizes."""
    image = Image.new("RGB", (50, 40), (204, 102, 51)).convert("P").convert("PA")
    assert preprocess_image(image, 32).std(axis=(0, 1)).max() == 0
    assert preprocess_image(image, 32)[0, 0].tolist() == [204, 102, 51]


OPAQUE = Image.new("RGBA", (50, 40), (204, 204, 204, 255))
GREYS = {
    **{mode: OPAQUE.convert(mode) for mode in ("RGBA", "LA", "PA", "RGBa")},
    **{
        mode: OPAQUE.convert("RGB").convert(mode)
        for mode in ("RGB", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX")
    },
    "LAB": OPAQUE.convert("RGB").convert("LAB"),
    **{mode: Image.new(mode, (50, 40), 204 * 257) for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
}


@pytest.mark.parametrize("image", GREYS.values(), ids=GREYS)
def test_a_grey_stays_one_in_every_mode(image):
    np.testing.assert_allclose(preprocess_image(image, 32).astype(int), 204, atol=1)


def test_exif_orientation_is_ignored():
    image, exif = noise(50, 40), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(preprocess_image(file.getvalue(), 32), preprocess_image(image, 32))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert preprocess_image(file.getvalue(), 32)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        pytest.param(b"", "not an image file", id="empty"),
        pytest.param(b"<html>404</html>", "not an image file", id="a web page"),
        pytest.param(encode(noise(64, 64))[:3000], "truncated", id="truncated PNG"),
        pytest.param(encode(noise(64, 64), "JPEG")[:900], "truncated", id="truncated JPEG"),
        pytest.param(encode(Image.new("1", (20000, 20000))), "decompression bomb", id="bomb"),
        pytest.param(encode(Image.new("L", (1, 501))), "too narrow", id="a line of pixels"),
        pytest.param(Image.new("La", (9, 9)), "conversion from La", id="no RGB form"),
        pytest.param(Image.new("I", (9, 9)), "mode I have no known range: scale", id="integers of 32 bits"),
        pytest.param(Image.new("F", (9, 9)), "mode F have no known range: scale", id="floats"),
        pytest.param(encode(Image.new("F", (9, 9)), "TIFF"), "mode F have no known", id="a file of floats"),
        pytest.param(Image.open(io.BytesIO(encode(noise(64, 64))[:3000])), "truncated", id="not read yet"),
    ],
)
def test_unreadable_images_say_why(image, reason):
    with pytest.raises(UnreadableImageError, match=reason):
        preprocess_image(image, 32)
