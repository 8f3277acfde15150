"""Data sets that TFDS has prepared, as ArrayRecord or TFRecord files, read without TensorFlow."""

import struct
from collections.abc import Iterator
from typing import Any

from etils import epath
from google.protobuf.message import DecodeError

from clipmoe_jax.data.sources.base import BadRecord, Pair, as_text, make_pair

CAPTION_FEATURES = ("captions", "caption", "text")


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

        Raises:
            FileNotFoundError: it is not prepared.
            ValueError: it has no such split or feature.
        """
        import tensorflow_datasets as tfds  # slow to import
        from tensorflow_datasets.core import read_only_builder

        self._split, self._image, self._id = split, image, id
        builder: Any  # the methods of TFDS's own type lose their parameters to its decorators
        try:
            if epath.Path(path).exists():
                builder = tfds.builder_from_directory(path)
            else:
                builder = read_only_builder.builder_from_files(path, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"source tfds:{path}: no prepared data set of that name or folder: "
                f"{str(error).splitlines()[0]}"
            ) from error
        features = builder.info.features
        self._caption = caption or next((name for name in CAPTION_FEATURES if name in features), "")
        known = _names(features)
        for option, name in (("image", self._image), ("caption", self._caption), ("id", self._id)):
            if (name or option != "id") and name not in known:
                raise ValueError(
                    f"source tfds:{path} has no feature {name!r}: set {option}= to one of {sorted(known)}"
                )
        if split.partition("[")[0] not in builder.info.splits:
            raise ValueError(
                f"source tfds:{path} has no split {split!r}: it has {sorted(builder.info.splits)}"
            )
        feature = features[self._caption] if self._caption in features else None
        self._as_caption = getattr(feature, "int2str", as_text)  # a class label's number becomes its name
        decoders = {self._image: tfds.decode.SkipDecoding()}
        if builder.info.file_format.value == "array_record":
            self._records = builder.as_data_source(split, decoders=decoders)
        else:
            self._records = _TfRecords(builder, split, decoders)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for i in range(len(self)):
            try:
                record = self._records[i]
            except (DecodeError, RuntimeError, ValueError, KeyError, OSError) as error:
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
        return make_pair(record_id, images[0], map(self._as_caption, _walk(record, self._caption)))


class _TfRecords:
    """Random access over a split's TFRecord files; the places of records are looked up once, at the start.

    A record is its length (uint64, little endian), a checksum (4 bytes), the data and another checksum.
    """

    def __init__(self, builder: Any, split: str, decoders: dict):
        self._features, self._decoders = builder.info.features, decoders
        self._places = []
        for part in builder.info.splits[split].file_instructions:
            places = list(_offsets(epath.Path(part.filename)))
            stop = None if part.take == -1 else part.skip + part.take
            self._places += [(part.filename, *place) for place in places[part.skip : stop]]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict:
        filename, offset, length = self._places[i]
        with epath.Path(filename).open("rb") as file:
            file.seek(offset)
            return self._features.deserialize_example_np(file.read(length), decoders=self._decoders)


def _offsets(path: epath.Path) -> Iterator[tuple[int, int]]:
    """Yields (first byte, length) of each record of a file. Raises ValueError if it is cut off."""
    size, offset = path.stat().length, 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            head = file.read(8)
            end = offset + 16 + struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
            if end > size:
                raise ValueError(f"{path} is cut off at byte {offset:,} of {size:,}")
            yield offset + 12, end - offset - 16
            offset = end


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
