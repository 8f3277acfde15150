"""The way of images and captions to the device: decoding, preparing, reading, tokenising, packing.

    python -m benchmarks.data --images=600

Images are made up with the spectrum of natural ones (640 x 480, JPEG, some 165 KB as COCO's are). Rates are
of all cores unless said otherwise. Captions are taken to be 12 tokens long on average in COCO, 180 in
ShareGPT4V.
"""

import argparse
import dataclasses
import io
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipmoe_jax.data import loader
from clipmoe_jax.data.packing import pack, place_captions
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.samplers import ShuffledSampler
from clipmoe_jax.data.sources import Pair
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.models.clip import VARIANTS, Clip
from clipmoe_jax.models.inputs import END_ID, PackedText
from clipmoe_jax.models.transformer import ComputeConfig

WORDS = (
    "a the small red large wooden table next to window man dog holding standing blue sky with of on".split()
)


def natural_image(rng: np.random.Generator) -> bytes:
    """A JPEG file with a 1/f spectrum."""
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


def captions(rng: np.random.Generator, count: int, mean: float, deviation: float) -> list[str]:
    """Captions of about so many tokens."""
    lengths = np.clip(rng.normal(mean, deviation, count), 5, 300).astype(int)
    return [" ".join(rng.choice(WORDS, length - 2)) for length in lengths]


def rate(count: int, work: Callable[[], object]) -> float:
    """Things a second."""
    began = time.perf_counter()
    work()
    return count / (time.perf_counter() - began)


def read_epochs(folder: str) -> Callable[[int], None]:
    """Reads so many epochs of a prepared data set through the loader, in batches of 64."""
    records = Records(folder)
    pairs = loader.StreamedPairs(records, Tokenizer(248), 224, packing_steps=16)
    sampler = ShuffledSampler(len(records), 64, seed=0)

    def read(num_epochs: int) -> None:
        steps = num_epochs * sampler.num_steps
        with loader.batches(pairs, sampler, start_step=0, num_steps=steps, num_text_shards=1) as batches:
            for batch in batches:
                assert batch["image"].shape == (64, 224, 224, 3)

    return read


def wait_fraction(folder: str, images_per_second: float, num_epochs: int) -> float:
    """Share of the time that a loop waits for batches whose steps take as long as an accelerator of this
    speed takes for them; it leaves the host's cores alone, as an accelerator does."""
    records = Records(folder)
    pairs = loader.StreamedPairs(records, Tokenizer(248), 224, packing_steps=16)
    sampler, waited = ShuffledSampler(len(records), 64, seed=0), 0.0
    steps = num_epochs * sampler.num_steps
    with loader.batches(pairs, sampler, start_step=0, num_steps=steps, num_text_shards=1) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(steps - 1):
            time.sleep(64 / images_per_second)
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
        return waited / (time.perf_counter() - began)


def text_tower_seconds(tokens: np.ndarray | PackedText, rounds: int = 5) -> float:
    """Least time of ViT-B/32's text tower for a batch."""
    config = VARIANTS["ViT-B/32"]
    text = dataclasses.replace(config.text, context_length=248)
    model = Clip(dataclasses.replace(config, text=text), ComputeConfig(attention="chunked"))
    params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 248), jnp.int32))
    encode = jax.jit(lambda tokens: model.apply(params, tokens, method="encode_text")[0])
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        jax.block_until_ready(encode(tokens))
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    files = [natural_image(rng) for _ in range(args.images)]
    texts = {"COCO": captions(rng, args.images, 12, 3), "ShareGPT4V": captions(rng, args.images, 180, 45)}
    source = [Pair(str(i), files[i], (texts["ShareGPT4V"][i],)) for i in range(args.images)]
    found = {"cores": os.cpu_count(), "mean image KB": round(sum(map(len, files)) / args.images / 1e3)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found["decode and resize alone, images/s"] = rate(
            args.images, lambda: list(pool.map(lambda file: preprocess_image(file, 224), files))
        )
    with tempfile.TemporaryDirectory() as folder:
        for form, size in (("files", None), ("pixels", 224)):
            out = str(pathlib.Path(folder) / form)
            found[f"prepare to {form}, images/s"] = rate(
                args.images, lambda out=out, size=size: prepare(source, out, pixels=size)
            )
            epochs, read = 1 if size is None else 8, read_epochs(out)
            read(1)  # imports what it needs
            count = epochs * (args.images // 64 * 64)
            speed = rate(count, lambda read=read, epochs=epochs: read(epochs))
            found[f"read {form}, images/s"] = speed
            for share in (0.5, 0.8):
                name = f"{form}, input wait fraction at {share:.0%} of that speed"
                found[name] = wait_fraction(out, share * speed, epochs)
    tokenizer = Tokenizer(248)
    for name, of_set in texts.items():
        tokenizer(of_set[:10])
        began = time.process_time()
        tokens = tokenizer(of_set)
        found[f"tokenise {name}, captions/s/core"] = len(of_set) / (time.process_time() - began)
        batch = tokens[:32]
        lengths = (batch == END_ID).argmax(1) + 1
        packed = pack(batch, lengths, place_captions(lengths, 1, 248, steps=16), num_shards=1)
        ratio = text_tower_seconds(batch) / text_tower_seconds(packed)
        found[f"text tower, 32 of {name} in {len(packed.tokens)} rows, times as fast"] = ratio
    for name, value in found.items():
        print(f"{name:<70}{value:>12,.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
