"""Output of a run: progress bars and lines on the console, `metrics.jsonl` and TensorBoard.

Process 0 alone writes.
"""

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tqdm import tqdm

from clipmoe_jax.core import distributed
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.terminal import printable_line

UPLOAD_SECONDS = 30


def progress_bar(description: str, total: int | None, unit: str, delay: float = 0, initial: int = 0) -> tqdm:
    """Returns a progress bar for work that has no `Metrics`; call its `update(n)`.

    It shows only on a terminal, only in process 0, and only after `delay` seconds.
    """
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        delay=delay,
        initial=initial,
        disable=None if distributed.is_main() else True,  # None: unless it is a terminal
        dynamic_ncols=True,
    )


class Metrics:
    """Writes the numbers of one run.

    A resumed run repeats the steps since its last checkpoint: of two lines for a step, the later counts.
    """

    def __init__(self, workdir: epath.Path):
        self._active = distributed.is_main()
        if not self._active:
            return
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(self._workdir / "metrics.jsonl")

    @functools.cached_property
    def _tensorboard(self):
        """Opens with the first numbers, so that a run with nothing left to do writes no file."""
        return _TensorBoard(self._workdir / "tensorboard")

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers after `step` steps of a phase ("mcl_1", "router", …)."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        line = {"phase": phase, "step": step, "time": round(time.time(), 3), **values}
        self._lines.add(json.dumps(line) + "\n")
        for name, value in values.items():
            self._tensorboard.add(f"{phase}/{name}", value, step)

    def progress(self, phase: str, start: int, total: int, unit: str = "step") -> tqdm:
        """Returns a progress bar with rate and time left, refreshed less often in a log file."""
        return tqdm(
            desc=f"{phase:<24}",
            initial=start,
            total=total,
            unit=unit,
            disable=not self._active,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file keeps every refresh
        )

    def say(self, text: str) -> None:
        """Prints a line on the console, above any progress bar."""
        if self._active:
            tqdm.write(printable_line(text))

    def close(self) -> None:
        """Flushes and closes the files."""
        if not self._active:
            return
        self._lines.close()
        if "_tensorboard" in vars(self):
            self._tensorboard.close()


class _TensorBoard:
    """A TensorBoard event file. Its numbers are written out every UPLOAD_SECONDS and on close.

    Not by the library's SummaryWriter: a full disk ends its thread, and whoever adds numbers then waits.
    """

    def __init__(self, folder: epath.Path):
        # Here because they are slow to import: they import torch.
        from tensorboardX import event_file_writer, summary

        self._event: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event
        event_file_writer.directory_check(os.fspath(folder))
        self._file = event_file_writer.EventsWriter(os.fspath(folder / "events"))
        self._scalar, self._written = summary.scalar, time.monotonic()

    def add(self, name: str, value: float, step: int) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
        self._file.write_event(event)
        if time.monotonic() - self._written > UPLOAD_SECONDS:
            self._file.flush()
            self._written = time.monotonic()

    def close(self) -> None:
        self._file.close()


class _Lines:
    """A text file to append lines to.

    A bucket cannot append to an object, so there the whole file is written again, at most every
    UPLOAD_SECONDS and on close.
    """

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
