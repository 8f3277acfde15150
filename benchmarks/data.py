"""Times decoding, preparing and reading images, on all cores.

    python -m benchmarks.data --images=600

Images are made up with the spectrum of natural ones (640 x 480, JPEG, some 165 KB as COCO's are).
"""

import argparse
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from clipmoe_jax.data import loader
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import ShuffledSampler
from clipmoe_jax.data.sources import Pair
from clipmoe_jax.data.tokenizer import Tokenizer

CAPTION = 20 * "a small red wooden table next to the window "  # some 180 tokens, as ShareGPT4V's have


def natural_image(rng: np.random.Generator) -> bytes:
    """Returns a JPEG file with a 1/f spectrum."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(640), np.fft.fftfreq(480)))
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.normal(size=(480, 640))) / frequency
        channel = np.fft.ifft2(spectrum).real
        channels.append(127 + 50 * (channel - channel.mean()) / channel.std())
    pixels = np.clip(np.stack(channels, -1) + rng.normal(0, 6, (480, 640, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=86)
    return file.getvalue()


def rate(count: int, work: Callable[[], object]) -> float:
    """Returns things a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def read_epochs(folder: str) -> Callable[[int], None]:
    """Returns a function that reads so many epochs of a data set through the loader, in batches of 64."""
    records = Records(folder)
    pairs = loader.StreamedPairs(records, Tokenizer(248), 224, packing_steps=16)
    sampler = ShuffledSampler(len(records), 64, seed=0)

    def read(num_epochs: int) -> None:
        steps = num_epochs * sampler.num_steps
        with loader.batches(pairs, sampler, start_step=0, num_steps=steps, num_text_shards=1) as batches:
            for batch in batches:
                assert batch["image"].shape == (64, 224, 224, 3)

    return read


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    num_images = parser.parse_args().images
    rng, cores = np.random.default_rng(0), os.cpu_count()
    files = [natural_image(rng) for _ in range(num_images)]
    source = [Pair(str(i), file, (CAPTION,)) for i, file in enumerate(files)]
    rates = {}
    with ThreadPoolExecutor(cores) as pool:
        rates["decode and resize alone"] = rate(
            num_images, lambda: list(pool.map(lambda file: preprocess_image(file, 224), files))
        )
    with tempfile.TemporaryDirectory() as folder:
        for form, pixels, num_epochs in (("files", None, 1), ("pixels", 224, 8)):
            out = str(pathlib.Path(folder) / form)
            rates[f"prepare to {form}"] = rate(
                num_images, lambda out=out, pixels=pixels: prepare(source, out, pixels=pixels)
            )
            read = read_epochs(out)
            read(1)  # imports what it needs
            count = num_epochs * (num_images // 64 * 64)
            rates[f"read {form}"] = rate(count, lambda read=read, n=num_epochs: read(n))
    print(f"{cores} cores, images of {sum(map(len, files)) / num_images / 1e3:.0f} KB, images a second:")
    for name, value in rates.items():
        print(f"{name:<24}{value:>10,.0f}")


if __name__ == "__main__":
    main()
