"""Reads the files of a run's workdir for the report.

Letters: N pairs of the training set, T points in a curve.
"""

import contextlib
import dataclasses
import os
import re
import shlex
from typing import Any

import numpy as np
from etils import epath

from clipmoe_jax.core import artifacts, checksums
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.metrics import read_lines
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data.npy import load_array, load_arrays
from clipmoe_jax.data.records import Records

Curves = dict[str, dict[str, np.ndarray]]
DIAGNOSTICS = "evaluate"  # the stage that writes routing, heat maps, experts, neighbours and cost
MAIN = "python -m clipmoe_jax.main --config=CONFIG --workdir="

# Where a seed's folder has its artifacts: all but the data sets, which several runs may share.
ARTIFACTS = "base", "rehearsal/*", "stage_*/*", "dense/*", "moe/*", "baselines/*", "evaluated/*/*", "eval"

WRITTEN_ANEW = "copy it again, or start the run's command again, which writes it anew"


class NotThereError(FileNotFoundError):
    """A file that a section reads is not there: `what` names it, `command` makes it."""

    def __init__(self, what: str, command: str):
        super().__init__(what)
        self.what, self.command = what, command


@dataclasses.dataclass(frozen=True)
class Folder:
    """One seed's folder.

    Attributes:
        path: of the folder.
        workdir: the one that the user gave, the same unless there are several seeds.
        read: files and data sets that were read, or looked for.
    """

    path: epath.Path
    workdir: epath.Path
    read: list[epath.Path] = dataclasses.field(default_factory=list)

    @property
    def command(self) -> str:
        """Returns the command that makes the run."""
        return MAIN + as_argument(self.workdir)

    def has(self, name: str) -> bool:
        """Returns whether a file is there."""
        return (self.path / name).exists()

    def file(self, name: str, stage: str) -> epath.Path:
        """Returns the path of a file that `stage` makes. Raises NotThereError, ValueError if damaged."""
        path = self._existing(name, stage)
        checksums.verify(path.parent, path.name)
        return path

    def _existing(self, name: str, stage: str) -> epath.Path:
        if not self.has(name):
            raise self.not_there(name, stage)
        self.read.append(self.path / name)
        return self.path / name

    def not_there(self, name: str, stage: str) -> NotThereError:
        """Returns the error of a file that is not there or holds nothing yet, and that `stage` makes."""
        return NotThereError(self._shown(name), f"{self.command} --stage={stage}")

    def json(self, name: str, stage: str, kind: type = dict) -> Any:
        """Returns the content of a JSON file that `stage` makes, as `read_json`. Raises NotThereError."""
        return read_json(self.file(name, stage), kind)

    def array(self, name: str, stage: str) -> Any:
        """Returns the array of an .npy file, or the dict of arrays of an .npz file. Raises NotThereError."""
        file = self._existing(name, stage)  # what loads it compares its checksum
        return load_arrays(file) if file.suffix == ".npz" else load_array(file)

    def config(self) -> dict[str, Any]:
        """Returns the run's config. Raises NotThereError."""
        if not self.has("config.json"):
            raise NotThereError(self._shown("config.json"), self.command)
        self.read.append(self.path / "config.json")
        return checksums.read_verified(self.path / "config.json", WRITTEN_ANEW)

    def done_field(self, name: str, field_name: str) -> dict[str, Any]:
        """Returns a field of an artifact's done.json, as `artifacts.done_field`; {} if it is not there."""
        return artifacts.done_field(self.path / name, field_name) if self._is_done(name) else {}

    def made(self, name: str) -> dict[str, Any]:
        """Returns when and where an artifact was made, as `artifacts.made`; {} if it is not there."""
        return artifacts.made(self.path / name) if self._is_done(name) else {}

    def seconds(self) -> float | None:
        """Returns the seconds in which the run's artifacts were made, added up; None if none says.

        Pauses between starts do not count, nor does what lies outside of artifacts: preparing data, opening
        it, ensembles' recall. What was copied from another variant counts there. Of a model whose training
        went on after a kill, the steps before count as if they had been as fast as those after; of other
        artifacts only the last start counts.
        """
        parts = []
        for file in (f for name in ARTIFACTS for f in self.path.glob(f"{name}/{artifacts.DONE}")):
            name = os.fspath(file.parent.relative_to(self.path))
            made, measured = self.made(name), self.done_field(name, "measured")
            if made.get("seconds") is None or made.get("copied_from"):
                continue
            parts.append(made["seconds"])
            if steps := measured.get("steps_now"):
                parts.append((measured["num_steps"] - steps) * measured["seconds_now"] / steps)
        return sum(parts) if parts else None

    def _is_done(self, name: str) -> bool:
        self.read.append(self.path / name / artifacts.DONE)
        return artifacts.is_done(self.path / name)

    def records(self, name: str) -> Records:
        """Returns the data set "train" or "test". Raises NotThereError where it has gone."""
        path, split, made_by_run = self._dataset(name)
        if not path.exists():
            if made_by_run:
                raise self.not_there(f"data/{name}", "data")
            out = as_argument(path)
            raise NotThereError(str(path), f"python -m clipmoe_jax.prepare --source=KIND:PATH --out={out}")
        self.read.append(path)
        return Records(str(path), split)

    def data_elsewhere(self) -> list[epath.Path]:
        """Returns the data sets that `records` opens and the run has not prepared."""
        found = []
        for name in ("train", "test"):
            with contextlib.suppress(Exception):  # whoever then reads them is told, and opens nothing
                path, _, made_by_run = self._dataset(name)
                found += [] if made_by_run else [path]
        return found

    def _dataset(self, name: str) -> tuple[epath.Path, str, bool]:
        """Path and split of a data set, and whether the run prepared it.

        It lies where runs prepare data or the config says: a stranger's run has no other folder opened.
        """
        if not self.has("datasets.json"):
            # Of version 0.1, which made the demo's data in the seed's own folder.
            data = self.config()["data"]
            if data[name]:
                return epath.Path(data[name]), data[f"{name}_split"], False
            return self.path / "data" / name, "", True
        file = self.path / "datasets.json"
        self.read.append(file)
        datasets = checksums.read_verified(file, WRITTEN_ANEW)
        if name not in datasets:
            raise NotThereError(f"data.{name}", f"{self.command} --config.data.{name}=FOLDER")
        dataset, where = field(datasets, name, dict, str(file)), f"{file}: {name}"
        path, split, source = (field(dataset, key, str, where) for key in ("path", "split", "source"))
        if source:
            if not re.fullmatch(rf"(\.\./){{0,2}}data/(seed_\d+/)?{name}", path):
                raise ValueError(f"{where} lies in {path!r}, where no run prepares data: it is not opened")
            return self.path / path, split, True
        given = self.config()["data"][name]
        if path != os.path.expanduser(given):
            raise ValueError(f"{where} lies in {path!r}, and config.json says {given!r}: it is not opened")
        return epath.Path(path), split, False

    def _shown(self, name: str) -> str:
        """Returns a file's name as seen from the workdir."""
        return name if self.path == self.workdir else f"{self.path.name}/{name}"


def as_argument(path: epath.Path) -> str:
    """Returns a path as a command has it that a user may copy, whatever characters its name has."""
    return shlex.quote(printable_line(path))


def seed_folders(workdir: epath.Path) -> list[Folder]:
    """Returns the run's folders, one a seed, by seed. Raises FileNotFoundError if there is no run."""
    name = printable_line(workdir)
    if not workdir.exists():
        raise FileNotFoundError(f"--workdir={name} does not exist: make a run with {MAIN}…")
    seeds = [path for path in workdir.iterdir() if re.fullmatch(r"seed_\d+", path.name)]
    seeds.sort(key=lambda path: int(path.name.removeprefix("seed_")))
    if (workdir / "metrics.jsonl").exists():
        return [Folder(workdir, workdir)]
    folders = [Folder(path, workdir) for path in seeds if (path / "metrics.jsonl").exists()]
    if not folders:
        raise FileNotFoundError(
            f"--workdir={name} has no run in it (no metrics.jsonl, no seed_N): make one with "
            f"{MAIN}{as_argument(workdir)}"
        )
    return folders


def read_curves(folder: Folder) -> Curves:
    """Returns {phase: {"step" and each number: (T,) float64}} of metrics.jsonl in the order of the phases.

    Raises NotThereError if no phase has written a line yet. A resumed run repeats steps: the later line
    counts. NaN stands where a line lacks a number, as validation may be turned on later.
    """
    phases: dict[str, dict[int, dict[str, float]]] = {}
    for where, line in read_lines(folder.file("metrics.jsonl", "base")):
        phase, step = field(line, "phase", str, where), field(line, "step", int, where)
        phases.setdefault(phase, {})[step] = line
    if not phases:
        raise folder.not_there("metrics.jsonl", "base")
    curves = {}
    for phase, by_step in phases.items():
        lines = [by_step[step] for step in sorted(by_step)]
        names = dict.fromkeys(name for line in lines for name in line if name != "phase")
        curves[phase] = {name: np.array([line.get(name, np.nan) for line in lines]) for name in names}
    return curves


def read_labels(folder: Folder) -> dict[int, np.ndarray]:
    """Returns {stage: pseudo-labels (N,) int64}. Raises NotThereError if not even stage 1 has them."""
    labels = {}
    for stage in range(1, 100):
        name = f"stage_{stage}/clusters/pseudo_labels.npy"
        if stage > 1 and not (folder.path / name).exists():
            break
        labels[stage] = folder.array(name, f"cluster_{stage}")
    return labels
