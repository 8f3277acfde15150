"""The image processor of exported models against our preprocessing, as transformers loads it."""

import json

import jax
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, CLIPImageProcessor

from clipmoe_jax.convert import convert
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import ClipConfig, TextConfig, VisionConfig, abstract_params
from clipmoe_jax.models.inputs import MEAN, STD
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import MoeConfig

# At 32 pixels: every margin up to 8 along either axis, none, and photographs' shapes.
SIZES = [
    *((32 + margin, 32) for margin in range(9)),
    *((32, 32 + margin) for margin in range(1, 9)),
    *((640, 427), (427, 640), (640, 480), (500, 333), (1024, 683), (40, 81), (31, 997), (20, 17)),
]


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def assert_same_pixels(found, images):
    pixels = np.stack([preprocess_image(image, 32) for image in images])
    expected = ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # a level of 255 is 0.015


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A dense model for transformers, and a CLIP-MoE with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("exported")
    for kind, vocab_size, moe in (("dense", 49408, None), ("moe", 9, MoeConfig(4, 2))):
        config = ClipConfig(
            embed_dim=8,
            vision=VisionConfig(image_size=32, patch_size=16, width=8, num_layers=1, head_width=8),
            text=TextConfig(vocab_size, width=8, num_layers=1, head_width=8),
            moe=moe,
        )
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(config))
        save_model(epath.Path(folder / f"{kind}_run"), config, params)
        convert(str(folder / f"{kind}_run"), "huggingface", str(folder / kind))
    return folder


@pytest.fixture(scope="module")
def processor(exported):
    return AutoImageProcessor.from_pretrained(exported / "dense", trust_remote_code=True)


def test_pixels_of_every_shape_are_those_of_training(processor):
    images = [noise(*size) for size in SIZES]
    assert_same_pixels(processor(images, return_tensors="np")["pixel_values"], images)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_pixels_of_every_mode_are_those_of_training(processor, mode):
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (41, 50)).astype(np.uint16))
    else:
        image = noise(50, 41, mode)
    assert_same_pixels(processor(image, return_tensors="np")["pixel_values"], [image])


def test_arrays_of_bytes_are_images(processor):
    image = noise(50, 41)
    array = np.asarray(image)
    for given in (array, array.transpose(2, 0, 1), torch.tensor(array), [array]):
        assert_same_pixels(processor(given, return_tensors="np")["pixel_values"], [image])
    with pytest.raises(ValueError, match="images are arrays of float32: give PIL images or uint8 arrays"):
        processor(array.astype(np.float32))
    with pytest.raises(ValueError, match="photo.jpg"):
        processor("photo.jpg")


def test_who_asks_for_other_steps_gets_them(exported, processor):
    image = noise(50, 41)
    theirs = CLIPImageProcessor.from_pretrained(exported / "dense")
    for steps in ({"do_center_crop": False}, {"crop_size": {"height": 16, "width": 24}}, {"resample": 2}):
        found, expected = (
            p(image, return_tensors="np", **steps)["pixel_values"] for p in (processor, theirs)
        )
        np.testing.assert_array_equal(found, expected)
    raw = processor(image, return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
    np.testing.assert_array_equal(raw.transpose(1, 2, 0), preprocess_image(image, 32))


def test_without_trust_a_dense_model_has_transformers_processor_and_a_moe_none(exported):
    """Dense exports stay usable by programs that know CLIP and run no code of others."""
    assert type(AutoImageProcessor.from_pretrained(exported / "dense")).__module__.startswith("transformers.")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoImageProcessor.from_pretrained(exported / "moe", trust_remote_code=False)


@pytest.mark.parametrize(("auto", "kind"), [(AutoProcessor, "dense"), (AutoImageProcessor, "moe")])
def test_what_transformers_saves_is_the_same_again(exported, tmp_path, auto, kind):
    """Its code goes with it, and we read the folder."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).symlink_to(exported / kind / file)
    loaded, image = auto.from_pretrained(exported / kind, trust_remote_code=True), noise(640, 427)
    assert_same_pixels(loaded(images=image, return_tensors="np")["pixel_values"], [image])
    loaded.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert_same_pixels(again(image, return_tensors="np")["pixel_values"], [image])
    assert read_model(str(tmp_path)).config == read_model(str(exported / kind)).config
    described = [json.loads(path.read_text()) for path in tmp_path.glob("*processor_config.json")]
    assert any("OpenAICLIPImageProcessor" in json.dumps(fields) for fields in described)
