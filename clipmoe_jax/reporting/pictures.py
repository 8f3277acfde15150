"""Images of a data set, small: as data URIs, with maps of experts to lay over them, and on one sheet.

Letters: H, W image height and width, G patches along a side.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from clipmoe_jax.core.terminal import shortened
from clipmoe_jax.data.preprocess import decode_image

# Expert 0, the base, is grey. The rest: Okabe and Ito's colours, which the colour-blind tell apart
# (https://jfly.uni-koeln.de/color/), from the strongest; then two of Paul Tol's.
EXPERT_COLOURS = (
    "#8a8f98",
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#56b4e9",
    "#f0e442",
    "#882255",
    "#999933",
)
OVERLAY_ALPHA = 0.5
PIXEL_ART = 64  # images up to this size are shown as they are, pixel by pixel


def thumbnail(record_image: bytes | np.ndarray, size: int = 176) -> str:
    """Returns a data URI of an image file's bytes or of pixels uint8 (H, W, 3), sides at most `size`."""
    image = _decoded(record_image)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _data_uri(image, "PNG" if max(image.size) <= PIXEL_ART else "JPEG")


def contact_sheet(record_images: Sequence[bytes | np.ndarray], labels: Sequence[str]) -> Image.Image:
    """Returns images in rows of five, each with its label below it; a long one loses its middle.

    Images are those of `thumbnail`, of which small ones are enlarged.
    """
    side, line, gap = 200, 20, 8
    columns = min(5, len(record_images))
    rows = -(-len(record_images) // columns)
    size = columns * (side + gap) + gap, rows * (side + line + gap) + gap
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (record_image, label) in enumerate(zip(record_images, labels, strict=True)):
        row, column = divmod(number, columns)
        left, top = gap + column * (side + gap), gap + row * (side + line + gap)
        image = _decoded(record_image)
        method = Image.Resampling.NEAREST if max(image.size) <= PIXEL_ART else Image.Resampling.LANCZOS
        image = ImageOps.contain(image, (side, side), method)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
        while draw.textlength(label, font) > side:
            label = shortened(label, len(label) - 1)
        draw.text((left, top + side + 2), label, "black", font)
    return sheet


def _decoded(record_image: bytes | np.ndarray) -> Image.Image:
    is_file = isinstance(record_image, bytes)
    image = decode_image(record_image) if is_file else Image.fromarray(record_image)
    return image.convert("RGB")


def overlay(experts: np.ndarray) -> str:
    """Returns a data URI of a picture that tints each patch by its expert, one pixel a patch: int (G, G)."""
    rgb = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in EXPERT_COLOURS]
    alpha = np.full((*experts.shape, 1), round(255 * OVERLAY_ALPHA), np.uint8)
    tint = np.array(rgb, np.uint8)[experts % len(rgb)]
    return _data_uri(Image.fromarray(np.concatenate([tint, alpha], axis=-1)), "PNG")


def _data_uri(image: Image.Image, form: str) -> str:
    out = io.BytesIO()
    image.save(out, form, optimize=True, **({"quality": 80} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
