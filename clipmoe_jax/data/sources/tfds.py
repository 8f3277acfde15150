"""Data sets that TFDS has prepared, as ArrayRecord or TFRecord files, read without TensorFlow."""

import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs

from etils import epath
from google.protobuf.message import DecodeError

from clipmoe_jax.data.sources.base import BadRecord, Pair, as_text, make_pair

OPTIONS = {"data_dir": None, "split": "train", "image": "image", "caption": "", "id": ""}
CAPTION_FEATURES = ("captions", "caption", "text")


class Tfds:
    """NAME or the folder of a version, then options: `coco_captions?data_dir=/data&caption=captions/text`.

    split: "train" unless told, or a slice of one. image, caption, id: names of features, a slash for one in
    another; the caption feature is "captions", "caption" or "text" unless told, and may hold many, or a class
    label ("label"), whose name is the caption. Without an id feature, ids are SPLIT:NUMBER.
    """

    def __init__(self, spec: str):
        """Raises FileNotFoundError if it is not prepared, ValueError for unknown options or features."""
        import tensorflow_datasets as tfds  # slow to import

        path, _, query = spec.partition("?")
        given = {name: values[-1] for name, values in parse_qs(query).items()}
        if unknown := given.keys() - OPTIONS.keys():
            raise ValueError(
                f"--source=tfds:{spec}: no option {sorted(unknown)}; there are {sorted(OPTIONS)}."
            )
        options = OPTIONS | given
        self._split, self._image, self._id = options["split"], options["image"], options["id"]
        try:
            if epath.Path(path).exists():
                builder = tfds.builder_from_directory(path)
            else:
                builder = tfds.core.read_only_builder.builder_from_files(path, data_dir=options["data_dir"])
        except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"--source=tfds:{spec}: no prepared data set of that name or folder: "
                f"{str(error).splitlines()[0]}"
            ) from error
        features = builder.info.features
        self._caption = options["caption"] or next((n for n in CAPTION_FEATURES if n in features), "")
        names = _names(features)
        for option in ("image", "caption", "id"):
            name = getattr(self, f"_{option}")
            if (name or option != "id") and name not in names:
                raise ValueError(
                    f"--source=tfds:{spec} has no feature {name!r}: set {option}= to one of {sorted(names)}."
                )
        if self._split.partition("[")[0] not in builder.info.splits:
            raise ValueError(f"--source=tfds:{spec} has the splits {sorted(builder.info.splits)}.")
        feature = features[self._caption] if self._caption in features else None
        self._as_caption = getattr(feature, "int2str", as_text)  # a class label's number becomes its name
        decoders = {self._image: tfds.decode.SkipDecoding()}
        if builder.info.file_format.value == "array_record":
            self._records = builder.as_data_source(self._split, decoders=decoders)
        else:
            self._records = _TfRecords(builder, self._split, decoders)

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
        found = list(_walk(record, self._id)) if self._id else []
        record_id = str(as_text(found[0])) if found else place
        images = list(_walk(record, self._image))
        if len(images) != 1 or not isinstance(images[0], bytes):
            return BadRecord(record_id, "malformed entry", f"{self._image!r} is not one image file")
        return make_pair(record_id, images[0], map(self._as_caption, _walk(record, self._caption)))


class _TfRecords:
    """Random access over a split's TFRecord files: where each record starts is found once.

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
    """(first byte, length) of each record of a file. Raises ValueError if it is cut off."""
    size, offset = path.stat().length, 0
    with path.open("rb") as file:
        while offset < size:
            file.seek(offset)
            head = file.read(8)
            end = offset + 16 + struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
            if end > size:
                raise ValueError(f"{path} is cut off at byte {offset:,} of {size:,}.")
            yield offset + 12, end - offset - 16
            offset = end


def _walk(value: Any, name: str) -> Iterator[Any]:
    """What lies under `a/b` in nested dicts and sequences, each element of a sequence."""
    if name and isinstance(value, dict):
        first, _, rest = (name, "", "") if name in value else name.partition("/")
        yield from _walk(value[first], rest)
    elif not isinstance(value, (str, bytes, dict)) and hasattr(value, "__len__"):
        for element in value:
            yield from _walk(element, name)
    else:
        yield value


def _names(features: Any) -> set[str]:
    """Names of the features that hold values, `a/b` for those inside another."""
    inside = getattr(features, "feature", features)  # of a sequence
    if not hasattr(inside, "items"):
        return {""}
    return {f"{name}/{rest}".rstrip("/") for name, value in inside.items() for rest in _names(value)}
