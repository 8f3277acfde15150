"""The rows of `benchmarks.run` that are whole commands: imports, the first step, the loader, the demo."""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
IMPORTS = {
    "import clipmoe_jax": "clipmoe_jax",
    "import clipmoe_jax.main": "clipmoe_jax",
    "import torch; from transformers import CLIPModel": "PyTorch",
}
WITHOUT_TORCHVISION = "sys.modules['torchvision'] = None; "  # as benchmarks/worker.py
NUM_STEPS = 200  # of the demo's stages and routers: after the first ten nothing is compiled
PATIENCE = 1800  # seconds for a line of metrics


def imports(rounds: int = 3) -> list[dict[str, Any]]:
    """Seconds of each import in a fresh process; interpreter and site are left out."""
    rows = []
    for statement, side in IMPORTS.items():
        before = "import sys, time; " + (WITHOUT_TORCHVISION if side == "PyTorch" else "")
        program = f"{before}began = time.perf_counter(); {statement}; print(time.perf_counter() - began)"
        seconds = []
        for _ in range(rounds):
            done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                break
            seconds.append(float(done.stdout.split()[-1]))
        row = {"group": statement, "program": side}
        if done.returncode:
            rows.append(row | {"error": "".join(done.stderr.splitlines()[-1:])})
        else:
            rows.append(row | _median(seconds))
    return rows


def first_step() -> list[dict[str, Any]]:
    """Seconds from the start of a command to the numbers of its first training step. `demo.py:small` imports
    and compiles; `demo.py` also draws ten times the scenes."""
    rows = []
    for config in ("demo.py:small", "demo.py"):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
            for number, cache in enumerate(("empty", "filled")):
                began = time.time()
                with _command(config, f"{folder}/{number}", environment, "--config.log_every=1") as lines:
                    line = next(line for line in lines if "loss" in line)
                name = f"{config}: start of the command to first step, {cache} compilation cache"
                rows.append({"group": name, "program": "clipmoe_jax", **_median([line["time"] - began])})
    return rows


def demo() -> list[dict[str, Any]]:
    """Pairs a second of the demo's own metrics.jsonl, the median of a phase's lines after the first."""
    found: dict[str, list[float]] = {}
    steps = (f"--config.mcl.num_steps={NUM_STEPS}", f"--config.router.num_steps={NUM_STEPS}")
    with (
        tempfile.TemporaryDirectory() as folder,
        _command("demo.py:small", f"{folder}/run", dict(os.environ), *steps) as lines,
    ):
        for line in lines:
            if "pairs_per_second" in line:
                found.setdefault(line["phase"], []).append(line["pairs_per_second"])
            if (line["phase"], line["step"]) == ("router", NUM_STEPS):
                break
    wanted = {"mcl_1": "MCL, stage 1", "router": "routers"}
    return [
        {
            "group": name,
            "program": "clipmoe_jax",
            "pairs_per_second": statistics.median(found[phase][1:]),
        }
        for phase, name in wanted.items()
    ]


def loader(num_images: int = 256) -> list[dict[str, Any]]:
    """Pairs a second of the loader alone, from JPEG files and from stored pixels."""
    import numpy as np

    from benchmarks import data
    from clipmoe_jax.data.preparation import prepare
    from clipmoe_jax.data.sources import Pair

    rng, rows = np.random.default_rng(0), []
    files = [data.natural_image(rng) for _ in range(num_images)]
    texts = data.captions(rng, num_images, 180, 45)
    source = [Pair(str(i), files[i], (texts[i],)) for i in range(num_images)]
    with tempfile.TemporaryDirectory() as folder:
        for form, pixels, epochs in (("JPEG", None, 2), ("pixels", 224, 16)):
            out = f"{folder}/{form}"
            prepare(source, out, pixels=pixels)
            read = data.read_epochs(out)
            read(1)  # imports what it needs
            count = epochs * (num_images // 64 * 64)
            rate = data.rate(count, lambda read=read, epochs=epochs: read(epochs))
            name = f"640 x 480 as {form}, {os.cpu_count()} cores"
            rows.append({"group": name, "program": "clipmoe_jax", "pairs_per_second": rate})
    return rows


def _median(seconds: list[float]) -> dict[str, Any]:
    return {"milliseconds": 1e3 * statistics.median(seconds), "seconds": seconds}


@contextlib.contextmanager
def _command(
    config: str, workdir: str, environment: dict[str, str], *flags: str
) -> Iterator[Iterator[dict[str, Any]]]:
    """Runs the demo's command; gives the lines of its metrics as they come, and ends it."""
    command = [sys.executable, "-m", "clipmoe_jax.main", f"--config=configs/{config}"]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}", "--distributed=off", *flags],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield _lines(pathlib.Path(workdir) / "metrics.jsonl", process)
        except EOFError as error:
            output.seek(0)
            raise RuntimeError(f"{error}:\n{output.read()[-2000:]}") from error
        finally:
            process.kill()
            process.wait()


def _lines(path: pathlib.Path, process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    """The lines of a file that grows. Raises EOFError if the process ends."""
    read, deadline = 0, time.monotonic() + PATIENCE
    while True:
        ended = process.poll() is not None or time.monotonic() > deadline
        text = path.read_text()[read:] if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        read += len(whole)
        yield from map(json.loads, whole.splitlines())
        if ended:
            raise EOFError(f"the demo ended with {process.poll()} before {path.name} had what is measured")
        time.sleep(0.02)


SECTIONS: dict[str, list[Callable[[], list[dict[str, Any]]]]] = {
    "start": [imports, first_step],
    "loader": [loader],
    "demo": [demo],
}
