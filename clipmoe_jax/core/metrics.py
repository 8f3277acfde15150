"""Output of a run: progress bars and lines on the console, `metrics.jsonl`, TensorBoard, Weights & Biases
and traces of a profiler.

Process 0 alone writes.
"""

import functools
import importlib
import importlib.util
import json
import os
import re
import reprlib
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from clipmoe_jax.core import checksums, distributed
from clipmoe_jax.core.checks import read_bytes
from clipmoe_jax.core.json_files import parse_json
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.terminal import printable_line

UPLOAD_SECONDS = 30
MAX_LOG = 2**30  # bytes of a metrics.jsonl: 4 million lines
_CHECKSUM = f', "{checksums.KIND}": "'
_ADVICE = "copy the file again, or delete the line if its numbers are no loss"


def progress_bar(description: str, total: int | None, unit: str, delay: float = 0, initial: int = 0) -> tqdm:
    """Returns a progress bar for work that has no `Metrics`; call its `update(n)`.

    It shows only on a terminal, only in process 0, and only after `delay` seconds.
    """
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        delay=delay,
        leave=False,
        initial=initial,
        disable=None if distributed.is_main() else True,  # None: unless it is a terminal
        dynamic_ncols=True,
    )


class Metrics:
    """Writes the numbers of one run.

    A resumed run repeats the steps since its last checkpoint: of two lines for a step, the later counts.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        profiled: range = range(0),
    ):
        """Opens a run's files.

        wandb: a project of Weights & Biases that numbers go to as well, with the run's config; "" for none.
        profiled: the steps of each phase, from 0, that a profiler traces.
        Raises ValueError if wandb is not installed.
        """
        self._active = distributed.is_main()
        self._profiled, self._traces = profiled, False
        if not self._active:
            return
        if wandb and not importlib.util.find_spec("wandb"):
            raise ValueError(f"wandb={wandb} needs the package wandb: pip install wandb")
        self._wandb, self._config = wandb, config or {}
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(self._workdir / "metrics.jsonl")

    @functools.cached_property
    def _sinks(self) -> list["_TensorBoard | _WandB"]:
        """Opens with the first numbers, so that a run with nothing left to do writes no file."""
        sinks: list[_TensorBoard | _WandB] = [_TensorBoard(self._workdir / "tensorboard")]
        return [*sinks, _WandB(self._wandb, self._workdir, self._config)] if self._wandb else sinks

    def log(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers after `step` steps of a phase ("mcl_1", "router", …)."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        line = {"phase": phase, "step": step, "time": round(time.time(), 3), **values}
        self._lines.add(_with_checksum(json.dumps(line)) + "\n")
        self._show(phase, step, values)

    def log_scores(self, phase: str, step: int, scores: Mapping[str, float]) -> None:
        """Shows what evaluations found after `step` steps of a phase; files of their own keep it."""
        if self._active:
            self._show(phase, step, scores)

    def _show(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.add(phase, step, values)

    def profile(self, phase: str, step: int, running: Any) -> None:
        """Begins or ends a trace ahead of a step of a phase. running: arrays of the steps before it.

        Traces go to profile/PHASE, of process 0, and open in ui.perfetto.dev.
        """
        if not self._active:
            return
        if self._traces and step >= self._profiled.stop:
            jax.block_until_ready(running)
            self.end_profile()
        if step in self._profiled and not self._traces:
            jax.profiler.start_trace(self._workdir / "profile" / phase, create_perfetto_trace=True)
            self._traces = True

    def end_profile(self) -> None:
        """Ends a trace that a phase's last step has left open."""
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()

    def progress(self, phase: str, start: int, total: int, unit: str = "step") -> tqdm:
        """Returns a progress bar with rate and time left, refreshed less often in a log file.

        On a terminal it goes when it is closed: what is done is told by `say`.
        """
        return tqdm(
            desc=f"{phase:<24}",
            initial=start,
            total=total,
            unit=unit,
            leave=False,
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
        if "_sinks" in vars(self):
            for sink in self._sinks:
                sink.close()


def read_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where it lies, for messages; {"phase", "step", "time" and numbers}) of each line of a
    metrics.jsonl.

    A line that a kill has cut off is left out, but not the one that the resumed run then wrote behind it
    without a line break. Raises ValueError naming a damaged line. Lines of earlier versions have no checksum.
    """
    content = read_bytes(path, MAX_LOG)
    number, end = 1, 0
    for found in [*re.finditer(rb"\{[^{}]*\}", content), None]:
        before = content[end : found.start() if found else None]
        cut = before.lstrip(b"\r\n")
        number += before.count(b"\n") - cut.count(b"\n")
        where = f"line {number} of {path}"
        if cut and not re.fullmatch(rb"\{[^{}\n]*", cut):
            raise ValueError(f"{where} is damaged: {_ADVICE}")
        if found:
            yield where, _checked(found[0], where)
            end = found.end()


def _with_checksum(line: str) -> str:
    """Returns a JSON object with its checksum as its last field."""
    return f'{line[:-1]}{_CHECKSUM}{checksums.of_text(line)}"}}'


def _checked(line: bytes, where: str) -> dict[str, Any]:
    """Returns a line's values. Raises ValueError if it is not what its checksum says."""
    values = parse_json(line, where)
    for name, value in values.items():
        if name not in ("phase", checksums.KIND) and not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, not a number: {_ADVICE}")
    if checksums.KIND in values:
        written = line[: line.rfind(_CHECKSUM.encode())] + b"}"
        if _with_checksum(written.decode()) != line.decode():
            raise ValueError(f"{where} is damaged ({checksums.KIND} differs): {_ADVICE}")
        del values[checksums.KIND]
    return values


class _TensorBoard:
    """TensorBoard event files, in a folder for each phase: a number of all phases is one chart.

    Numbers are written out every UPLOAD_SECONDS and on close.
    Not by the library's SummaryWriter: a full disk ends its thread, and whoever adds numbers then waits.
    """

    def __init__(self, folder: epath.Path):
        # Here because they are slow to import: they import torch.
        from tensorboardX import event_file_writer, summary

        self._event: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event
        self._writers, self._scalar = event_file_writer, summary.scalar
        self._folder, self._files, self._written = folder, {}, time.monotonic()

    def file(self, phase: str) -> Any:
        """Returns the writer of a phase's events."""
        if phase not in self._files:
            folder = os.fspath(self._folder / phase)
            self._writers.directory_check(folder)
            self._files[phase] = self._writers.EventsWriter(os.path.join(folder, "events"))
        return self._files[phase]

    def add(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            event = self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value))
            self.file(phase).write_event(event)
        if time.monotonic() - self._written > UPLOAD_SECONDS:
            for file in self._files.values():
                file.flush()
            self._written = time.monotonic()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _WandB:
    """A run of Weights & Biases. Its id is kept in the workdir, so that a resumed run goes on in it.

    Steps of each phase begin anew: they are an axis of their own for its numbers.
    """

    def __init__(self, project: str, workdir: epath.Path, config: Mapping[str, Any]):
        wandb = importlib.import_module("wandb")
        file = workdir / "wandb_id.txt"
        run_id = file.read_text() if file.exists() else secrets.token_hex(4)
        file.write_text(run_id)
        where = {} if in_bucket(workdir) else {"dir": os.fspath(workdir)}
        name = workdir.resolve().name
        self._run = wandb.init(project=project, name=name, id=run_id, resume="allow", config=config, **where)
        self._phases: set[str] = set()

    def add(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        self._run.log({f"{phase}/step": step, **{f"{phase}/{name}": v for name, v in values.items()}})

    def close(self) -> None:
        self._run.finish()


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
