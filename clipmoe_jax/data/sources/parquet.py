"""Parquet files, as Hugging Face data sets and img2dataset's metadata come."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipmoe_jax.data.sources.base import (
    BadRecord,
    Images,
    Pair,
    as_text,
    find_column,
    find_files,
    make_pair,
)

IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "png", "image_path", "path", "file_name", "filepath")
CAPTION_COLUMNS = ("re_caption", "caption", "text", "captions", "title")
ID_COLUMNS = ("id", "key", "url")
BATCH_ROWS = 256  # in memory at a time


class Parquet:
    """The files of a folder in the order of their names, read by row groups.

    The image column holds file contents, {"bytes", "path"} as Hugging Face's `Image` feature does, or paths
    under the image folder. The caption column holds a string or a list of them; `re_caption` is
    Recap-DataComp's. Ids are those of an id column, else FILE:ROW. Rows of a row group that is damaged are
    bad records from the damage on.
    """

    def __init__(self, path: str, images: str | None = None):
        """Raises FileNotFoundError for a wrong path and ValueError for missing columns or two of one name."""
        import pyarrow.parquet  # here because it is slow to import

        self._images = None if images is None else Images(images)
        self._files = find_files(path, "parquet", ".parquet")
        self._len = 0
        for file in self._files.values():
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    self._len += opened.metadata.num_rows
                    schema = opened.schema_arrow
                    _check_one(file, opened.metadata)
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
        import pyarrow.parquet

        for name, file in self._files.items():
            row = 0
            # Without pre_buffer a batch is in memory at a time, not a row group.
            with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as opened:
                for group in range(opened.num_row_groups):
                    end = row + opened.metadata.row_group(group).num_rows
                    try:
                        for fields in _rows(opened, group, file):
                            yield self._read(f"{name}:{row}", *fields)
                            row += 1
                    except (pyarrow.ArrowException, OSError) as error:
                        detail = f"{file}, row group {group}: {str(error).splitlines()[0]}"
                        yield from (BadRecord(f"{name}:{k}", "damaged row", detail) for k in range(row, end))
                    row = end

    def _read(self, place: str, image: Any, captions: Any, record_id: Any) -> Pair | BadRecord:
        record_id = place if record_id is None else str(as_text(record_id))
        captions = [as_text(caption) for caption in (captions if isinstance(captions, list) else [captions])]
        if isinstance(image, dict):
            contents, path = image.get("bytes"), as_text(image.get("path"))
            image = path if contents is None else contents
        if isinstance(image, str) and self._images is not None:
            return self._images.pair(record_id, image, captions)
        if not isinstance(image, bytes):
            detail = "the cell is empty" if image is None else f"only a path, {image}: add ?images=DIR"
            image = BadRecord(record_id, "missing image", detail)
        return make_pair(record_id, image, captions)


def _check_one(file: Path, metadata: Any) -> None:
    """Raises ValueError for several files joined as one: only the last one's rows would count, and the first
    one's would be read."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
    end = max(
        (start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)), default=0
    )
    with file.open("rb") as opened:
        opened.seek(end)  # indexes follow, of some kilobytes
        if b"PAR1PAR1" in opened.read():
            raise ValueError(f"{file} is several Parquet files in one: give them as files of a folder")


def _columns(names: list[str], file: Path) -> list[str | None]:
    """Returns the columns of images, captions and ids; None for one that is not there."""
    return [find_column(names, of_kind, file) for of_kind in (IMAGE_COLUMNS, CAPTION_COLUMNS, ID_COLUMNS)]


def _rows(opened: Any, group: int, file: Path) -> Iterator[tuple[Any, Any, Any]]:
    """Yields (image, captions, id) of each row of a group; a path is text and captions are bytes."""
    image, caption, record_id = _columns(opened.schema_arrow.names, file)
    assert image is not None and caption is not None  # as checked when the source was opened
    paths = _is_text(opened.schema_arrow.field(image).type)
    columns = [name for name in (image, caption, record_id) if name]
    for batch in opened.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
        # As bytes: pyarrow gives up a whole batch for one caption that is not UTF-8.
        values = {name: _as_bytes(batch[name]).to_pylist() for name in columns}
        images = map(as_text, values[image]) if paths else values[image]
        yield from zip(
            images, values[caption], values[record_id] if record_id else [None] * len(batch), strict=True
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
