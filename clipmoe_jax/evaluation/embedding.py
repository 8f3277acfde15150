"""Features of a source's pairs as files, in the layout of clip-retrieval.

    img_emb/img_emb_0.npy         (n, d) float16 unit features of a part's images
    text_emb/text_emb_0.npy       (n, d) float16, of each image's first caption
    metadata/metadata_0.parquet   image_path (the pair's id), caption, entry (its number in the source)

Numbers have leading zeros where there are ten parts or more. Source: clip-retrieval's README ("clip
inference") and its clip_inference/writer.py. Beside them lie report.json (counts) and bad_records.jsonl
(every entry that was left out, and why). Letters: n images of a part, d embedding, S image size.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from clipmoe_jax.core import artifacts, metrics
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.core.terminal import reading
from clipmoe_jax.data.decoding import map_decoding
from clipmoe_jax.data.npy import save_array
from clipmoe_jax.data.preparation import BAD_RECORDS, BadRecords, check_on_disk, entries_per_shard
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
from clipmoe_jax.data.records import Records, check_stored_size
from clipmoe_jax.data.shard_files import SourceChangedError, added_to, as_told, image_bytes
from clipmoe_jax.data.sources.base import BadRecord, Pair, Source, check_not_empty
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import Encoder

REPORT = "report.json"
# What each whole part was made from, until all are whole.
PARTS = "parts"


class PreparedPairs:
    """The pairs of a prepared data set, as a source yields them.

    Attributes:
        stored_size: S, where the bytes of an image are pixels, uint8 (S, S, 3); None for those of a file.
    """

    def __init__(self, records: Records, image_size: int):
        """Raises ValueError for stored pixels of another size."""
        if records.image_size:
            check_stored_size(records.image_size, image_size)
        self._records, self.stored_size = records, records.image_size

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Pair]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair]:
        for index in range(first, len(self)):
            record = self._records[index]
            image = record["image"].tobytes() if self.stored_size else record["image"]
            yield Pair(record["id"], image, tuple(record["captions"]))


def image_of(source: Source, pair: Pair) -> bytes | np.ndarray:
    """Returns the contents of a pair's image file, or its stored pixels, uint8 (S, S, 3)."""
    size = source.stored_size if isinstance(source, PreparedPairs) else None
    return np.frombuffer(pair.image, np.uint8).reshape(size, size, 3) if size else pair.image


class PartFiles(NamedTuple):
    """The files of a part; `made_from` goes when all parts are whole."""

    image: epath.Path
    text: epath.Path
    metadata: epath.Path
    made_from: epath.Path

    @classmethod
    def of(cls, folder: epath.Path, k: int, num_parts: int) -> "PartFiles":
        """Returns those of part k."""
        number = f"{k:0{len(str(num_parts))}}"
        return cls(
            folder / "img_emb" / f"img_emb_{number}.npy",
            folder / "text_emb" / f"text_emb_{number}.npy",
            folder / "metadata" / f"metadata_{number}.parquet",
            folder / PARTS / f"{number}.json",
        )


class _Decoded(NamedTuple):
    id: str
    caption: str
    pixels: np.ndarray  # uint8 (S, S, 3)


class Embedder:
    """Writes the features of a source's images, and of their captions where there is a tokenizer.

    Attributes:
        num_encoded: images that were encoded so far.
    """

    def __init__(self, source: Source, encoder: Encoder, image_size: int, tokenizer: Tokenizer | None):
        self._source, self._encoder = source, encoder
        self._image_size, self._tokenizer = image_size, tokenizer
        self.num_encoded = 0

    def write(
        self,
        out: str,
        *,
        inputs: artifacts.Inputs,
        num_parts: int | None = None,
        max_bad_fraction: float = 1e-3,
    ) -> dict[str, Any]:
        """Writes the features to the folder `out`, in the source's order, leaving bad records out.

        The work happens in `out`.unfinished, which becomes `out` when it is whole. A killed call with the
        same inputs is gone on with, and ends with the same files. What the whole parts were made from is read
        again; if that has changed, all is encoded anew.

        Args:
            out: a folder that does not exist yet.
            inputs: names of the model and the source, and what else the features depend on.
            num_parts: files of each kind; None makes them of `entries_per_shard` entries each.
            max_bad_fraction: of the source's entries, how many may be bad.

        Returns:
            The report: the inputs, "images", "bad" and "bad_by_kind".

        Raises:
            TooManyBadRecordsError: more than max_bad_fraction are bad; names the file that lists them.
            ValueError: `out` is taken or in a bucket, or there is no usable image.
        """
        check_on_disk(out)
        check_not_empty(self._source)
        entries = len(self._source)
        per_part = -(-entries // num_parts) if num_parts else entries_per_shard(entries)
        made_from = {**inputs, "entries": entries, "per_part": per_part}
        with artifacts.new_folder(
            epath.Path(out), keep_failed=True, inputs=made_from, with_checksums=True
        ) as folder:
            try:
                images, bad = self._write_parts(folder, per_part, max_bad_fraction)
            except SourceChangedError:
                (folder / PARTS).rmtree()
                images, bad = self._write_parts(folder, per_part, max_bad_fraction)
            if not images:
                raise ValueError(f"no usable image in {entries:,} records: {bad.summary()}")
            report = {**inputs, "images": images, "bad": bad.counts.total(), "bad_by_kind": dict(bad.counts)}
            artifacts.write_json(folder / REPORT, report)
            (folder / PARTS).rmtree()
        return report

    def _write_parts(
        self, folder: epath.Path, per_part: int, max_bad_fraction: float
    ) -> tuple[int, BadRecords]:
        """Writes the parts that are not there. Returns the images of all, and the bad records."""
        total, entries, images = len(self._source), iter(self._source), 0
        num_parts = -(-total // per_part)
        progress = metrics.progress_bar("embedding", total, "image")
        with (folder / BAD_RECORDS).open("w") as log, progress:
            bad = BadRecords(log, total, max_bad_fraction)
            for k in range(num_parts):
                of_part, files = itertools.islice(entries, per_part), PartFiles.of(folder, k, num_parts)
                images += self._write_part(of_part, k * per_part, files, bad, progress)
            bad.check()
        return images, bad

    def _write_part(
        self,
        entries: Iterable[Pair | BadRecord],
        first: int,
        files: PartFiles,
        bad: BadRecords,
        progress: tqdm,
    ) -> int:
        """Writes a part unless it is there; returns its images.

        first: the number of its first entry. Raises SourceChangedError if it was made from other entries.
        """
        digest = hashlib.sha256()
        entries = added_to(digest, bytearray(), entries)
        if files.made_from.exists():
            progress.update(sum(1 for _ in entries))
            made_from = read_json(files.made_from)
            if made_from.get("source") != digest.hexdigest():
                raise SourceChangedError
            for fields in field(made_from, "bad", list, str(files.made_from)):
                bad.add(BadRecord(**fields))
            return field(made_from, "images", int, str(files.made_from))
        rows, left_out = [], []

        def good() -> Iterator[_Decoded]:
            decoded = map_decoding(self._decode, entries, image_bytes)
            for number, record in enumerate(decoded, first):
                progress.update()
                if isinstance(record, BadRecord):
                    left_out.append(as_told(record))
                    bad.add(left_out[-1])
                else:
                    rows.append((record.id, record.caption, number))
                    yield record

        inputs = ["image", "text"] if self._tokenizer else ["image"]
        features = self._encoder.batches(self._batches(good()), inputs)
        for name, array in features.items():
            file = getattr(files, name)
            file.parent.mkdir(exist_ok=True)
            save_array(file, array.astype(np.float16))
        _write_rows(files.metadata, rows)
        files.made_from.parent.mkdir(exist_ok=True)
        content = {"source": digest.hexdigest(), "images": len(rows)}
        artifacts.write_json(files.made_from, {**content, "bad": [record._asdict() for record in left_out]})
        return len(rows)

    def _decode(self, record: Pair | BadRecord) -> _Decoded | BadRecord:
        """Returns a pair as it is encoded, or why it cannot be."""
        if isinstance(record, BadRecord):
            return record
        pixels = image_of(self._source, record)
        if isinstance(pixels, bytes):
            try:
                with reading([record.id]):
                    pixels = preprocess_image(pixels, self._image_size)
            except UnreadableImageError as error:
                return BadRecord(record.id, "unreadable image", str(error))
        return _Decoded(record.id, record.captions[0], pixels)

    def _batches(self, pairs: Iterator[_Decoded]) -> Iterator[dict[str, np.ndarray]]:
        while batch := list(itertools.islice(pairs, self._encoder.batch_size)):
            arrays = {"image": np.stack([pair.pixels for pair in batch]), "valid": np.ones(len(batch), bool)}
            if self._tokenizer:
                arrays["text"] = self._tokenizer([pair.caption for pair in batch])
            self.num_encoded += len(batch)
            yield arrays


def _write_rows(path: epath.Path, rows: Sequence[tuple[str, str, int]]) -> None:
    """Writes the table of a part's images: id, caption and number of each."""
    import pyarrow.parquet  # here because it is slow to import

    ids, captions, numbers = zip(*rows, strict=True) if rows else ((), (), ())
    columns = {"image_path": ids, "caption": captions, "entry": numbers}
    types = pyarrow.schema(
        [("image_path", pyarrow.string()), ("caption", pyarrow.string()), ("entry", pyarrow.int64())]
    )
    path.parent.mkdir(exist_ok=True)
    with written_whole(path) as where:
        pyarrow.parquet.write_table(pyarrow.table(columns, types), where)
