"""Folders that Hugging Face's `datasets` writes by `save_to_disk`, read by pyarrow alone."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipmoe_jax.core.checks import check_not_sparse
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.data.sources.base import (
    BadRecord,
    Images,
    Pair,
)
from clipmoe_jax.data.sources.columns import check_num_rows, find_columns, is_text, read_row, texts_of_rows
from clipmoe_jax.data.sources.files import FOLLOW_LINKS, is_linked

STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
ROWS = 128  # whose text is in memory at a time
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


class HuggingFace:
    """The rows of the Arrow streams that state.json names, in order.

    The image column has the feature `Image`, or file contents. The caption column holds text, lists of it, or
    classes (`ClassLabel`), whose names are the captions. Ids are those of an id column, else FILE:ROW. Rows
    of a batch that is damaged are bad records.
    """

    def __init__(
        self,
        path: str,
        image: str = "",
        caption: str = "",
        id: str = "",
        images: str | None = None,
        follow_links: bool = False,
    ):
        """image, caption, id: columns; "" is the first that is there of those that Parquet files have.

        Raises FileNotFoundError for a folder or a file that is not there, and ValueError for a folder of
        several splits, a file that is linked, cut off, compressed or no Arrow stream, and columns that are
        not there or hold something else.
        """
        self._images = None if images is None else Images(images, follow_links)
        self._streams = [_open_stream(file) for file in _files(path, follow_links)]
        schema = self._streams[0].schema
        for stream in self._streams[1:]:
            if not stream.schema.equals(schema):
                raise ValueError(f"{stream.file} has other columns than {self._streams[0].file}")
        self._classes = _classes(Path(path) / INFO)
        found = find_columns(schema.names, self._streams[0].file)
        options = {"image": image, "caption": caption, "id": id}
        self._columns = [given or name for given, name in zip(options.values(), found, strict=True)]
        for option, name in zip(options, self._columns, strict=True):
            if name is None and option == "id":
                continue
            if schema.names.count(name) != 1 or not self._fits(option, name, schema.field(name).type):
                kinds = {"image": "the feature Image", "caption": "text, lists of it, or ClassLabel"}
                raise ValueError(
                    f"source huggingface:{path}: {option}={name} is no column of "
                    f"{kinds.get(option, 'text or whole numbers')}: set {option}= to one of {schema.names}"
                )

    def __len__(self) -> int:
        return sum(sum(stream.lengths) for stream in self._streams)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        """Yields the rows from number `first` on; batches before it are passed over."""
        return self._images.pairs(self._entries(first)) if self._images else self._entries(first)

    def _fits(self, option: str, name: str | None, kind: Any) -> bool:
        """Returns whether a column may be the images, the captions or the ids."""
        from pyarrow import types

        if option == "image":
            if types.is_struct(kind) and sorted(one.name for one in kind) == ["bytes", "path"]:
                return _is_bytes(kind.field("bytes").type) and is_text(kind.field("path").type)
            return _is_bytes(kind)
        if option == "caption" and (types.is_list(kind) or types.is_large_list(kind)):
            kind = kind.value_type
        is_number = types.is_integer(kind) and (option == "id" or name in self._classes)
        return is_number or is_text(kind) and not types.is_dictionary(kind)

    def _entries(self, first: int) -> Iterator[Any]:
        """Yields pairs and bad records, and an `Entry` for each row that names a file of the image folder."""
        for stream in self._streams:
            start = 0
            for length, batch in zip(stream.lengths, _batches(stream.file), strict=True):
                if rows := range(max(first, start), start + length):
                    yield from self._read(stream, batch, start, rows)
                start += length
            first = max(0, first - start)

    def _read(self, stream: "_Stream", batch: Any, start: int, rows: range) -> Iterator[Any]:
        """Yields those rows of a batch, which begins at row `start` of its file."""
        import pyarrow

        try:
            columns = _columns(batch, stream.schema, self._columns)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            detail = f"{stream.file}, rows {start:,} to {rows.stop:,}: {reason}"
            yield from (BadRecord(f"{stream.file.name}:{row}", "damaged row", detail) for row in rows)
            return
        images, *texts = (column[rows.start - start :] for column in columns)
        for row, image, captions, record_id in zip(rows, images, *map(_texts, texts), strict=True):
            place, captions = f"{stream.file.name}:{row}", self._names_of(captions)
            yield read_row(place, image.as_py(), captions, record_id, self._images is not None)

    def _names_of(self, captions: Any) -> Any:
        """Returns the name of a class, or why there is none; other captions as they are."""
        if not isinstance(captions, int):
            return captions
        names = self._classes[self._columns[1] or ""]
        if 0 <= captions < len(names):
            return names[captions]
        return BadRecord("", "unknown label", f"{captions} is none of the {len(names)} classes")


class _Stream(NamedTuple):
    """A file, the columns that its batches have, and the rows of each batch."""

    file: Path
    schema: Any
    lengths: list[int]


def _files(path: str, follow_links: bool) -> list[Path]:
    """Returns the files that a folder's state.json names."""
    folder = Path(path)
    if not (folder / STATE).is_file():
        if (folder / SPLITS).is_file():
            splits = ", ".join(map(str, field(read_json(folder / SPLITS), "splits", list)))
            raise ValueError(
                f"source huggingface:{path} has the splits {splits}: name one, as in {path}/train"
            )
        raise FileNotFoundError(f"source huggingface:{path} has no {STATE}: name a folder of save_to_disk")
    state = folder / STATE
    entries = field(read_json(state), "_data_files", list, str(state))
    files = []
    for entry in entries:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{state} names {name!r}, no file beside it: save the data set again")
        files.append(folder / name)
    if not files:
        raise ValueError(f"{state} names no file: save the data set again")
    for file in [state, folder / INFO, *files]:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: save or copy the data set again")
        if not follow_links and is_linked(path, file):
            raise ValueError(f"source huggingface:{path} has a link, {file}: {FOLLOW_LINKS}")
    return files


def _classes(info: Path) -> dict[str, list[str]]:
    """Returns {column: names of its classes} of those that are labels."""
    features = field(read_json(info), "features", dict, str(info))
    labels = {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
    for name, names in labels.items():
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"{info}: the names of {name} are not a list of strings")
    return labels


def _open_stream(file: Path) -> _Stream:
    """Reads the headers of a file. Raises ValueError for one that is no whole stream of plain batches."""
    import pyarrow

    check_not_sparse(file)
    size = file.stat().st_size
    try:
        with pyarrow.memory_map(str(file)) as mapped:
            messages = pyarrow.ipc.MessageReader.open_stream(mapped)
            if (first := messages.read_next_message()).type != "schema":  # pyarrow crashes on another
                raise ValueError(f"it begins with a {first.type}, not with its columns")
            schema = pyarrow.ipc.read_schema(first)
            lengths = [_length(message) for message in messages]
            end = mapped.tell()
    except (pyarrow.ArrowException, OSError, StopIteration, struct.error, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is not an Arrow stream as `datasets` saves it: {reason}") from error
    with file.open("rb") as opened:
        opened.seek(max(0, size - len(END)))
        if end != size or opened.read() != END:
            raise ValueError(f"{file} is cut off or goes on after its end, byte {end:,}: copy it again")
    check_num_rows(file, sum(lengths))
    return _Stream(file, schema, lengths)


def _batches(file: Path) -> Iterator[Any]:
    """Yields the messages of a file's batches, whose contents are the file's pages."""
    import pyarrow

    with pyarrow.memory_map(str(file)) as mapped:
        messages = pyarrow.ipc.MessageReader.open_stream(mapped)
        messages.read_next_message()  # the schema
        yield from messages


def _length(message: Any) -> int:
    """Returns the rows of a batch by its header (Message and RecordBatch in Arrow's Message.fbs).

    Raises ValueError for another message, and for a compressed batch, which would expand to any size.
    """
    header = message.metadata.to_pybytes()
    if message.type != "record batch":
        raise ValueError(f"it has a {message.type}, and batches of rows alone are read")

    def place_of(table: int, number: int) -> int | None:
        """Returns where a field of a table is, None if it is left out."""
        fields = table - struct.unpack_from("<i", header, table)[0]
        size = struct.unpack_from("<H", header, fields)[0]
        offset = struct.unpack_from("<H", header, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + offset if offset else None

    place = place_of(struct.unpack_from("<I", header)[0], 2)
    assert place is not None  # pyarrow has found a batch there
    batch = place + struct.unpack_from("<I", header, place)[0]
    if place_of(batch, 3) is not None:
        raise ValueError("it is compressed: save the data set as `datasets` does")
    length = place_of(batch, 0)
    return struct.unpack_from("<q", header, length)[0] if length is not None else 0


def _columns(batch: Any, schema: Any, names: Sequence[str | None]) -> list[Any]:
    """Returns columns of a batch, text as bytes, and empty cells for None. Raises ValueError or an error of
    pyarrow's if values lie outside the batch."""
    import pyarrow

    table = pyarrow.ipc.read_record_batch(batch, schema)
    columns = [pyarrow.nulls(len(table)) if name is None else table.column(name) for name in names]
    columns = [column.view(_as_bytes(column.type)) for column in columns]
    for column in columns:
        column.validate(full=True)
    return columns


def _as_bytes(kind: Any) -> Any:
    """Returns a type of the same layout whose text, which may not be UTF-8, is bytes."""
    import pyarrow

    for is_kind, of_bytes in (
        (pyarrow.types.is_string, pyarrow.binary),
        (pyarrow.types.is_large_string, pyarrow.large_binary),
        (pyarrow.types.is_list, lambda: pyarrow.list_(_as_bytes(kind.value_type))),
        (pyarrow.types.is_large_list, lambda: pyarrow.large_list(_as_bytes(kind.value_type))),
        (pyarrow.types.is_struct, lambda: pyarrow.struct([(one.name, _as_bytes(one.type)) for one in kind])),
    ):
        if is_kind(kind):
            return of_bytes()
    return kind


def _texts(column: Any) -> Iterator[Any]:
    """Yields the values of a column of text, lists of it, or numbers."""
    for first in range(0, len(column), ROWS):
        yield from texts_of_rows(column[first : first + ROWS])


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)
