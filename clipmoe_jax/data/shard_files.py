"""Writes the ArrayRecord files of a prepared data set, and beside each what is known of its entries."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]: no stub
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from clipmoe_jax.core import artifacts, checksums
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.terminal import reading, shortened
from clipmoe_jax.data import records
from clipmoe_jax.data.decoding import map_decoding
from clipmoe_jax.data.npy import load_array
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.sources.base import (
    AttributeTable,
    BadRecord,
    Pair,
    duplicate_of,
    excess_of_text,
    id_digest,
)
from clipmoe_jax.data.tokenizer import word_ids

ENTRIES, DONE = ".entries.npy", ".done.json"
MOST_TOLD = 500  # characters of a bad record's id, and of what is wrong with it
MOST_TOKENS = np.iinfo(np.uint16).max
# An entry of the source: the digest of its id (0 if the source calls it bad), the bytes of its image as it
# came, its captions, and the tokens of the longest, start and end counted (0 if it is bad).
ENTRY = np.dtype([("id", "<u8", (2,)), ("image_bytes", "<u4"), ("captions", "<u2"), ("tokens", "<u2")])


class SourceChangedError(Exception):
    """A source yields other entries than a file was made from."""


class Shard(NamedTuple):
    """A file, as far as it is known without its records.

    Attributes:
        entries: (E,) of ENTRY, those of the source that it is made from.
        bad: what is wrong with the bad ones, in their order.
        sha256: of the records.
    """

    entries: np.ndarray
    bad: list[BadRecord]
    sha256: str


class _Decoded(NamedTuple):
    """A pair as it is written, and what is counted of it."""

    example: dict[str, Any]
    num_captions: int
    image_bytes: int
    token_count: int


class Encoder:
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
        longest = min(2 + max(map(len, words)), MOST_TOKENS)
        return _Decoded(example, len(words), len(record.image), longest)

    def id_of(self, serialized: bytes) -> str:
        """Returns the id of a serialized record."""
        skipped = {} if self._pixels else {"image": tfds.decode.SkipDecoding()}
        record: Any = self.features.deserialize_example_np(serialized, decoders=skipped)
        return record["id"].decode("utf-8")

    def serialize(self, example: dict[str, Any]) -> bytes:
        """Returns the same bytes for the same example."""
        encoded = self._serializer.get_tf_example(self.features.encode_example(example))
        return encoded.SerializeToString(deterministic=True)


def beside(path: epath.Path) -> tuple[epath.Path, epath.Path]:
    """Returns the two files that tell of a data set's file until the set is whole."""
    name = path.name.replace(checksums.OWN_CHECKSUMS, "-")  # of files that have none of their own
    return path.parent / f"{name}{ENTRIES}", path.parent / f"{name}{DONE}"


def read_shard(path: epath.Path) -> Shard:
    """Returns what is known of a file that is whole. Raises ValueError naming what is damaged beside it."""
    table, done = beside(path)
    content = read_json(done)
    entries, bad = load_array(table), field(content, "bad", list, str(done))
    if entries.dtype != ENTRY or len(bad) != np.count_nonzero(entries["tokens"] == 0):
        raise ValueError(f"{table} is damaged, or not of {done.name}")
    return Shard(entries, [BadRecord(**fields) for fields in bad], field(content, "sha256", str, str(done)))


def make_shard(
    entries: Iterable[Pair | BadRecord],
    path: epath.Path,
    encoder: Encoder,
    add_bad: Callable[[BadRecord], None],
    progress: tqdm,
    after_entry: Callable[[], None],
) -> Shard:
    """Writes one file, whole or not at all, unless it is there.

    add_bad: called with each bad record; it may raise. Raises SourceChangedError if the file is there and was
    made from other entries.
    """
    table, done = beside(path)
    source_digest, ids = hashlib.sha256(), bytearray()
    entries = added_to(source_digest, ids, entries)
    if done.exists() and table.exists():
        progress.update(sum(1 for _ in entries))
        if read_json(done).get("source") != source_digest.hexdigest():
            raise SourceChangedError
        shard = read_shard(path)
        for record in shard.bad:
            add_bad(record)
        return shard
    rows, bad = [], []
    with _Writer(path) as writer:
        for record in map_decoding(encoder.decode, entries, image_bytes):
            progress.update()
            after_entry()
            if isinstance(record, BadRecord):
                record = as_told(record)
                rows.append((0, 0, 0))
                bad.append(record)
                add_bad(record)
                continue
            writer.write(encoder.serialize(record.example))
            rows.append((record.image_bytes, record.num_captions, record.token_count))
    found = np.zeros(len(rows), ENTRY)
    found["id"] = np.frombuffer(ids, "<u8").reshape(-1, 2)
    for column, name in enumerate(("image_bytes", "captions", "tokens")):
        found[name] = [row[column] for row in rows]
    with table.open("wb") as file:
        np.save(file, found)
    content = {"bad": [record._asdict() for record in bad], "sha256": writer.sha256}
    artifacts.write_json(done, content | {"source": source_digest.hexdigest()})
    return Shard(found, bad, writer.sha256)


def without_duplicates(
    path: epath.Path, shard: Shard, duplicates: Iterable[int], target: epath.Path, encoder: Encoder
) -> Shard:
    """Copies a file without some of its entries, which become bad records: their ids came before.

    duplicates: numbers of entries of the file. Returns what is known of the copy, `target`.
    """
    dropped, entries, bad = set(duplicates), shard.entries.copy(), []
    entries["tokens"][list(dropped)] = 0
    bad_ones, number = iter(shard.bad), 0
    with reader(path) as records_of_file, _Writer(target) as writer:
        for i, tokens in enumerate(shard.entries["tokens"].tolist()):
            if not tokens:
                record = next(bad_ones)
                bad.append(duplicate_of(record.id) if i in dropped else record)
                continue
            serialized = records_of_file.read([number])[0]
            number += 1
            if i in dropped:
                bad.append(as_told(duplicate_of(encoder.id_of(serialized))))
            else:
                writer.write(serialized)
    return Shard(entries, bad, writer.sha256)


@contextlib.contextmanager
def reader(path: epath.Path) -> Iterator[Any]:
    """Opens a file to read its records from the first to the last."""
    opened = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
        yield opened
    finally:
        opened.close()


class _Writer:
    """Writes the records of a file, which is at its path when the block ends without an error.

    Attributes:
        sha256: of the records, once it is whole.
    """

    def __init__(self, path: epath.Path):
        self._path, self._unfinished = path, path.parent / f"{path.name}.unfinished"
        self._digest, self.sha256 = hashlib.sha256(), ""

    def __enter__(self) -> "_Writer":
        # Neither JPEG files nor pixels get much smaller by compression, and reading is half as fast then.
        options = "group_size:1,uncompressed"
        self._writer = array_record_module.ArrayRecordWriter(os.fspath(self._unfinished), options)
        return self

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self._digest.update(record)

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self._writer.close()
        if kind is None:
            self._unfinished.replace(self._path)
            self.sha256 = self._digest.hexdigest()


def added_to(digest: Any, ids: bytearray, entries: Iterable[Pair | BadRecord]) -> Iterator[Pair | BadRecord]:
    """Yields the entries, and adds each to a hash and its `id_digest`, 0 if it is bad, to `ids`."""
    for entry in entries:
        ids += id_digest(entry.id) if isinstance(entry, Pair) else bytes(16)
        if isinstance(entry, Pair):
            digest.update(entry.image)
            text = repr((entry.id, len(entry.image), entry.captions, entry.attributes))
        else:
            text = repr(tuple(entry))
        digest.update(text.encode("utf-8", "surrogatepass"))
        yield entry


def as_told(bad: BadRecord) -> BadRecord:
    """Returns a bad record as it is told: a stranger's names may have any length."""
    return bad._replace(id=shortened(bad.id, MOST_TOLD), detail=shortened(bad.detail, MOST_TOLD))


def image_bytes(entry: Pair | BadRecord) -> int:
    """Returns the bytes of an entry's image, 0 if it is bad."""
    return len(entry.image) if isinstance(entry, Pair) else 0
