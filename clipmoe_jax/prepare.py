"""Turns a source of image-caption pairs into a data set that can be read by index.

    python -m clipmoe_jax.prepare --source=sharegpt4v:captions.json --images=DIR --out=DIR
    python -m clipmoe_jax.prepare --source=folder:DIR --out=DIR

The result is a TFDS data set in ArrayRecord files (`clipmoe_jax.data.records.Records` reads it,
and so does `tfds.data_source("pairs", data_dir=OUT)`), with the images as they came. Beside it lie
`report.json` (counts) and `bad_records.jsonl` (every entry that was left out, and why).
"""

import contextlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TextIO

import tensorflow_datasets as tfds
from absl import flags, logging
from etils import epath
from tqdm import tqdm

from clipmoe_jax import artifacts, cli
from clipmoe_jax.data import records, sources
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.sources import BadRecord, Pair


class Source(Sized, Iterable, Protocol):
    """What `prepare` reads: its length, and Pair or BadRecord one at a time."""


def prepare(
    source: Source,
    out: str,
    *,
    split: str = "train",
    max_bad_fraction: float = 1e-3,
    num_shards: int | None = None,
) -> dict:
    """Writes the source's pairs to the folder `out`, in their order, leaving bad records out.

    Every image is decoded once to make sure that it can be. The work happens in `out`.unfinished,
    which becomes `out` when it is whole; what a killed run left there is thrown away.

    Args:
        source: the pairs.
        out: a folder that does not exist yet.
        split: the name of the split to write.
        max_bad_fraction: of the source's entries, how many may be bad.
        num_shards: files to write; None lets TFDS choose.

    Returns:
        The report: {"pairs", "captions", "image_bytes", "bad", "bad_by_kind"}.

    Raises:
        ValueError: too many bad records, no usable pair, `out` taken, or an argument out of range.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"--max_bad_fraction={max_bad_fraction} is not a fraction from 0 to 1.")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"--num_shards={num_shards} is too few: use 1 or more.")
    if not split.isidentifier() or split == "all":
        raise ValueError(f"--split={split} cannot name a split: use a word such as train.")
    if not len(source):
        raise ValueError("The source is empty: check --source.")
    report = {"pairs": 0, "captions": 0, "image_bytes": 0}
    with artifacts.new_folder(epath.Path(out), keep_failed=True) as folder:  # its log tells why
        with (folder / "bad_records.jsonl").open("w") as log:
            bad = _BadRecords(log, len(source), max_bad_fraction)
            _write(_good_pairs(source, bad, report), folder, split, num_shards)
        report |= {"bad": bad.counts.total(), "bad_by_kind": dict(bad.counts)}
        artifacts.write_json(folder / "report.json", report)
    return report


class _BadRecords:
    """Counts bad records, names them in a log, and stops when there are too many."""

    def __init__(self, log: TextIO, total: int, max_fraction: float):
        self.counts = Counter()
        self._log, self._total, self._max_fraction = log, total, max_fraction
        self._first = []

    def add(self, bad: BadRecord) -> None:
        self.counts[bad.kind] += 1
        self._log.write(json.dumps(bad._asdict()) + "\n")
        if len(self._first) < 3:
            self._first.append(f"{bad.id} ({bad.kind}: {bad.detail})")
        if self.counts.total() > self._max_fraction * self._total:
            raise ValueError(
                f"At least {self.counts.total():,} of {self._total:,} records are bad, more than "
                f"--max_bad_fraction={self._max_fraction:g} allows: {self.summary()}; first "
                f"{', '.join(self._first)}. Fix them or raise --max_bad_fraction."
            )

    def summary(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())


def _good_pairs(source: Source, bad: _BadRecords, report: dict) -> Iterator[Pair]:
    """The pairs whose images decode; the rest goes to `bad`, counts to `report`."""
    for record in tqdm(_decoded(source), total=len(source), unit="pair", disable=None):
        if isinstance(record, BadRecord):
            bad.add(record)
            continue
        report["pairs"] += 1
        report["captions"] += len(record.captions)
        report["image_bytes"] += len(record.image)
        yield record
    if not report["pairs"]:
        raise ValueError(f"No usable pair in {len(source):,} records: {bad.summary()}.")


def _decoded(source: Source) -> Iterator[Pair | BadRecord]:
    """Decodes images on all cores, in order; only one chunk is in memory at a time."""
    unread = iter(source)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(itertools.islice(unread, 256)):
            yield from pool.map(_check_image, chunk)


def _check_image(record: Pair | BadRecord) -> Pair | BadRecord:
    if isinstance(record, Pair):
        try:
            preprocess_image(record.image, image_size=32)
        except UnreadableImageError as error:
            return BadRecord(record.id, "unreadable image", str(error))
    return record


class _PairsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes pairs as they come; `disable_shuffling` keeps index i the i-th of them."""

    name = records.NAME
    code_path = None  # no checksums of downloads lie beside this file, so TFDS need not look
    VERSION = tfds.core.Version(records.VERSION)

    def __init__(self, pairs: Iterable[Pair], split: str, data_dir: epath.Path):
        self._pairs, self._split = pairs, split
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict(
            {
                "id": text,
                "image": tfds.features.Image(shape=(None, None, 3)),
                "captions": tfds.features.Sequence(text),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager) -> dict:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for i, pair in enumerate(self._pairs):
            yield i, pair._asdict()


def _write(pairs: Iterable[Pair], folder: epath.Path, split: str, num_shards: int | None) -> None:
    builder = _PairsBuilder(pairs, split, folder)
    downloads = folder / "downloads"  # TFDS wants the folder even though nothing is downloaded
    tfds.disable_progress_bar()  # it has no total; ours has
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS names the unfinished folder there
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(num_shards=num_shards),
        )
    downloads.rmtree()


def main(argv: list[str]) -> None:
    """The command: reads flags, prepares, says what it made."""
    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS logs each thing it does
    options = flags.FLAGS
    report = prepare(
        sources.open_source(options.source, options.images),
        options.out,
        split=options.split,
        max_bad_fraction=options.max_bad_fraction,
        num_shards=options.num_shards,
    )
    print(
        f"{options.out}: {report['pairs']:,} pairs with {report['captions']:,} captions, "
        f"{report['image_bytes'] / 1e6:,.1f} MB of images; {report['bad']:,} bad records left out."
    )


def _define_flags() -> None:
    """Called by the command alone: who imports this module has flags of their own."""
    flags.DEFINE_string("source", None, "KIND:PATH: sharegpt4v:captions.json or folder:path.")
    flags.DEFINE_string("images", None, "The folder that sharegpt4v's image paths are in.")
    flags.DEFINE_string("out", None, "The folder to make.")
    flags.DEFINE_string("split", "train", "The name of the split to write.")
    flags.DEFINE_float("max_bad_fraction", 1e-3, "Stop if a larger part of the records is bad.")
    flags.DEFINE_integer("num_shards", None, "Files to write; TFDS chooses if not given.")
    flags.mark_flags_as_required(["source", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
