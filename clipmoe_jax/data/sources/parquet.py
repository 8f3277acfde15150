"""Parquet files, as Hugging Face data sets and img2dataset's metadata come."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from clipmoe_jax.core.checks import check_expansion
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data.sources.base import (
    BadRecord,
    Images,
    Pair,
    as_text,
    raise_passing,
)
from clipmoe_jax.data.sources.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    as_bytes,
    check_num_rows,
    find_columns,
    is_text,
    num_bytes,
    read_row,
    texts_of_rows,
    times_as_text,
)
from clipmoe_jax.data.sources.files import find_files
from clipmoe_jax.data.sources.parquet_pages import expanded_bytes

TEXT_ROWS, IMAGE_ROWS, BATCH_BYTES = 128, 16, 2**28  # in memory at a time, at most
# A column of a row group may take so many bytes in memory, or so many times what it takes in the file. Text
# is compressed to a tenth at best, if it is not the same again and again, images hardly.
TEXT_BYTES, IMAGE_BYTES, EXPANSION = 2**28, 2**24, 50
LIST_VALUES = 2**25  # captions of a row group, which take 16 bytes each before any is read


class Parquet:
    """The files of a folder in the order of their names, read by row groups.

    The image column holds file contents, {"bytes", "path"} as Hugging Face's `Image` feature does, or paths
    under the image folder. The caption column holds a string or a list of them; `re_caption` is
    Recap-DataComp's. Ids are those of an id column, else FILE:ROW. Rows of a row group that is damaged, or
    that would take many times its size in memory, are bad records from there on; so are those of a file
    whose values come again and again, beyond `check_expansion`.
    """

    def __init__(self, path: str, images: str | None = None, follow_links: bool = False):
        """Raises FileNotFoundError for a wrong path and ValueError for missing columns, two of one name, and
        a file that claims more rows than it has bytes."""
        import pyarrow.parquet  # here because it is slow to import

        self._images = None if images is None else Images(images, follow_links)
        self._files = find_files(path, "parquet", ".parquet", follow_links)
        self._len = 0
        for file in self._files.values():
            try:
                with pyarrow.parquet.ParquetFile(_readable(file)) as opened:
                    self._len += opened.metadata.num_rows
                    schema = opened.schema_arrow
                    _check_one(file, opened.metadata)
                    check_num_rows(file, opened.metadata.num_rows)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file: {error}") from error
            image, caption, _ = find_columns(schema.names, file)
            if image is None or caption is None:
                raise ValueError(
                    f"{file} has the columns {schema.names}: name one of images ({', '.join(IMAGE_COLUMNS)}) "
                    f"and one of captions ({', '.join(CAPTION_COLUMNS)})"
                )
            if images is None and is_text(schema.field(image).type):
                raise ValueError(
                    f"{file} holds paths of images in {image!r}: add ?images=DIR, the folder they are in"
                )

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        """Yields the rows from number `first` on, and reads the row group that it lies in from its start."""
        return self._images.pairs(self._entries(first)) if self._images else self._entries(first)

    def _entries(self, first: int) -> Iterator[Any]:
        """Yields pairs and bad records, and an `Entry` for each row that names a file of the image folder."""
        import pyarrow.parquet

        for name, file in self._files.items():
            row, size, taken = 0, epath.Path(file).stat().length, 0
            # Without pre_buffer a batch is in memory at a time, not a row group.
            with (
                pyarrow.parquet.ParquetFile(_readable(file), pre_buffer=False) as opened,
                _texts_of(file, opened.metadata.schema) as texts,
            ):
                for group in range(opened.num_row_groups):
                    end = row + opened.metadata.row_group(group).num_rows
                    if end <= first:
                        row = end
                        continue
                    try:
                        for fields in _rows(opened, texts, group, file):
                            check_expansion(size, taken := taken + sum(map(num_bytes, fields)))
                            if row >= first:
                                yield read_row(f"{name}:{row}", *fields, self._images is not None)
                            row += 1
                        if row < end:
                            raise ValueError(f"{end - row:,} of its rows are missing")
                    # ValueError, OverflowError: a type whose values Python cannot hold
                    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                        raise_passing(error, file)
                        reason = str(error).partition("\n")[0]
                        detail = f"{file}, row group {group}: {reason}"
                        rows = range(max(row, first), end)
                        yield from (BadRecord(f"{name}:{k}", "damaged row", detail) for k in rows)
                    row = end
            first = max(0, first - row)


def _readable(file: Path) -> Any:
    """Returns what pyarrow reads: the path of a file, an object of a bucket open."""
    return file.open("rb") if in_bucket(file) else file


def _check_one(file: Path, metadata: Any) -> None:
    """Raises ValueError for several files joined as one: only the last one's rows would count, and the first
    one's would be read."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    end = max((_start(chunk) + chunk.total_compressed_size for chunk in chunks), default=0)
    with file.open("rb") as opened:
        opened.seek(end)  # indexes follow, of some kilobytes
        if b"PAR1PAR1" in opened.read():
            raise ValueError(f"{file} is several Parquet files in one: give them as files of a folder")


def _start(chunk: Any) -> int:
    """Returns where a column of a row group begins in its file."""
    return min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)


def _texts_of(file: Path, schema: Any) -> Any:
    """Opens a file so that its text comes as places in a dictionary: what is short there may expand to any
    length."""
    import pyarrow.parquet

    paths = [schema.column(i).path for i in range(len(schema))]
    return pyarrow.parquet.ParquetFile(_readable(file), pre_buffer=False, read_dictionary=paths)


def _rows(opened: Any, texts: Any, group: int, file: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (image, captions, id) of each row of a group; a path is text and captions are bytes.

    opened, texts: the file and `_texts_of` it, two because an open file has one size of batches. In place of
    captions, a path or an id that are too many or too long there is a BadRecord. Raises ValueError for a
    group that takes many times its size in memory.
    """
    schema, metadata = opened.schema_arrow, opened.metadata.row_group(group)
    image, caption, record_id = find_columns(schema.names, file)
    assert image is not None and caption is not None  # as checked when the source was opened

    def read_texts(name: str) -> Iterator[Any]:
        _largest(file, metadata, name, TEXT_BYTES)
        batches = texts.iter_batches(TEXT_ROWS, row_groups=[group], columns=[name])
        columns = (times_as_text(batch[name]) if name == record_id else batch[name] for batch in batches)
        return itertools.chain.from_iterable(map(texts_of_rows, columns))

    if is_text(schema.field(image).type):
        images = map(as_text, read_texts(image))
    else:
        # Each row may hold the largest value: a dictionary has it once.
        rows = max(1, min(IMAGE_ROWS, BATCH_BYTES // max(1, _largest(file, metadata, image, IMAGE_BYTES))))
        batches = opened.iter_batches(rows, row_groups=[group], columns=[image])
        images = itertools.chain.from_iterable(as_bytes(batch[image]).to_pylist() for batch in batches)
    ids = read_texts(record_id) if record_id else itertools.repeat(None, metadata.num_rows)
    yield from zip(images, read_texts(caption), ids, strict=False)


def _largest(file: Path, group: Any, name: str, most: int) -> int:
    """Returns the most bytes that a value of a column can have in a row group of a file.

    Raises ValueError if the column takes more than `most` and many times what it takes in the file, or has
    too many values.
    """
    largest = 0
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.partition(".")[0] != name:
            continue
        start, packed = _start(chunk), chunk.total_compressed_size
        with file.open("rb") as opened:
            size = expanded_bytes(opened, start, start + packed)
        if size > most and size > EXPANSION * packed:
            raise ValueError(f"{chunk.path_in_schema} expands from {packed:,} to {size:,} bytes")
        if chunk.num_values > max(group.num_rows, LIST_VALUES):
            raise ValueError(
                f"{chunk.path_in_schema} has {chunk.num_values:,} values, and {LIST_VALUES:,} may be read at "
                "once: write smaller row groups"
            )
        largest = max(largest, size)
    return largest
