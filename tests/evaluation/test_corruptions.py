"""Corruptions, by the formulas of arXiv 1903.12261 written again."""

import colorsys
import io

import numpy as np
import pytest
from PIL import Image

from clipmoe_jax.evaluation import corruptions
from clipmoe_jax.evaluation.corruptions import CORRUPTIONS, corrupt

IMAGE = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
GREY = np.full((224, 224, 3), 128, np.uint8)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.__name__)
def test_a_corruption_grows_with_its_severity_and_is_the_same_again(corruption):
    smooth = np.asarray(Image.fromarray(IMAGE[:14, :14]).resize((224, 224), Image.Resampling.BICUBIC))
    changed = [corrupt(corruption, severity, smooth, 3) for severity in range(1, 6)]
    distance = [np.mean((image.astype(float) - smooth) ** 2) for image in changed]
    assert changed[0].dtype == np.uint8 and changed[0].shape == smooth.shape
    assert distance == sorted(distance) and distance[0] > 0 and len(set(distance)) == 5
    np.testing.assert_array_equal(corrupt(corruption, 2, smooth, 3), changed[1])
    is_noise = corruption.__name__.endswith("noise")
    assert np.array_equal(corrupt(corruption, 2, smooth, 4), changed[1]) != is_noise


def test_noise_has_the_moments_of_its_distribution():
    found = corrupt(corruptions.gaussian_noise, 1, GREY, 0) / 255
    assert found.mean() == pytest.approx(128 / 255, abs=2e-3) and found.std() == pytest.approx(0.08, rel=0.02)
    found = (
        corrupt(corruptions.shot_noise, 2, GREY, 0) / 255
    )  # the variance of a mean of photons is mean / 25
    assert found.mean() == pytest.approx(128 / 255, abs=2e-3)
    assert found.std() == pytest.approx(np.sqrt(128 / 255 / 25), rel=0.02)
    found = corrupt(corruptions.impulse_noise, 5, GREY, 0)
    assert np.mean(found == 0) == pytest.approx(0.135, abs=0.003) == np.mean(found == 255)
    assert np.mean(found == 128) == pytest.approx(0.73, abs=0.005)


def test_formulas_without_chance():
    part = IMAGE[:6, :6]
    brighter = corrupt(corruptions.brightness, 2, part, 0)
    for pixel, found in zip(part.reshape(-1, 3) / 255, brighter.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
        np.testing.assert_allclose(found, 255 * np.array(expected), atol=0.51)
    mean = IMAGE.mean(axis=(0, 1))
    np.testing.assert_allclose(
        corrupt(corruptions.contrast, 5, IMAGE, 0), (IMAGE - mean) * 0.05 + mean, atol=0.51
    )
    small = (
        Image.fromarray(IMAGE).resize((56, 56), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BOX)
    )
    np.testing.assert_array_equal(corrupt(corruptions.pixelate, 5, IMAGE, 0), np.asarray(small))
    Image.fromarray(IMAGE).save(file := io.BytesIO(), "JPEG", quality=7)
    np.testing.assert_array_equal(
        corrupt(corruptions.jpeg_compression, 5, IMAGE, 0), np.asarray(Image.open(file))
    )
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    blurred = corrupt(corruptions.gaussian_blur, 1, point, 0)
    weights = np.exp(-(np.arange(-20, 21) ** 2) / 2)
    np.testing.assert_allclose(blurred[20, :, 0], 255 * weights / weights.sum() ** 2, atol=0.51)


def test_black_brightens_to_grey():
    assert (corrupt(corruptions.brightness, 5, np.zeros((2, 2, 3), np.uint8), 0) == 128).all()
