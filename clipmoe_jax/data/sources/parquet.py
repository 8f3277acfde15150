"""Parquet files, as Hugging Face data sets and img2dataset's metadata come."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipmoe_jax.core.checks import check_expansion
from clipmoe_jax.data.sources.base import (
    MAX_CAPTIONS,
    MAX_TEXT,
    BadRecord,
    Entry,
    Images,
    Pair,
    as_text,
    check_open_files,
    find_column,
    find_files,
    make_pair,
)
from clipmoe_jax.data.sources.parquet_pages import expanded_bytes

IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "png", "image_path", "path", "file_name", "filepath")
CAPTION_COLUMNS = ("re_caption", "caption", "text", "captions", "title")
ID_COLUMNS = ("id", "key", "url")
TEXT_ROWS, IMAGE_ROWS, BATCH_BYTES = 128, 16, 2**28  # in memory at a time, at most
MAX_BYTES = 4 * MAX_TEXT  # of a row's text: characters have up to four
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
                with pyarrow.parquet.ParquetFile(file) as opened:
                    self._len += opened.metadata.num_rows
                    schema = opened.schema_arrow
                    _check_one(file, opened.metadata)
                    if opened.metadata.num_rows > file.stat().st_size:
                        raise ValueError(
                            f"{file} of {file.stat().st_size:,} bytes claims {opened.metadata.num_rows:,} "
                            "rows: no image and caption take less than a byte"
                        )
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file: {error}") from error
            image, caption, _ = _columns(schema.names, file)
            if image is None or caption is None:
                raise ValueError(
                    f"{file} has the columns {schema.names}: name one of images ({', '.join(IMAGE_COLUMNS)}) "
                    f"and one of captions ({', '.join(CAPTION_COLUMNS)})"
                )
            if images is None and _is_text(schema.field(image).type):
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
            row, size, taken = 0, file.stat().st_size, 0
            # Without pre_buffer a batch is in memory at a time, not a row group.
            with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as opened, _texts_of(file) as texts:
                for group in range(opened.num_row_groups):
                    end = row + opened.metadata.row_group(group).num_rows
                    if end <= first:
                        row = end
                        continue
                    try:
                        for fields in _rows(opened, texts, group, file):
                            check_expansion(size, taken := taken + sum(map(_num_bytes, fields)))
                            if row >= first:
                                yield self._read(f"{name}:{row}", *fields)
                            row += 1
                        if row < end:
                            raise ValueError(f"{end - row:,} of its rows are missing")
                    # ValueError, OverflowError: a type whose values Python cannot hold
                    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
                        check_open_files(error)
                        reason = str(error).partition("\n")[0]
                        detail = f"{file}, row group {group}: {reason}"
                        rows = range(max(row, first), end)
                        yield from (BadRecord(f"{name}:{k}", "damaged row", detail) for k in rows)
                    row = end
            first = max(0, first - row)

    def _read(self, place: str, image: Any, captions: Any, record_id: Any) -> Entry | Pair | BadRecord:
        if isinstance(record_id, BadRecord):
            return record_id._replace(id=place)
        record_id = place if record_id is None else str(as_text(record_id))
        if isinstance(captions, BadRecord):
            return captions._replace(id=record_id)
        if isinstance(image, BadRecord):
            return image._replace(id=record_id)
        captions = [as_text(caption) for caption in (captions if isinstance(captions, list) else [captions])]
        if isinstance(image, dict):
            contents, path = image.get("bytes"), as_text(image.get("path"))
            image = path if contents is None else contents
        if isinstance(image, str) and self._images is not None:
            return Entry(record_id, image, captions)
        if not isinstance(image, bytes):
            detail = "the cell is empty" if image is None else f"only a path, {image}: add ?images=DIR"
            image = BadRecord(record_id, "missing image", detail)
        return make_pair(record_id, image, captions)


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


def _columns(names: list[str], file: Path) -> list[str | None]:
    """Returns the columns of images, captions and ids; None for one that is not there."""
    return [find_column(names, of_kind, file) for of_kind in (IMAGE_COLUMNS, CAPTION_COLUMNS, ID_COLUMNS)]


def _texts_of(file: Path) -> Any:
    """Opens a file so that its text comes as places in a dictionary: what is short there may expand to any
    length."""
    import pyarrow.parquet

    schema = pyarrow.parquet.read_metadata(file).schema
    paths = [schema.column(i).path for i in range(len(schema))]
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False, read_dictionary=paths)


def _rows(opened: Any, texts: Any, group: int, file: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (image, captions, id) of each row of a group; a path is text and captions are bytes.

    opened, texts: the file and `_texts_of` it, two because an open file has one size of batches. In place of
    captions, a path or an id that are too many or too long there is a BadRecord. Raises ValueError for a
    group that takes many times its size in memory.
    """
    schema, metadata = opened.schema_arrow, opened.metadata.row_group(group)
    image, caption, record_id = _columns(schema.names, file)
    assert image is not None and caption is not None  # as checked when the source was opened

    def read_texts(name: str) -> Iterator[Any]:
        _largest(file, metadata, name, TEXT_BYTES)
        batches = texts.iter_batches(TEXT_ROWS, row_groups=[group], columns=[name])
        columns = (_times_as_text(batch[name]) if name == record_id else batch[name] for batch in batches)
        return itertools.chain.from_iterable(map(_texts, columns))

    if _is_text(schema.field(image).type):
        images = map(as_text, read_texts(image))
    else:
        # Each row may hold the largest value: a dictionary has it once.
        rows = max(1, min(IMAGE_ROWS, BATCH_BYTES // max(1, _largest(file, metadata, image, IMAGE_BYTES))))
        batches = opened.iter_batches(rows, row_groups=[group], columns=[image])
        images = itertools.chain.from_iterable(_as_bytes(batch[image]).to_pylist() for batch in batches)
    ids = read_texts(record_id) if record_id else itertools.repeat(None, metadata.num_rows)
    yield from zip(images, read_texts(caption), ids, strict=False)


def _num_bytes(value: Any) -> int:
    """Returns the bytes of text and images in a row's field."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, (bytes, str)) else 0


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


def _texts(column: Any) -> Iterator[Any]:
    """Yields the value of each row: text as bytes, a list of them if the column has lists; a BadRecord in
    place of a row whose text is too much. Looks at lengths before it makes any text."""
    from pyarrow import compute, types

    lists = types.is_list(column.type) or types.is_large_list(column.type)
    values = _as_places(column.flatten() if lists else column)
    size = 0
    if types.is_dictionary(values.type):
        lengths = compute.call_function("binary_length", [values.dictionary]).fill_null(0).to_numpy()
        size = int(lengths[values.indices.drop_null().to_numpy()].sum())
    if len(values) <= MAX_CAPTIONS and size <= MAX_BYTES:
        texts = iter(_as_bytes(values).to_pylist())
        if not lists:
            yield from texts
            return
        for length in column.value_lengths().to_pylist():
            yield None if length is None else list(itertools.islice(texts, length))
    elif len(column) > 1:
        half = len(column) // 2
        yield from _texts(column[:half])
        yield from _texts(column[half:])
    else:
        detail = f"{len(values):,} in {size:,} bytes, and {MAX_CAPTIONS:,} in {MAX_BYTES:,} may be read"
        yield BadRecord("", "too much text", detail)


def _times_as_text(column: Any) -> Any:
    """Returns times as text, other values as they are: Python's times have no nanoseconds and end in 9999."""
    import pyarrow

    return column.cast(pyarrow.string()) if pyarrow.types.is_temporal(column.type) else column


def _as_places(column: Any) -> Any:
    """Returns text and bytes as places in a dictionary of bytes, other values as they are."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        indices, values = column.indices, column.dictionary
    else:
        indices, values = None, column
    if not (_is_text(values.type) or pyarrow.types.is_binary(values.type)):
        return values if indices is None else values.take(indices)
    values = values.cast(pyarrow.large_binary())
    return (
        values.dictionary_encode()
        if indices is None
        else pyarrow.DictionaryArray.from_arrays(indices, values)
    )


def _as_bytes(column: Any) -> Any:
    """Returns the column with its text as bytes."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        return _as_bytes(column.dictionary).take(column.indices)
    return column.cast(_binary(column.type))


def _binary(column_type: Any) -> Any:
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_list(column_type) or kinds.is_large_list(column_type):
        return pyarrow.large_list(_binary(column_type.value_type))
    if kinds.is_struct(column_type):
        return pyarrow.struct([field.with_type(_binary(field.type)) for field in column_type])
    return pyarrow.large_binary() if _is_text(column_type) else column_type


def _is_text(column_type: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(column_type):
        return _is_text(column_type.value_type)
    return types.is_string(column_type) or types.is_large_string(column_type)
