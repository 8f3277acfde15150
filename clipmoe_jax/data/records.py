"""Random access over a prepared data set: images and captions by index.

Images lie there as the files they came as, or as pixels that are ready for a model and captions as token
ids. Beside the records of a split lies `token_counts-SPLIT.npy`: uint16 (N,), the tokens of each record's
longest caption, start and end counted; and, if the records carry attributes, `attributes.json`:
{attribute: {"prompt", "values"}}.
"""

import bisect
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from clipmoe_jax.core import checksums
from clipmoe_jax.core.checks import check_size, read_bytes, whole_number
from clipmoe_jax.core.errors import naming, printable_errors
from clipmoe_jax.core.json_files import field, parse_json
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.stamps import files_under
from clipmoe_jax.core.terminal import MOST_CHARACTERS, printable, shortened
from clipmoe_jax.data.array_records import ArrayRecords, split_parts
from clipmoe_jax.data.npy import map_array
from clipmoe_jax.data.sources.base import IMAGE_SUFFIXES, AttributeSpec, excess_of_text
from clipmoe_jax.data.tfds_folders import check_splits, tfds_features_alone

NAME = "pairs"
VERSION = "1.0.0"
ATTRIBUTES, REPORT = "attributes.json", "report.json"
MAX_IMAGE_SIZE = 10_000  # pixels a side
CAPTION_END = 49407  # separates captions in `tokens`: CLIP's end token, which no word has


class NoSplitError(ValueError):
    """The data set has no such split."""


class Records:
    """The pairs of a data set made by `clipmoe_jax.prepare`, in the order of their source.

    Index i is the same pair for ever: cluster labels and samplers refer to it. Pickles, so that
    worker processes can read too.

    Attributes:
        path: the data set's folder, what prepare was given as --out.
        split: its split, or parts of it in TFDS's notation ("train[:1000]", "train[:10]+train[20:]").
        split_name: its name alone.
        image_size: of the pixels that are stored; None where image files are.
        fingerprint: changes when another data set is prepared there.
        attribute_table: {name: AttributeSpec} of the attributes that records carry; None if they carry none.
    """

    @printable_errors()
    def __init__(self, path: str, split: str = "train"):
        """Opens a data set.

        Args:
            path: its folder.
            split: a split or a slice of one; "" is the only one that there is.

        Raises:
            FileNotFoundError: there is no data set.
            NoSplitError: there is no such split, or the parts are of several.
            ValueError: the data set has features that are none of TFDS's, a damaged file, or one that is not
                plain.
        """
        import tensorflow_datasets as tfds  # here because it takes longest to import

        path = os.path.expanduser(path)
        folder = epath.Path(path) / NAME / VERSION
        if not folder.exists():
            raise FileNotFoundError(f"{path} is not a prepared data set: {_how_to_prepare(path)}")
        _check_files(path, folder)
        info = [f"{NAME}/{VERSION}/{name}" for name in ("dataset_info.json", "features.json")]
        checksums.verify(epath.Path(path), REPORT, ATTRIBUTES, *info)
        try:
            with tfds_features_alone():
                builder: Any = tfds.builder_from_directory(folder)
                check_splits(builder)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not split and len(builder.info.splits) == 1:
            (split,) = builder.info.splits
        splits = builder.info.splits
        if not splits:
            raise ValueError(f"{folder / 'dataset_info.json'} names no split: prepare the data set again")
        try:
            parts = split_parts(splits, split)
            (self.split_name,) = {name for name, _ in parts}
        except ValueError as error:
            known = " or ".join(f"{name} ({info.num_examples:,} records)" for name, info in splits.items())
            raise NoSplitError(
                f"{path} has no split {split!r}: choose {known}, or parts of one as in {min(splits)}[:50%]"
            ) from error
        self._parts = [part for _, part in parts]
        self._source = ArrayRecords(splits[split].file_instructions)
        self.path = path
        self.split = split
        # The report has a hash of the records.
        report = read_bytes(epath.Path(path) / REPORT)
        self.attribute_table, described = None, f"{split} ".encode() + report
        if (file := epath.Path(path) / ATTRIBUTES).exists():
            attributes = read_bytes(file)
            described += b" " + attributes
            self.attribute_table = _attribute_table(parse_json(attributes, str(file)), str(file))
        self.fingerprint = hashlib.sha256(described).hexdigest()[:16]
        self.image_size = _image_size(parse_json(report, f"{path}/{REPORT}"), f"{path}/{REPORT}")
        self._features = builder.info.features
        self._decoders = {} if self.image_size else {"image": tfds.decode.SkipDecoding()}
        names = ("id", "captions", *(("pixels", "tokens") if self.image_size else ("image",)))
        _check_features(self._features, names, f"{path}/{REPORT}")
        if self.attribute_table is not None:
            _check_features(self._features, ("attributes",), f"{path}/{ATTRIBUTES}")

    def __len__(self) -> int:
        return len(self._source)

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        """Returns uint16 (N,): tokens of each record's longest caption.

        Raises FileNotFoundError if the data set was prepared without them.
        """
        path = epath.Path(self.path) / f"token_counts-{self.split_name}.npy"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: prepare the data set again")
        return self.take(map_array(path))

    def take(self, of_split: Any) -> Any:
        """Returns of an array or a list with an entry for each record of the split those of these records."""
        first, *others = (of_split[part] for part in self._parts)
        if not others:
            return first
        return np.concatenate([first, *others]) if isinstance(of_split, np.ndarray) else sum(others, first)

    def source_sizes(self, num_sources: int) -> list[int]:
        """Returns how many records each of several sources has, joined by commas as the set was prepared.

        Their ids begin with the source's number, "0/", "1/", …: a few records of each are read. Raises
        ValueError if that is not so, if a source has no record, and for parts that do not ascend.
        """
        if any(after.start < before.stop for before, after in itertools.pairwise(self._parts)):
            raise ValueError(
                f"the parts of {self.path}'s split {self.split} must ascend, to find its sources"
            )

        def number(index: int) -> int:
            prefix = self[index]["id"].partition("/")[0]
            return int(prefix) if re.fullmatch(r"0|[1-9]\d{0,8}", prefix) else -1

        bounds = [bisect.bisect_left(range(len(self)), k, key=number) for k in range(num_sources + 1)]
        sizes = [end - start for start, end in itertools.pairwise(bounds)]
        if bounds[0] or bounds[-1] != len(self) or not all(sizes):
            raise ValueError(
                f"{self.path} has records of {number(len(self) - 1) + 1} sources with commas between them, "
                f"not of {num_sources}: give as many weights"
            )
        return sizes

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the lengths of captions, which a worker process maps for itself."""
        state = self.__dict__.copy()  # at once, as a thread may come to need the lengths meanwhile
        state.pop("token_counts", None)
        return state

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one pair.

        Returns:
            {"id": str, "captions": list[str], "image": bytes (the contents of an image file)}, or of a data
            set of pixels {…, "image": uint8 (S, S, 3), "tokens": list of uint16 (words of a caption,)}; with
            an attribute table also "attributes": {name: value}

        Raises:
            IndexError: index is not in 0 … len - 1.
            OSError: too many files are open.
            ValueError: the data set's files are damaged or gone.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside {self.path}'s {len(self)} records")
        try:
            serialized = self._source[index]
            record = self._features.deserialize_example_np(serialized, decoders=self._decoders)
            return self._pair(record)
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
            reason = printable(shortened(str(error), MOST_CHARACTERS))
            raise ValueError(
                f"record {index} of {self.path} cannot be read ({reason}): if its files have changed, "
                "prepare it again"
            ) from error

    def _pair(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns what `__getitem__` returns. Raises any error if the record is not as the files say."""
        pair: dict[str, Any] = {
            "id": record["id"].decode("utf-8"),
            "captions": [caption.decode("utf-8") for caption in record["captions"]],
        }
        if excess := excess_of_text(pair["captions"]):
            raise ValueError(": ".join(excess))
        if self.attribute_table is not None:
            values = [value.decode("utf-8") for value in record["attributes"]]
            if len(values) != len(self.attribute_table):
                raise ValueError(f"it has {len(values)} attributes, {ATTRIBUTES} {len(self.attribute_table)}")
            for (name, attribute), value in zip(self.attribute_table.items(), values, strict=True):
                if value not in attribute.values:
                    raise ValueError(f"its {name} is {value!r}, none of those in {ATTRIBUTES}")
            pair["attributes"] = dict(zip(self.attribute_table, values, strict=True))
        if self.image_size is None:
            return pair | {"image": record["image"]}
        tokens = np.frombuffer(record["tokens"], "<u2")
        ends = np.flatnonzero(tokens == CAPTION_END)
        if len(ends) != len(pair["captions"]):
            raise ValueError(f"it has {len(pair['captions']):,} captions and the tokens of {len(ends):,}")
        image, side = np.frombuffer(record["pixels"], np.uint8), self.image_size
        if image.size != 3 * side * side:
            raise ValueError(
                f"it has {image.size:,} bytes of pixels, and {REPORT} says {side} x {side} pixels"
            )
        return pair | {
            "image": image.reshape(side, side, 3),
            "tokens": [part[:-1] for part in np.split(tokens, ends[:-1] + 1)],
        }


def check_stored_size(stored: int, image_size: int) -> None:
    """Raises ValueError if stored pixels have another size than a model takes."""
    if stored != image_size:
        raise ValueError(
            f"the data set holds pixels of size {stored} and the model takes {image_size}: prepare it with "
            f"pixels={image_size}, or without pixels for every size"
        )


def _image_size(report: dict[str, Any], where: str) -> int | None:
    """Returns the size of the pixels that a report.json tells, None for image files."""
    with naming(where):
        size = report.get("pixels")
        return None if size is None else whole_number("pixels", size, MAX_IMAGE_SIZE)


def _check_features(features: Any, names: Iterable[str], file: str) -> None:
    """Raises ValueError naming a file that tells of fields which the records do not have."""
    if missing := [name for name in names if name not in features]:
        raise ValueError(
            f"{file} is not of these records, which have no {', '.join(missing)}: prepare the data set again"
        )


def _attribute_table(content: dict[str, Any], where: str) -> dict[str, AttributeSpec]:
    """Returns the table in an attributes.json. where: names it in errors."""
    table = {}
    for name in content:
        fields, of = field(content, name, dict, where), f"{where}: {name}"
        prompt, values = field(fields, "prompt", str, of), field(fields, "values", list, of)
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{of}: values must be a list of strings")
        table[name] = AttributeSpec(prompt, tuple(values))
    return table


def _how_to_prepare(path: str) -> str:
    """Returns what to do about a path that is no data set."""
    if not os.path.isdir(path) or not any(
        entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in files_under(path)
    ):
        return "make one with python -m clipmoe_jax.prepare"
    return (
        f"it has images, so make one with python -m clipmoe_jax.prepare --source=folder:{path} --out=DIR "
        f"(images:{path} if they have no captions); data.… of a config and --source of embed take "
        f"folder:{path} as it is"
    )


def _check_files(*folders: os.PathLike | str) -> None:
    """Raises ValueError for a device or a pipe, which would be read for ever, and for JSON that is too large.
    Links are followed."""
    for folder in folders:
        if in_bucket(folder):
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if not (entry.is_file() or entry.is_dir()):
                    raise ValueError(f"{entry.path} is no plain file: prepare the data set again")
                if entry.name.endswith(".json"):
                    check_size(entry.path)
