"""Images of a data set as small data URIs, and maps of experts to lay over them.

Letters: H, W image height and width, G patches along a side.
"""

import base64
import io

import numpy as np
from PIL import Image

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
    if isinstance(record_image, bytes):
        image = decode_image(record_image)
    else:
        image = Image.fromarray(record_image)
    image = image.convert("RGB")
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    return _data_uri(image, "PNG" if max(image.size) <= PIXEL_ART else "JPEG")


def overlay(experts: np.ndarray) -> str:
    """Returns a data URI of a picture that tints each patch by its expert, one pixel a patch: int (G, G)."""
    rgb = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in EXPERT_COLOURS]
    alpha = np.full((*experts.shape, 1), round(255 * OVERLAY_ALPHA), np.uint8)
    return _data_uri(
        Image.fromarray(np.concatenate([np.array(rgb, np.uint8)[experts], alpha], axis=-1)), "PNG"
    )


def _data_uri(image: Image.Image, form: str) -> str:
    out = io.BytesIO()
    image.save(out, form, optimize=True, **({"quality": 80} if form == "JPEG" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"
