"""Writes the pairs of a source as a prepared data set, which `data.records.Records` reads by index.

It is a TFDS data set in ArrayRecord files (`tfds.data_source("pairs", data_dir=OUT)` reads it too), with the
images as they came or as a model takes them. Beside it lie `report.json` (counts), `bad_records.jsonl` (every
entry that was left out, and why), the captions' lengths and, of a source that has attributes, their table
(`attributes.json`).
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from clipmoe_jax.core import artifacts, metrics
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data import records
from clipmoe_jax.data.shard_files import DONE, ENTRIES, Encoder, Shard, SourceChangedError, make_shard
from clipmoe_jax.data.sources.base import (
    AttributeTable,
    BadRecord,
    Source,
    attribute_table,
    check_not_empty,
    entries_from,
)

# Entries of the source in a file, unless `num_shards` says otherwise: some 600 MB of pixels or photographs,
# and a multiple of that where there would be more files than MOST_SHARDS. A killed run goes on with the first
# file that is not whole.
ENTRIES_PER_SHARD, MOST_SHARDS = 4096, 4096
# What `write_pairs` is doing in a folder, until it is done.
PLAN = "plan.json"
BAD_RECORDS = "bad_records.jsonl"
# So many bad records show what is wrong: a source that has too many of them is read no further, and one with
# fewer is read to its end, so that all are known at once.
ENOUGH_BAD = 100
# What to do where all records are bad, by their kind.
OF_ALL = {
    "missing caption": "each image needs a caption, in folder:DIR a .txt of its name beside it",
    "missing class": "classes:DIR needs a subfolder for each class, with its images in it",
}
RAISE_IT = "or raise max_bad_fraction"


class TooManyBadRecordsError(ValueError):
    """A larger part of a source is bad than was allowed."""

    def of_flag(self) -> ValueError:
        """Returns the error of a command, where a flag says how much is allowed."""
        return ValueError(str(self).replace(RAISE_IT, RAISE_IT.replace("max_bad", "--max_bad")))


class Layout(NamedTuple):
    """The files of a split, and which entries of the source lie in each: `per_shard` of `entries`."""

    entries: int
    per_shard: int
    split: str
    pixels: int | None

    @classmethod
    def of(cls, source: Source, num_shards: int | None, split: str, pixels: int | None) -> "Layout":
        """Returns that of a source; arguments as of `write_pairs`. Raises ValueError for an empty one."""
        check_not_empty(source)
        per_shard = -(-len(source) // num_shards) if num_shards else entries_per_shard(len(source))
        return cls(len(source), per_shard, split, pixels)

    @property
    def num_shards(self) -> int:
        """Returns how many files there are."""
        return -(-self.entries // self.per_shard)

    def path(self, folder: epath.Path, k: int) -> epath.Path:
        """Returns the path of file k of a data set."""
        name = f"{records.NAME}-{self.split}.array_record-{k:05d}-of-{self.num_shards:05d}"
        return folder / records.NAME / records.VERSION / name


class Totals:
    """Counts of files, in their order.

    Attributes:
        shard_lengths: the records of each.
        captions, image_bytes: of all records.
    """

    def __init__(self):
        self.shard_lengths, self.captions, self.image_bytes = [], 0, 0
        self._token_counts, self._digests = [], []

    def add(self, shard: Shard) -> None:
        """Counts the next file."""
        entries = shard.entries[shard.entries["tokens"] > 0]
        self.shard_lengths.append(len(entries))
        self.captions += int(entries["captions"].sum())
        self.image_bytes += int(entries["image_bytes"].sum())
        self._token_counts.append(entries["tokens"].copy())  # without the other columns
        self._digests.append(shard.sha256)

    def counts(self) -> dict[str, int]:
        """Returns the numbers of a report."""
        return {
            "pairs": sum(self.shard_lengths),
            "captions": self.captions,
            "image_bytes": self.image_bytes,
        }

    @property
    def token_counts(self) -> np.ndarray:
        """Returns uint16 (N,): the tokens of each record's longest caption."""
        return np.concatenate(self._token_counts)

    @property
    def sha256(self) -> str:
        """Returns a hash of all records."""
        return hashlib.sha256("".join(self._digests).encode()).hexdigest()


class BadRecords:
    """Counts bad records, names them in a log, and stops when there are too many."""

    def __init__(self, log: IO, total: int, max_fraction: float, advice: str = "fix them and start again"):
        """log: the file that names them. total: entries of the source. advice: what to do about too many."""
        self.counts = Counter()
        self._log, self._total, self._max_fraction, self._advice = log, total, max_fraction, advice

    def add(self, bad: BadRecord) -> None:
        """Counts a bad record. Raises TooManyBadRecordsError where too many are more than ENOUGH_BAD."""
        self.counts[bad.kind] += 1
        self._log.write(json.dumps(bad._asdict()) + "\n")
        if self.counts.total() > ENOUGH_BAD:
            self.check("at least ")

    def check(self, at_least: str = "") -> None:
        """Raises TooManyBadRecordsError. at_least: "at least " where there may be more."""
        count = self.counts.total()
        if count <= self._max_fraction * self._total:
            return
        advice = f"{self._advice}, {RAISE_IT}"
        kind, *others = self.counts
        if kind in OF_ALL and not others and (at_least or count == self._total):
            advice = OF_ALL[kind]
        raise TooManyBadRecordsError(
            f"{at_least}{count:,} of {self._total:,} records are bad, more than "
            f"max_bad_fraction={self._max_fraction:g} allows: {self.summary()}. {self._log.name} lists them: "
            f"{advice}"
        )

    def summary(self) -> str:
        """Returns how many there are of each kind, in words."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())


@printable_errors()
def prepare(
    source: Source,
    out: str,
    *,
    split: str = "train",
    max_bad_fraction: float = 1e-3,
    num_shards: int | None = None,
    pixels: int | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Writes the source's pairs to the folder `out`, in their order, leaving bad records out.

    The work happens in `out`.unfinished, which becomes `out` when it is whole.

    Args:
        out: a folder that does not exist yet.
        source, split, max_bad_fraction, num_shards, pixels: as for `write_pairs`.
        name: of the source. A killed run with the same name and arguments is gone on with, if the source
            yields the same, and the result is the same byte for byte; without a name it starts anew.

    Returns:
        The report, as `write_pairs`.

    Raises:
        ValueError: as `write_pairs`, and if `out` is taken or in a bucket.
    """
    check_on_disk(out)
    check_arguments(split, max_bad_fraction, num_shards, pixels)
    inputs = {"name": name, "split": split, "num_shards": num_shards, "pixels": pixels}
    # A folder that an error leaves has a log that tells why.
    with artifacts.new_folder(
        epath.Path(out), keep_failed=True, inputs=inputs if name else None, with_checksums=True
    ) as folder:
        return write_pairs(
            source,
            folder,
            split=split,
            max_bad_fraction=max_bad_fraction,
            num_shards=num_shards,
            pixels=pixels,
        )


def write_pairs(
    source: Source,
    folder: epath.Path,
    *,
    split: str = "train",
    max_bad_fraction: float = 1e-3,
    num_shards: int | None = None,
    pixels: int | None = None,
    after_entry: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fills a folder on a local disk with the source's pairs, in their order, leaving bad records out.

    Every image is decoded once to make sure that it can be, and every caption tokenised to know its length.
    Goes on with the whole files that it finds there, if they were made with the same arguments and from what
    the source still yields; starts anew otherwise.

    Args:
        source: the pairs.
        folder: where to write; nobody else writes there.
        split: the name of the split to write.
        max_bad_fraction: of the source's entries, how many may be bad.
        num_shards: files to write; None makes them of `entries_per_shard` entries each.
        pixels: writes images preprocessed at this size, pixels·pixels·3 bytes each, and captions
            tokenised, which reads many times as fast; None writes image files as they came.
        after_entry: called after each entry; it may raise to stop.

    Returns:
        The report: {"pairs", "captions", "image_bytes", "sha256" of the records, "pixels", "bad",
        "bad_by_kind"}.

    Raises:
        TooManyBadRecordsError: more than max_bad_fraction are bad; names the file that lists them.
        ValueError: no usable pair, an argument that is out of range, or a source that changes meanwhile.
    """
    check_arguments(split, max_bad_fraction, num_shards, pixels)
    layout = Layout.of(source, num_shards, split, pixels)
    table = attribute_table(source)
    encoder = Encoder(pixels, table)
    totals, bad = make_shards(
        source, folder, layout, range(layout.num_shards), encoder, max_bad_fraction, after_entry
    )
    report = write_set(folder, layout, table, encoder, totals, bad)
    for ending in (ENTRIES, DONE):
        for path in layout.path(folder, 0).parent.glob(f"*{ending}"):
            path.unlink()
    (folder / PLAN).unlink()
    return report


def entries_per_shard(num_entries: int) -> int:
    """Returns how many entries a file has: ENTRIES_PER_SHARD up to 16.8 million entries, then more."""
    return ENTRIES_PER_SHARD * -(-num_entries // (ENTRIES_PER_SHARD * MOST_SHARDS))


def make_shards(
    source: Source,
    folder: epath.Path,
    layout: Layout,
    shards: range,
    encoder: Encoder,
    max_bad_fraction: float,
    after_entry: Callable[[], None] = lambda: None,
) -> tuple[Totals, BadRecords]:
    """Writes some of the files of a data set and the log of bad records, as `write_pairs` does.

    Goes on with those that are whole. max_bad_fraction: of all entries of the source.
    """
    if not (folder / PLAN).exists() or read_json(folder / PLAN) != layout._asdict():
        _begin(folder, layout)

    def make() -> tuple[Totals, BadRecords]:
        first = shards.start * layout.per_shard
        stop = min(shards.stop * layout.per_shard, layout.entries)
        entries, num_read, totals = entries_from(source, first), 0, Totals()
        progress = metrics.progress_bar("preparing", stop - first, "pair")
        with (folder / BAD_RECORDS).open("w") as log, progress:
            bad = BadRecords(log, layout.entries, max_bad_fraction)
            for k in shards:
                of_shard, path = itertools.islice(entries, layout.per_shard), layout.path(folder, k)
                shard = make_shard(of_shard, path, encoder, bad.add, progress, after_entry)
                num_read += len(shard.entries)
                totals.add(shard)
            bad.check()
        if stop == layout.entries:
            num_read += sum(1 for _ in entries)
        if first + num_read != stop:
            raise ValueError(
                f"the source had {layout.entries:,} records, and {first + num_read:,} were read: it changes; "
                "start again"
            )
        return totals, bad

    try:
        return make()
    except SourceChangedError:
        _begin(folder, layout)
        return make()


def write_set(
    folder: epath.Path,
    layout: Layout,
    table: AttributeTable | None,
    encoder: Encoder,
    totals: Totals,
    bad: BadRecords,
) -> dict[str, Any]:
    """Writes what makes the files in a folder a data set; returns the report, as `write_pairs`.

    Raises ValueError if there is no pair.
    """
    report: dict[str, Any] = totals.counts()
    if not report["pairs"]:
        raise ValueError(f"no usable pair in {layout.entries:,} records: {bad.summary()}")
    report |= {"sha256": totals.sha256, "pixels": layout.pixels, "bad": bad.counts.total()}
    report["bad_by_kind"] = dict(bad.counts)
    _write_metadata(layout.path(folder, 0).parent, layout.split, encoder.features, totals)
    with (folder / f"token_counts-{layout.split}.npy").open("wb") as file:
        np.save(file, totals.token_counts)
    if table is not None:
        artifacts.write_json(
            folder / records.ATTRIBUTES, {name: attribute._asdict() for name, attribute in table.items()}
        )
    artifacts.write_json(folder / records.REPORT, report)
    return report


def check_on_disk(out: str) -> None:
    """Raises ValueError for a folder in a bucket."""
    if in_bucket(out):
        raise ValueError(f"{out} lies in a bucket: prepare on a disk, and copy the folder there")


def check_arguments(split: str, max_bad_fraction: float, num_shards: int | None, pixels: int | None) -> None:
    """Raises ValueError for an argument that is out of range."""
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} is not a fraction from 0 to 1")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards={num_shards} is too few: use 1 or more")
    if pixels is not None and pixels < 1:
        raise ValueError(f"pixels={pixels} is no size: use that of the model, such as 224")
    if not split.isidentifier() or split == "all":
        raise ValueError(f"split={split} cannot name a split: use a word such as train")


def _begin(folder: epath.Path, layout: Layout) -> None:
    """Deletes the files that are there, and records what is done now."""
    data = folder / records.NAME / records.VERSION
    if data.exists():
        data.rmtree()
    data.mkdir(parents=True)
    artifacts.write_json(folder / PLAN, layout._asdict())


def _write_metadata(
    data: epath.Path, split: str, features: tfds.features.FeaturesDict, totals: Totals
) -> None:
    """Writes the JSON files that make the ArrayRecord files a TFDS data set."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=data, dataset_name=records.NAME, split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=totals.shard_lengths,
        num_bytes=totals.image_bytes,
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(data_dir=data, features=features, split_infos=[info], check_data=False)
