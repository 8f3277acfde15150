"""Columns of images, captions and ids in Arrow's memory: of Parquet files and Hugging Face's `datasets`."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from clipmoe_jax.data.sources.base import (
    MAX_CAPTIONS,
    MAX_TEXT,
    BadRecord,
    Entry,
    Pair,
    as_text,
    find_column,
    make_pair,
)

IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "png", "image_path", "path", "file_name", "filepath")
CAPTION_COLUMNS = ("re_caption", "caption", "text", "captions", "title")
ID_COLUMNS = ("id", "key", "url")
MAX_BYTES = 4 * MAX_TEXT  # of a row's text: characters have up to four


def check_num_rows(file: Path, num_rows: int) -> None:
    """Raises ValueError for a file that claims more rows than it has bytes."""
    if num_rows > (size := epath.Path(file).stat().length):
        raise ValueError(
            f"{file} of {size:,} bytes claims {num_rows:,} rows: no image and caption take less than a byte"
        )


def find_columns(names: list[str], file: Path) -> list[str | None]:
    """Returns the columns of images, captions and ids of a table; None for one that is not there."""
    return [find_column(names, of_kind, file) for of_kind in (IMAGE_COLUMNS, CAPTION_COLUMNS, ID_COLUMNS)]


def read_row(
    place: str, image: Any, captions: Any, record_id: Any, has_folder: bool = False
) -> Entry | Pair | BadRecord:
    """Returns the pair of a row, an `Entry` if it names a file, or what is wrong with it.

    place: the id of a row without one. image: bytes, {"bytes", "path"} as Hugging Face's `Image` feature has
    them, or a path. captions: text or bytes, or a list of them. A BadRecord may stand in place of each value.
    has_folder: whether paths are those of an image folder.
    """
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
    if isinstance(image, str) and has_folder:
        return Entry(record_id, image, captions)
    if not isinstance(image, bytes):
        detail = "the cell is empty" if image is None else f"only a path, {image}: add ?images=DIR"
        image = BadRecord(record_id, "missing image", detail)
    return make_pair(record_id, image, captions)


def num_bytes(value: Any) -> int:
    """Returns the bytes of text and images in a row's field."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(num_bytes, value))
    return len(value) if isinstance(value, (bytes, str)) else 0


def texts_of_rows(column: Any) -> Iterator[Any]:
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
        texts = iter(as_bytes(values).to_pylist())
        if not lists:
            yield from texts
            return
        for length in column.value_lengths().to_pylist():
            yield None if length is None else list(itertools.islice(texts, length))
    elif len(column) > 1:
        half = len(column) // 2
        yield from texts_of_rows(column[:half])
        yield from texts_of_rows(column[half:])
    else:
        detail = f"{len(values):,} in {size:,} bytes, and {MAX_CAPTIONS:,} in {MAX_BYTES:,} may be read"
        yield BadRecord("", "too much text", detail)


def times_as_text(column: Any) -> Any:
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
    if not (is_text(values.type) or pyarrow.types.is_binary(values.type)):
        return values if indices is None else values.take(indices)
    values = values.cast(pyarrow.large_binary())
    return (
        values.dictionary_encode()
        if indices is None
        else pyarrow.DictionaryArray.from_arrays(indices, values)
    )


def as_bytes(column: Any) -> Any:
    """Returns the column with its text as bytes."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        return as_bytes(column.dictionary).take(column.indices)
    return column.cast(_binary(column.type))


def _binary(column_type: Any) -> Any:
    import pyarrow

    kinds = pyarrow.types
    if kinds.is_list(column_type) or kinds.is_large_list(column_type):
        return pyarrow.large_list(_binary(column_type.value_type))
    if kinds.is_struct(column_type):
        return pyarrow.struct([field.with_type(_binary(field.type)) for field in column_type])
    return pyarrow.large_binary() if is_text(column_type) else column_type


def is_text(column_type: Any) -> bool:
    """Returns whether a type is text, or places in a dictionary of it."""
    from pyarrow import types

    if types.is_dictionary(column_type):
        return is_text(column_type.value_type)
    return types.is_string(column_type) or types.is_large_string(column_type)
