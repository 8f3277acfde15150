"""A run's data sets: prepared folders as they are, and sources that the run prepares itself, once.

A prepared source lies in WORKDIR/data/NAME, shared by the seeds and variants of a config. A source that
depends on the seed (generated, without a seed of its own) lies in WORKDIR/data/seed_N/NAME if there are
several seeds. A source that a variant sets otherwise than the config lies in WORKDIR/VARIANT/data.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping

from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax.core import artifacts, distributed, metrics
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data import preparation, sources
from clipmoe_jax.data.decoding import map_decoding
from clipmoe_jax.data.records import Records

NAMES = ("train", "test", "validation", "base", "retention", "rehearsal", "rehearsal_captions")
FILES = "source files"  # the input of a prepared source that is its stamp
WHOLE_SPLIT = "train"  # what a source is prepared as where the config names no split
COMPARED = "compared.json"
WAIT_SECONDS = 7 * 24 * 3600  # of other processes while one reads all images: a hundred million take hours


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One data set of a run.

    Attributes:
        path: its prepared folder.
        split: a split or a slice of one; "" is the only split there is.
        source: what the run prepares it from; "" where the user has prepared it.
    """

    path: str
    split: str
    source: str = ""

    def open(self) -> Records:
        """Returns its records. Raises FileNotFoundError if the folder is not there."""
        return Records(self.path, self.split)

    def is_prepared(self) -> bool:
        """Returns whether the folder is there, whole."""
        return not self.source or artifacts.is_done(epath.Path(self.path))

    def check(self) -> int:
        """Returns how many pairs it has, or at most will have where it is not prepared yet.

        Raises ValueError or FileNotFoundError if the folder can neither be used nor prepared.
        """
        folder = epath.Path(self.path)
        if self.is_prepared():
            if self.source:
                self._check_recorded()
            return len(self.open())
        if folder.exists():
            raise ValueError(
                f"{folder} is there and is no data set that a run prepared from {self.source}: choose "
                "another workdir, or name that folder in the config"
            )
        return len(sources.open_source(self.source))

    def prepare(self, max_bad_fraction: float) -> bool:
        """Prepares it from its source unless it is there; process 0 does, the others wait.

        Returns whether anything was prepared. Raises what `write_pairs` and the source raise, and Preempted
        after SIGTERM or Ctrl-C; a shard that is whole stays.
        """
        if distributed.agree(self.is_prepared()):
            return False
        split = self.split.partition("[")[0] or WHOLE_SPLIT

        def build(unfinished: epath.Path) -> dict:
            def write() -> dict:
                source = sources.open_source(self.source)
                return preparation.write_pairs(
                    source,
                    unfinished,
                    split=split,
                    max_bad_fraction=max_bad_fraction,
                    after_entry=_stop_if_preempted,
                )

            return distributed.on_main(f"{self.path} is prepared", write, WAIT_SECONDS)

        inputs = {"source": self.source, "split": split, FILES: sources.source_stamp(self.source)}

        def upgrade(recorded: dict) -> dict:
            """A stopped preparation of the same source goes on: it sees for itself what has changed."""
            was = recorded.get("source", self.source)
            same = sources.canonical(was) == sources.canonical(self.source)
            return recorded | {name: inputs[name] for name in ("source", FILES) if same}

        return artifacts.make(epath.Path(self.path), inputs, build, upgrade)

    def _check_recorded(self) -> None:
        """Raises ValueError if the folder was prepared from something else. Files may have gone since, and an
        earlier version has not recorded a folder's."""
        recorded = artifacts.done_field(epath.Path(self.path), "inputs")
        advice = "choose another workdir, or delete that folder and what was made from it"
        was, files = (
            field(recorded, name, str, f"{self.path}/{artifacts.DONE}") for name in ("source", FILES)
        )
        if sources.canonical(was) != sources.canonical(self.source):
            raise ValueError(f"{self.path} was prepared from {was}, the config says {self.source}: {advice}")
        before, now = files.split(","), sources.source_stamp(self.source).split(",")
        if len(before) != len(now) or any(a != b for a, b in zip(before, now, strict=True) if a and b):
            raise ValueError(
                f"{self.source} has changed since {self.path} was prepared from it (names, sizes or times of "
                f"files): put it back, {advice}"
            )


def _stop_if_preempted() -> None:
    if distributed.preempted():
        raise distributed.Preempted("data")


def datasets_of(
    config: ConfigDict, sweep: ConfigDict, workdir: epath.Path, variant: str, seed: int
) -> dict[str, Dataset]:
    """Returns {name of NAMES: data set} of those that the run of one seed of a variant uses.

    config: the variant's; sweep: the one it is a variant of (the same where there are none). workdir: the
    whole command's. variant: its name, or "". Raises ValueError for a source where the workdir is a bucket's.
    """
    datasets, errors = {}, Errors()
    for name in NAMES:
        given = config.data[name]
        if not given or (name == "base" and config.base.checkpoint):
            continue
        split = config.data.get(f"{name}_split", "")
        if not sources.is_source(given):
            datasets[name] = Dataset(os.path.expanduser(given), split)
            continue
        if in_bucket(workdir):
            errors.add(
                f"data.{name}={given} is a source, and {workdir} lies in a bucket: prepare it on a disk with "
                f"python -m clipmoe_jax.prepare, copy the folder, and set data.{name} to it"
            )
            continue
        folder = (workdir if given == sweep.data[name] else workdir / variant) / "data"
        with errors.of(f"data.{name}"):
            source = sources.with_seed(given, seed)
            if source != given and len(config.seeds) > 1:
                folder /= f"seed_{seed}"
            datasets[name] = Dataset(str(folder / name), split, source)
    errors.raise_all()
    return datasets


def check_disjoint(records: Mapping[str, Records], workdir: epath.Path) -> None:
    """Raises ValueError naming an image of "rehearsal" that lies in "test" or "retention" too.

    Every image of the three is read, which takes hours for many millions. So compared.json in the workdir
    notes what was compared, and other seeds, variants and a run that goes on do not read it again. Raises
    Preempted after SIGTERM or Ctrl-C.
    """
    records = {name: records[name] for name in ("test", "retention", "rehearsal") if name in records}
    these = " ".join(f"{name}:{of_name.fingerprint}" for name, of_name in records.items())
    compared = _read_compared(workdir / COMPARED)
    if these in compared:
        return
    tested: dict[bytes, str] = {}
    with metrics.progress_bar("comparing", sum(map(len, records.values())), "image", delay=1) as progress:
        for name, of_name in records.items():
            for image_id, digest in map_decoding(functools.partial(_digest, of_name), range(len(of_name))):
                progress.update()
                _stop_if_preempted()
                if name != "rehearsal":
                    tested[digest] = f"{image_id!r} in data.{name}"
                elif digest in tested:
                    raise ValueError(
                        f"data.rehearsal: the image of {image_id!r} is that of {tested[digest]}: leave it "
                        "out, or the test says nothing"
                    )
    workdir.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(workdir / COMPARED, compared | {these: "no image in common"})


def _digest(records: Records, index: int) -> tuple[str, bytes]:
    """The id of a record and a hash of its image."""
    record = records[index]
    image = record["image"]
    contents = image if isinstance(image, bytes) else image.tobytes()
    return record["id"], hashlib.blake2b(contents, digest_size=16).digest()


def _read_compared(path: epath.Path) -> dict[str, str]:
    """The content of compared.json. Nothing, if it is damaged or not there: images are compared again."""
    try:
        return read_json(path) if path.exists() else {}
    except ValueError:
        return {}


def describe(datasets: Mapping[str, Dataset], folder: epath.Path) -> dict[str, dict[str, str]]:
    """Returns {name: {"path", "split", "source"}} for datasets.json in `folder`.

    The path of what the run prepared is relative to the folder, so that a workdir may move.
    """
    described = {}
    for name, dataset in datasets.items():
        path = os.path.relpath(dataset.path, folder) if dataset.source else dataset.path
        described[name] = dataclasses.asdict(dataset) | {"path": path}
    return described
