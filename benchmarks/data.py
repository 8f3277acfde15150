"""Times decoding, preparing and reading images, on all cores.

    python -m benchmarks.data --images=600
    (ulimit -n 1024; ulimit -v 8388608; python -m benchmarks.data --tiny=5000000 --parts=2 --folder=/tmp)

Images are made up with the spectrum of natural ones (640 x 480, JPEG, some 165 KB as COCO's are). --tiny:
so many records of 8 x 8 pixels are prepared in parts, all at once, merged, and read at random, with the time
and the memory of each process.
"""

import argparse
import io
import os
import pathlib
import resource
import subprocess
import sys
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

TINY_ROWS = 500_000  # of a Parquet file
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
    pairs = loader.StreamedPairs(records, Tokenizer(248), 224, packs=True)
    sampler = ShuffledSampler(len(records), 64, seed=0)

    def read(num_epochs: int) -> None:
        steps = num_epochs * sampler.num_steps
        with loader.batches(pairs, sampler, start_step=0, num_steps=steps, num_text_shards=1) as batches:
            for batch in batches:
                assert batch["image"].shape == (64, 224, 224, 3)

    return read


def write_tiny(folder: pathlib.Path, count: int) -> None:
    """Writes Parquet files of so many images of 8 x 8 pixels, each with a caption."""
    import pyarrow
    import pyarrow.parquet

    rng, files = np.random.default_rng(0), []
    for _ in range(1000):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        files.append(file.getvalue())
    for start in range(0, count, TINY_ROWS):
        rows = range(start, min(start + TINY_ROWS, count))
        columns = {"image": [files[i % 1000] for i in rows], "caption": [f"image number {i}" for i in rows]}
        options = {"compression": "none", "use_dictionary": False, "row_group_size": 2**14}
        path = folder / f"{start:012d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def run_at_once(commands: list[list[str]]) -> None:
    """Runs commands, prints what they say, and the time and the memory of each."""
    began, running = time.perf_counter(), []
    for command in commands:
        running.append(subprocess.Popen([sys.executable, "-m", *command], cwd=os.getcwd()))
    for process in running:
        _, status, used = os.wait4(process.pid, 0)
        wall, cpu = time.perf_counter() - began, used.ru_utime + used.ru_stime
        print(f"  {wall:,.0f} s, {cpu:,.0f} s of CPU, {used.ru_maxrss / 2**20:.2f} GiB at most", flush=True)
        if status:
            sys.exit(f"{process.args} ended with {status}")


def prepare_tiny(count: int, num_parts: int, folder: str) -> None:
    """Prepares tiny records in parts, merges them and reads some."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, out = pathlib.Path(work) / "in", f"{work}/out"
        source.mkdir()
        write_tiny(source, count)
        print(f"{count:,} records in {num_parts} parts", flush=True)
        parts = [f"--part={k}/{num_parts}" for k in range(num_parts)]
        command = ["clipmoe_jax.prepare", f"--out={out}"]
        run_at_once([[*command, f"--source=parquet:{source}", part] for part in parts])
        run_at_once([[*command, "--merge"]])
        began, records = time.perf_counter(), Records(out)
        print(f"  opened after {time.perf_counter() - began:.2f} s", flush=True)
        chosen = np.random.default_rng(0).integers(0, len(records), 20_000)
        places = [int(records[i]["captions"][0].split()[-1]) for i in chosen.tolist()]
        assert len(records) == count and places == chosen.tolist()
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = len(os.listdir("/proc/self/fd"))
        print(
            f"  {len(chosen):,} read in {seconds:.1f} s, {files:,} files open, {peak / 2**20:.2f} GiB at most"
        )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--tiny", type=int, help="prepare so many tiny records instead")
    parser.add_argument("--parts", type=int, default=2, help="of these")
    parser.add_argument("--folder", help="where these go, 1 KB each; a temporary one if not given")
    args = parser.parse_args()
    if args.tiny:
        prepare_tiny(args.tiny, args.parts, args.folder)
        return
    num_images = args.images
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
