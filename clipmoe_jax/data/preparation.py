"""Writes the pairs of a source as a prepared data set, which `data.records.Records` reads by index.

It is a TFDS data set in ArrayRecord files (`tfds.data_source("pairs", data_dir=OUT)` reads it too), with the
images as they came or as a model takes them. Beside it lie `report.json` (counts), `bad_records.jsonl` (every
entry that was left out, and why), the captions' lengths and, of a source that has attributes, their table
(`attributes.json`).
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]: no stub
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from clipmoe_jax.core import artifacts, metrics
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.core.json_files import read_json
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.terminal import reading, shortened
from clipmoe_jax.data import records
from clipmoe_jax.data.decoding import map_decoding
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.sources.base import (
    AttributeTable,
    BadRecord,
    Pair,
    Source,
    attribute_table,
    excess_of_text,
)
from clipmoe_jax.data.tokenizer import word_ids

# Entries of the source in a file, unless `num_shards` says otherwise: some 600 MB of pixels or photographs,
# and a multiple of that where there would be more files than MOST_SHARDS. A killed run goes on with the first
# file that is not whole.
ENTRIES_PER_SHARD, MOST_SHARDS = 4096, 4096
# What `write_pairs` is doing in a folder, until it is done.
PLAN = "plan.json"
MOST_TOLD = 500  # characters of a bad record's id, and of what is wrong with it


class TooManyBadRecordsError(ValueError):
    """A larger part of a source is bad than was allowed."""


class _SourceChangedError(Exception):
    """A source yields other entries than a file was made from."""


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
    if in_bucket(out):
        raise ValueError(f"{out} lies in a bucket: prepare on a disk, and copy the folder there")
    _check_arguments(split, max_bad_fraction, num_shards, pixels)
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
        TooManyBadRecordsError: more than max_bad_fraction are bad; says which are the first.
        ValueError: no usable pair, an argument that is out of range, or a source that changes meanwhile.
    """
    _check_arguments(split, max_bad_fraction, num_shards, pixels)
    if not len(source):
        raise ValueError("the source is empty: check its path")
    per_shard = -(-len(source) // num_shards) if num_shards else entries_per_shard(len(source))
    num_shards = -(-len(source) // per_shard)
    table = attribute_table(source)
    data = folder / records.NAME / records.VERSION
    plan = {"entries": len(source), "per_shard": per_shard, "split": split, "pixels": pixels}
    if not (folder / PLAN).exists() or read_json(folder / PLAN) != plan:
        _begin(folder, plan)
    encoder = _Encoder(pixels, table)
    template = f"{records.NAME}-{split}.array_record-{{:05d}}-of-{num_shards:05d}"
    paths = [data / template.format(k) for k in range(num_shards)]

    def make() -> tuple[list[dict[str, Any]], _BadRecords]:
        return _make_shards(source, folder, paths, per_shard, encoder, max_bad_fraction, after_entry)

    try:
        parts, bad = make()
    except _SourceChangedError:
        _begin(folder, plan)
        parts, bad = make()
    report: dict[str, Any] = {
        name: sum(part[name] for part in parts) for name in ("pairs", "captions", "image_bytes")
    }
    if not report["pairs"]:
        raise ValueError(f"no usable pair in {len(source):,} records: {bad.summary()}")
    digests = "".join(part["sha256"] for part in parts)
    report["sha256"] = hashlib.sha256(digests.encode()).hexdigest()
    report |= {"pixels": pixels, "bad": bad.counts.total(), "bad_by_kind": dict(bad.counts)}
    _write_metadata(data, split, encoder.features, parts)
    token_counts = [count for part in parts for count in part["token_counts"]]
    with (folder / f"token_counts-{split}.npy").open("wb") as file:
        np.save(file, np.array(token_counts, np.uint16))
    if table is not None:
        artifacts.write_json(
            folder / records.ATTRIBUTES, {name: attribute._asdict() for name, attribute in table.items()}
        )
    artifacts.write_json(folder / records.REPORT, report)
    for path in data.glob("*.done.json"):
        path.unlink()
    (folder / PLAN).unlink()
    return report


def entries_per_shard(num_entries: int) -> int:
    """Returns how many entries a file has: ENTRIES_PER_SHARD up to 16.8 million entries, then more."""
    return ENTRIES_PER_SHARD * -(-num_entries // (ENTRIES_PER_SHARD * MOST_SHARDS))


def _begin(folder: epath.Path, plan: dict[str, Any]) -> None:
    """Deletes the files that are there, and records what is done now."""
    data = folder / records.NAME / records.VERSION
    if data.exists():
        data.rmtree()
    data.mkdir(parents=True)
    artifacts.write_json(folder / PLAN, plan)


def _check_arguments(split: str, max_bad_fraction: float, num_shards: int | None, pixels: int | None) -> None:
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction} is not a fraction from 0 to 1")
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards={num_shards} is too few: use 1 or more")
    if pixels is not None and pixels < 1:
        raise ValueError(f"pixels={pixels} is no size: use that of the model, such as 224")
    if not split.isidentifier() or split == "all":
        raise ValueError(f"split={split} cannot name a split: use a word such as train")


class _BadRecords:
    """Counts bad records, names them in a log, and stops when there are too many."""

    def __init__(self, folder: epath.Path, log: IO, total: int, max_fraction: float):
        self.counts = Counter()
        self._folder, self._log, self._total, self._max_fraction = folder, log, total, max_fraction
        self._first = []

    def add(self, bad: BadRecord) -> None:
        self.counts[bad.kind] += 1
        self._log.write(json.dumps(bad._asdict()) + "\n")
        if len(self._first) < 3:
            self._first.append(f"{bad.id} ({bad.kind}: {bad.detail})")
        if self.counts.total() > self._max_fraction * self._total:
            raise TooManyBadRecordsError(
                f"at least {self.counts.total():,} of {self._total:,} records are bad, more than "
                f"max_bad_fraction={self._max_fraction:g} allows: {self.summary()}; first "
                f"{', '.join(self._first)}. Raise max_bad_fraction, or fix them and start again "
                f"({self._folder} keeps what was read)"
            )

    def summary(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())


class _Decoded(NamedTuple):
    """A pair as it is written, and what is counted of it."""

    example: dict[str, Any]
    num_captions: int
    image_bytes: int
    token_count: int


class _Encoder:
    """Turns pairs into serialized records of a TFDS data set.

    Attributes:
        features: of the data set.
    """

    def __init__(self, pixels: int | None, table: AttributeTable | None):
        self._pixels, self._table = pixels, table
        text = tfds.features.Text()
        features = {"id": text, "captions": tfds.features.Sequence(text)}
        if pixels is None:
            features["image"] = tfds.features.Image(shape=(None, None, 3))
        else:
            raw = tfds.features.Tensor(shape=(), dtype=np.bytes_)
            features["pixels"] = raw  # uint8 (S, S, 3)
            features["tokens"] = raw  # uint16, CAPTION_END after each caption
        if table is not None:
            features["attributes"] = tfds.features.Sequence(text)  # values, in the order of the table
        self.features = tfds.features.FeaturesDict(features)
        info: Any = self.features.get_serialized_info()
        self._serializer = ExampleSerializer(info)

    def decode(self, record: Pair | BadRecord) -> _Decoded | BadRecord:
        """Decodes the image and tokenises the captions; of a record that cannot be used, returns why."""
        if isinstance(record, BadRecord):
            return record
        if excess := excess_of_text(record.captions):
            return BadRecord(record.id, *excess)
        try:
            with reading([record.id]):
                image = preprocess_image(record.image, self._pixels or 32)
        except UnreadableImageError as error:
            return BadRecord(record.id, "unreadable image", str(error))
        words = word_ids(record.captions)
        example: dict[str, Any] = {"id": record.id, "captions": record.captions}
        if self._pixels is None:
            example["image"] = record.image
        else:
            ids = np.concatenate([[*of_one, records.CAPTION_END] for of_one in words])
            example |= {"pixels": image.tobytes(), "tokens": ids.astype("<u2").tobytes()}
        if self._table is not None:
            attributes = record.attributes or {}
            for name, attribute in self._table.items():
                if attributes.get(name) not in attribute.values:
                    return BadRecord(record.id, "bad attribute", f"{name} is {attributes.get(name)!r}")
            example["attributes"] = [attributes[name] for name in self._table]
        longest = min(2 + max(map(len, words)), np.iinfo(np.uint16).max)
        return _Decoded(example, len(words), len(record.image), longest)

    def serialize(self, example: dict[str, Any]) -> bytes:
        """Returns the same bytes for the same example."""
        encoded = self._serializer.get_tf_example(self.features.encode_example(example))
        return encoded.SerializeToString(deterministic=True)


def _make_shards(
    source: Source,
    folder: epath.Path,
    paths: Sequence[epath.Path],
    per_shard: int,
    encoder: _Encoder,
    max_bad_fraction: float,
    after_entry: Callable[[], None],
) -> tuple[list[dict[str, Any]], _BadRecords]:
    """Writes every file, as `_make_shard` does, and the log of bad records."""
    entries, parts = iter(source), []
    progress = metrics.progress_bar("preparing", len(source), "pair")
    with (folder / "bad_records.jsonl").open("w") as log, progress:
        bad = _BadRecords(folder, log, len(source), max_bad_fraction)
        for path in paths:
            shard = itertools.islice(entries, per_shard)
            parts.append(_make_shard(shard, path, encoder, bad, progress, after_entry))
    num_read = sum(part["pairs"] + len(part["bad"]) for part in parts) + sum(1 for _ in entries)
    if num_read != len(source):
        raise ValueError(
            f"the source had {len(source):,} records, and {num_read:,} were read: it changes; start again"
        )
    return parts, bad


def _make_shard(
    entries: Iterable[Pair | BadRecord],
    path: epath.Path,
    encoder: _Encoder,
    bad: _BadRecords,
    progress: tqdm,
    after_entry: Callable[[], None],
) -> dict[str, Any]:
    """Writes one file, whole or not at all, unless it is there.

    Returns {"pairs", "captions", "image_bytes", "token_counts" of each pair, "bad" records, "sha256" of the
    others, "source" a hash of the entries}. Raises _SourceChangedError if the file is there and was made from
    other entries.
    """
    done = path.parent / f"{path.name}.done.json"
    source_digest = hashlib.sha256()
    entries = _added_to(source_digest, entries)
    if done.exists():
        part = read_json(done)
        progress.update(sum(1 for _ in entries))
        if part.get("source") != source_digest.hexdigest():
            raise _SourceChangedError
        for fields in part["bad"]:
            bad.add(BadRecord(**fields))
        return part
    part: dict[str, Any] = {"pairs": 0, "captions": 0, "image_bytes": 0, "token_counts": [], "bad": []}
    digest = hashlib.sha256()
    unfinished = path.parent / f"{path.name}.unfinished"
    # Neither JPEG files nor pixels get much smaller by compression, and reading is half as fast then.
    writer = array_record_module.ArrayRecordWriter(os.fspath(unfinished), "group_size:1,uncompressed")
    try:
        for record in map_decoding(encoder.decode, entries, _image_bytes):
            progress.update()
            after_entry()
            if isinstance(record, BadRecord):
                record = _as_told(record)
                part["bad"].append(record._asdict())
                bad.add(record)
                continue
            serialized = encoder.serialize(record.example)
            writer.write(serialized)
            digest.update(serialized)
            part["pairs"] += 1
            part["captions"] += record.num_captions
            part["image_bytes"] += record.image_bytes
            part["token_counts"].append(record.token_count)
    finally:
        writer.close()
    unfinished.replace(path)
    part |= {"sha256": digest.hexdigest(), "source": source_digest.hexdigest()}
    artifacts.write_json(done, part)
    return part


def _added_to(digest: Any, entries: Iterable[Pair | BadRecord]) -> Iterator[Pair | BadRecord]:
    """Yields the entries, and adds each to a hash."""
    for entry in entries:
        if isinstance(entry, Pair):
            digest.update(entry.image)
            text = repr((entry.id, len(entry.image), entry.captions, entry.attributes))
        else:
            text = repr(tuple(entry))
        digest.update(text.encode("utf-8", "surrogatepass"))
        yield entry


def _as_told(bad: BadRecord) -> BadRecord:
    """Returns a bad record as it is told: a stranger's names may have any length."""
    return bad._replace(id=shortened(bad.id, MOST_TOLD), detail=shortened(bad.detail, MOST_TOLD))


def _image_bytes(entry: Pair | BadRecord) -> int:
    return len(entry.image) if isinstance(entry, Pair) else 0


def _write_metadata(
    data: epath.Path, split: str, features: tfds.features.FeaturesDict, parts: list[dict[str, Any]]
) -> None:
    """Writes the JSON files that make the ArrayRecord files a TFDS data set."""
    template = tfds.core.ShardedFileTemplate(
        data_dir=data, dataset_name=records.NAME, split=split, filetype_suffix="array_record"
    )
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[part["pairs"] for part in parts],
        num_bytes=sum(part["image_bytes"] for part in parts),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(data_dir=data, features=features, split_infos=[info], check_data=False)
