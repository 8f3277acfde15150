"""Data sets that TFDS has prepared, as ArrayRecord or TFRecord files, read without TensorFlow."""

import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from google.protobuf.message import DecodeError

from clipmoe_jax.core.checks import check_size
from clipmoe_jax.data.array_record_chunks import MAX_BYTES
from clipmoe_jax.data.array_records import ArrayRecords, split_parts
from clipmoe_jax.data.sources.base import (
    BadRecord,
    Pair,
    as_text,
    make_pair,
    raise_passing,
)
from clipmoe_jax.data.sources.files import FOLLOW_LINKS, plain_files_under
from clipmoe_jax.data.tfds_folders import check_splits, tfds_features_alone

CAPTION_FEATURES = ("captions", "caption", "text")
LENGTH, CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


class Tfds:
    """NAME or the folder of a version, with options: `coco_captions?data_dir=/data&caption=captions/text`.

    Without an id feature, ids are SPLIT:NUMBER.
    """

    def __init__(
        self,
        path: str,
        *,
        data_dir: str | None = None,
        split: str = "train",
        image: str = "image",
        caption: str = "",
        id: str = "",
        follow_links: bool = False,
    ):
        """Opens the data set.

        Args:
            path: its name, or the folder of one of its versions.
            data_dir: the folder that names are looked up in; None is TFDS's own.
            split: a split or a slice of one.
            image: the feature of images; a slash stands between the name of a feature and of one inside it.
            caption: that of captions, "captions", "caption" or "text" unless told. It may hold many, or a
                class label ("label"), whose name is the caption.
            id: that of ids.
            follow_links: reads links inside.

        Raises:
            FileNotFoundError: it is not prepared.
            ValueError: it has no such split or feature, or features that are none of TFDS's; there is a link
                in it, a device or a pipe.
        """
        import tensorflow_datasets as tfds  # slow to import
        from tensorflow_datasets.core import read_only_builder

        self._split, self._image, self._id = split, image, id
        self._decoders = {image: tfds.decode.SkipDecoding()}
        _check_files(path, data_dir, follow_links)
        builder: Any  # the methods of TFDS's own type lose their parameters to its decorators
        try:
            with tfds_features_alone():
                if epath.Path(path).exists():
                    builder = tfds.builder_from_directory(path)
                else:
                    builder = read_only_builder.builder_from_files(path, data_dir=data_dir)
                check_splits(builder)
        except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"source tfds:{path}: no prepared data set of that name or folder: "
                f"{str(error).splitlines()[0]}"
            ) from error
        except ValueError as error:
            raise ValueError(f"source tfds:{path}: {error}") from error
        features = builder.info.features
        self._caption = caption or next((name for name in CAPTION_FEATURES if name in features), "")
        known = _names(features)
        for option, name in (("image", self._image), ("caption", self._caption), ("id", self._id)):
            if (name or option != "id") and name not in known:
                raise ValueError(
                    f"source tfds:{path} has no feature {name!r}: set {option}= to one of {sorted(known)}"
                )
        splits = builder.info.splits
        try:
            split_parts(splits, split)
        except ValueError as error:
            raise ValueError(
                f"source tfds:{path} has no split {split!r}: set split= to parts of {sorted(splits)}"
            ) from error
        feature = features[self._caption] if self._caption in features else None
        self._labels: Any = feature if hasattr(feature, "int2str") else None
        self._features = features
        kind = ArrayRecords if builder.info.file_format.value == "array_record" else _TfRecords
        files = splits[split].file_instructions
        self._first_file = files[0].filename
        num_bytes = sum(epath.Path(file.filename).stat().length for file in files)
        if (num_records := sum(file.take for file in files)) > num_bytes:
            raise ValueError(f"source tfds:{path}: {num_records:,} records in files of {num_bytes:,} bytes")
        self._records = kind(files)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        for i in range(first, len(self)):
            try:
                record = self._features.deserialize_example_np(self._records[i], decoders=self._decoders)
            except (DecodeError, RuntimeError, ValueError, KeyError, OSError) as error:
                raise_passing(error, self._first_file)
                detail = str(error).partition("\n")[0]
                yield BadRecord(f"{self._split}:{i}", "damaged record", detail)
            else:
                yield self._read(f"{self._split}:{i}", record)

    def _read(self, place: str, record: dict) -> Pair | BadRecord:
        ids = list(_walk(record, self._id)) if self._id else []
        record_id = str(as_text(ids[0])) if ids else place
        images = list(_walk(record, self._image))
        if len(images) != 1 or not isinstance(images[0], bytes):
            return BadRecord(record_id, "malformed entry", f"{self._image!r} is not one image file")
        captions = list(_walk(record, self._caption))
        if self._labels is not None:
            count = self._labels.num_classes
            if unknown := [label for label in captions if not 0 <= label < count]:  # -1 in a test set
                return BadRecord(record_id, "unknown label", f"{unknown[0]} is none of the {count} classes")
            captions = map(self._labels.int2str, captions)
        return make_pair(record_id, images[0], map(as_text, captions))


def tfds_folder(path: str, data_dir: str | None) -> str | None:
    """Returns the folder of a data set, which may be its own path or in `data_dir` (None: TFDS's own)."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    places = (path, os.path.join(os.path.expanduser(folder), path))
    return next((place for place in places if os.path.exists(place)), None)


def _check_files(path: str, data_dir: str | None, follow_links: bool) -> None:
    """Raises ValueError for what TFDS would read for ever, for JSON that is too large, and for links."""
    folder = tfds_folder(path, data_dir)
    if folder is None or not os.path.isdir(folder):
        return
    for entry in plain_files_under(folder, "tfds", follow_links):
        if entry.is_symlink() and not follow_links:
            raise ValueError(f"source tfds:{path} has a link, {entry.path}: {FOLLOW_LINKS}")
        if not entry.is_file():
            raise ValueError(f"source tfds:{path}: {entry.path} is no plain file: remove it")
        if entry.name.endswith(".json"):
            check_size(entry.path)


class _TfRecords:
    """The serialized records of TFRecord files by index; their places are looked up once, at the start.

    A record is its length (uint64, little endian), the length's checksum, the data and its checksum.
    """

    def __init__(self, files: Iterable[Any]):
        """files: as for `ArrayRecords`. Raises ValueError if one lacks records or a length is damaged."""
        self._places = []
        for part in files:
            places = list(_offsets(epath.Path(part.filename)))
            if len(places) != part.examples_in_shard:
                raise ValueError(
                    f"{part.filename} has {len(places):,} records, its data set says "
                    f"{part.examples_in_shard:,}: prepare that again"
                )
            self._places += [(part.filename, *place) for place in places[part.skip : part.skip + part.take]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> bytes:
        """Returns a record. Raises ValueError if it is damaged or too large."""
        filename, offset, length = self._places[i]
        if length > MAX_BYTES:
            raise ValueError(f"it has {length:,} bytes, of which {MAX_BYTES:,} may be read")
        with epath.Path(filename).open("rb") as file:
            file.seek(offset)
            data, checksum = file.read(length), file.read(CHECKSUM.size)
        if checksum != _checksum(data):
            raise ValueError(f"its checksum is not that of {length:,} bytes from {offset:,} in {filename}")
        return data


def _offsets(path: epath.Path) -> Iterator[tuple[int, int]]:
    """Yields (first byte, length) of each record of a file. Raises ValueError if it is cut off or a length is
    damaged."""
    size, offset = path.stat().length, 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            head, checksum = file.read(LENGTH.size), file.read(CHECKSUM.size)
            if len(checksum) == CHECKSUM.size and checksum != _checksum(head):
                raise ValueError(f"{path} is damaged at byte {offset:,}: fetch or prepare it again")
            start = offset + LENGTH.size + CHECKSUM.size
            end = start + LENGTH.unpack(head)[0] + CHECKSUM.size if len(head) == LENGTH.size else size + 1
            if end > size:
                raise ValueError(f"{path} is cut off at byte {offset:,} of {size:,}")
            yield start, end - CHECKSUM.size - start
            offset = end


def _checksum(data: bytes) -> bytes:
    """Returns the checksum of a TFRecord's part: CRC32C turned by 15 bits, plus a constant."""
    import google_crc32c  # slow to import

    crc = google_crc32c.value(data)
    return CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _walk(value: Any, name: str) -> Iterator[Any]:
    """Yields the values under `a/b` in nested dicts and sequences, each element of a sequence."""
    if name and isinstance(value, dict):
        first, _, rest = (name, "", "") if name in value else name.partition("/")
        yield from _walk(value[first], rest)
    elif not isinstance(value, (str, bytes, dict)) and hasattr(value, "__len__"):
        for element in value:
            yield from _walk(element, name)
    else:
        yield value


def _names(features: Any) -> set[str]:
    """Returns the names of the features that hold values, `a/b` for those inside another."""
    inside = getattr(features, "feature", features)  # of a sequence
    if not hasattr(inside, "items"):
        return {""}
    return {f"{name}/{rest}".rstrip("/") for name, value in inside.items() for rest in _names(value)}
