"""OpenAI's image preprocessing for transformers, pixel for pixel.

CLIPImageProcessor crops one pixel beside OpenAI's CLIP where the margin is 3 modulo 4 (640 x 427 is such a
size), and with torchvision it resizes otherwise. `clipmoe_jax` writes this file and preprocess.py beside the
weights that it exports; they need only numpy, Pillow and transformers. Licence: Apache-2.0.

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from .preprocess import preprocess_image

# Who asks for one of these gets CLIPImageProcessor's steps.
OTHER_STEPS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_convert_rgb")


class OpenAICLIPImageProcessor(CLIPImageProcessor):
    """Resizes, crops and converts as OpenAI's code; rescales and normalises as CLIPImageProcessor."""

    def preprocess(self, images, *args, **kwargs):
        """Returns pixel_values. images: PIL images or uint8 arrays, one or several.

        Raises ValueError for names of files and for arrays of another type, whose values may have any range.
        """
        if all(kwargs.get(name) is None for name in OTHER_STEPS):
            side = self.crop_size["height"]
            flat: Any = make_flat_list_of_images(images)
            images = [Image.fromarray(preprocess_image(_as_pil(image), side)) for image in flat]
            kwargs |= {"do_resize": False, "do_center_crop": False}
        return super().preprocess(images, *args, **kwargs)


def _as_pil(image):
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"images are arrays of {array.dtype}: give PIL images or uint8 arrays")
    return to_pil_image(array)
