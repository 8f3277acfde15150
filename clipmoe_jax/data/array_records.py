"""Records of ArrayRecord files by index: of any number of files, few are open at a time."""

import bisect
import errno
import functools
import itertools
import operator
import os
import resource
from collections.abc import Iterable
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]: no stub

from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data.array_record_chunks import Chunks

# Of the files that a process may have open, and at most so many; each is open twice, and takes 47 KB of
# memory. Opening one takes half a millisecond on a local disk.
OPEN_FRACTION, MOST_OPEN = 8, 1024


class ArrayRecords:
    """The serialized records of a TFDS data set in ArrayRecord files. Pickles, and threads may share it."""

    def __init__(self, files: Iterable[Any]):
        """files: the parts to read, TFDS's file instructions (`SplitInfo.file_instructions`)."""
        self.__setstate__([(part.filename, part.skip, part.take) for part in files])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """Returns a record.

        Raises RuntimeError or ValueError if it cannot be read or is too large, OSError if too many files are
        open.
        """
        index = operator.index(index)
        part = bisect.bisect_right(self._ends, index)
        filename, skip, take = self._parts[part]
        place = skip + index - (self._ends[part] - take)
        try:
            chunks, reader = self._opened(filename)
            if chunks:
                chunks.check(place)
            return reader.read([place])[0]
        except RuntimeError as error:
            if (reason := os.strerror(errno.EMFILE)) in str(error):
                raise OSError(errno.EMFILE, reason, filename) from error
            raise

    def __getstate__(self) -> list[tuple[str, int, int]]:
        return self._parts

    def __setstate__(self, parts: list[tuple[str, int, int]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(take for *_, take in parts))
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = min(limit // OPEN_FRACTION, MOST_OPEN) if limit > 0 else MOST_OPEN
        # A reader that is dropped closes its file once the last thread is done with it.
        self._opened = functools.lru_cache(max(1, most))(_open)


def split_parts(splits: Any, split: str) -> list[tuple[str, slice]]:
    """Returns (name, records) of each part of a split or of a sum of slices, in TFDS's notation.

    splits: those of a data set (`DatasetInfo.splits`). Raises ValueError for unknown splits, and for slices
    that are empty or larger than the split.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        ranges = [range(splits[part.splitname].num_examples)[part.from_ : part.to] for part in parts]
    except (AssertionError, KeyError) as error:
        raise ValueError(str(error)) from error
    if not all(ranges):  # TFDS would read others from one that ends before it begins
        raise ValueError(f"a slice of {split} is empty")
    return [(part.splitname, slice(of.start, of.stop)) for part, of in zip(parts, ranges, strict=True)]


def _open(filename: str) -> tuple[Chunks | None, Any]:
    """Returns the chunks of a file, None in a bucket, and its reader."""
    chunks = None if in_bucket(filename) else Chunks(filename)
    return chunks, array_record_module.ArrayRecordReader(
        filename, options="readahead_buffer_size:0", file_reader_buffer_size=32768
    )
