"""Where numbers go: the console's progress bar, `metrics.jsonl` and TensorBoard. Process 0 alone writes."""

import functools
import json
import sys
import time
from collections.abc import Mapping

from etils import epath
from tqdm import tqdm

from clipmoe_jax.core import distributed
from clipmoe_jax.core.paths import in_bucket

UPLOAD_SECONDS = 30


class Metrics:
    """The numbers of one run. A resumed run repeats the steps since its last checkpoint: the later line
    counts."""

    def __init__(self, workdir: epath.Path):
        self._active = distributed.is_main()
        if not self._active:
            return
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(self._workdir / "metrics.jsonl")

    @functools.cached_property
    def _tensorboard(self):
        """Opened with the first numbers: slow to import (with it comes torch, where that is installed), and a
        run in which nothing is left to do writes no file."""
        from tensorboardX import SummaryWriter

        return SummaryWriter(str(self._workdir / "tensorboard"))

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One line of numbers after `step` steps of a phase ("stage_1", "router", …)."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        line = {"phase": phase, "step": step, "time": round(time.time(), 3), **values}
        self._lines.add(json.dumps(line) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{phase}/{name}", value, step)

    def progress(self, phase: str, start: int, total: int, unit: str = "step") -> tqdm:
        """A progress bar with rate and time left, rarer in a log file; silent on other processes than 0."""
        return tqdm(
            desc=f"{phase:<24}",
            initial=start,
            total=total,
            unit=unit,
            disable=not self._active,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file keeps every one
        )

    def say(self, text: str) -> None:
        """A line on the console, above any progress bar."""
        if self._active:
            tqdm.write(text)

    def close(self) -> None:
        """Writes what is buffered."""
        if not self._active:
            return
        self._lines.close()
        if "_tensorboard" in vars(self):
            self._tensorboard.close()


class _Lines:
    """A text file that lines are added to. In a bucket, which adds nothing to an object, it is written anew,
    every UPLOAD_SECONDS at most and when it is closed."""

    def __init__(self, path: epath.Path):
        self._path, self._file, self._text, self._written = path, None, "", time.monotonic()
        if not in_bucket(path):
            self._file = path.open("a")
        elif path.exists():
            self._text = path.read_text()

    def add(self, line: str) -> None:
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > UPLOAD_SECONDS:
            self._path.write_text(self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        if self._file:
            self._file.close()
        else:
            self._path.write_text(self._text)
