"""Text tables of image names and captions."""

import collections
import csv
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipmoe_jax.data.sources.base import (
    BadRecord,
    Entry,
    Images,
    Pair,
    find_column,
)
from clipmoe_jax.data.sources.files import find_file

IMAGE_COLUMNS = ("filepath", "image", "image_name", "image_path", "file_name", "filename")
CAPTION_COLUMNS = ("title", "caption", "comment", "text")
MAX_LINES = 200  # of a row: a quote that is not closed would be looked for to the end of the table

# (image path, line, caption) of a row; (None, line, what is wrong) of an unusable one.
Row = tuple[str | None, int, str]


class Csv:
    """A table with a header, separated by tabs, bars or commas: a column of image paths and one of captions.

    Columns are found by name: filepath and title (open_clip's), image and caption, and so on. Rows of one
    image that follow each other are the captions of one pair, whose id is the image's path. A row whose quote
    is not closed is bad; the rows after it are read.
    """

    kind = "csv"

    def __init__(self, path: str, images: str, follow_links: bool = False):
        """Raises FileNotFoundError for a wrong path, ValueError for a table without these columns."""
        self._path, self._images = find_file(path, self.kind), Images(images, follow_links)
        self._groups = _group(self._rows())

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        return self._images.pairs(
            BadRecord(f"line {number}", "malformed entry", f"{self._path}: {captions[0]}")
            if name is None
            else Entry(name or f"line {number}", name, captions)
            for name, number, captions in itertools.islice(self._groups, first, None)
        )

    def _rows(self) -> Iterator[Row]:
        with _open(self._path) as file:
            header = file.readline()
            separator = next((mark for mark in "\t|" if mark in header), ",")
            try:
                cells = next(csv.reader([header], delimiter=separator), [])
            except csv.Error as error:
                raise ValueError(f"{self._path} is no table: {error}") from error
            names = [name.strip().lower() for name in cells]
            image = find_column(names, IMAGE_COLUMNS, self._path)
            caption = find_column(names, CAPTION_COLUMNS, self._path)
            if image is None or caption is None:
                raise ValueError(
                    f"{self._path} has the columns {names}: name one of images ({', '.join(IMAGE_COLUMNS)}) "
                    f"and one of captions ({', '.join(CAPTION_COLUMNS)})"
                )
            image, caption = names.index(image), names.index(caption)
            for number, row in self._read(file, separator, len(names), image):
                if isinstance(row, str):
                    yield None, number, row
                elif len(row) <= max(image, caption):
                    if row:  # not a blank line
                        yield None, number, "a row has too few columns"
                elif any(row[len(names) :]):
                    yield None, number, f"a row has {len(row)} columns, the header {len(names)}"
                else:
                    yield row[image].strip(), number, row[caption]

    def _read(
        self, file: Iterable[str], separator: str, width: int, image: int
    ) -> Iterator[tuple[int, list[str] | str]]:
        """Yields each row's first line and cells, or what is wrong with it. Of one whose quote is not closed
        only that line is lost: the next ones are read anew."""
        # Bars separate captions in which quotes mean nothing.
        quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
        read = functools.partial(csv.reader, delimiter=separator, quoting=quoting)
        lines = _Lines(file)

        @functools.lru_cache(2 * MAX_LINES)  # lines that were given back come again
        def is_row(line: str) -> bool:
            cells = next(read([line]), [])
            return len(cells) == width and (separator == "\t" or self._images.exists(cells[image].strip()))

        def lines_of_row() -> Iterator[str]:
            for line in lines:
                if len(lines.taken) > MAX_LINES:
                    raise csv.Error(f"a row has more than {MAX_LINES} lines")
                if len(lines.taken) > 1 and is_row(line):
                    raise csv.Error("it runs on over other rows")
                yield line

        rows = read(lines_of_row(), strict=separator == ",")
        while True:
            lines.taken.clear()
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                row = f"{error}: is a quote not closed?"
            number = lines.number - len(lines.taken) + 1
            if isinstance(row, str):
                lines.give_back()
                rows = read(lines_of_row(), strict=separator == ",")
            yield number, row


class Flickr30k(Csv):
    """Flickr30k's captions: `results.token` (NAME.jpg#0, a tab, the caption), or a table as `Csv` takes it
    (results.csv with bars, Kaggle's captions.txt with commas)."""

    kind = "flickr30k"

    def _rows(self) -> Iterator[Row]:
        with _open(self._path) as file:
            first = file.readline()
        if not re.search(r"#\d+\t", first):
            yield from super()._rows()
            return
        with _open(self._path) as file:
            for number, line in enumerate(file, 1):
                name, tab, caption = line.partition("\t")
                if "\t" in caption:
                    yield None, number, "a line with two tabs: is the end of a line missing?"
                elif tab:
                    yield name.rpartition("#")[0], number, caption
                elif line.strip():
                    yield None, number, "a line without a tab"


class _Lines:
    """The lines of a file after its header; those taken last can be given back.

    Attributes:
        number: of the line taken last, from 1.
        taken: the lines taken since it was emptied.
    """

    def __init__(self, file: Iterable[str]):
        self.number, self.taken = 1, []
        self._file, self._next = iter(file), collections.deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._next.popleft() if self._next else next(self._file)
        self.taken.append(line)
        self.number += 1
        return line

    def give_back(self) -> None:
        """Gives back all taken lines but the first."""
        self._next.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1


def _group(rows: Iterable[Row]) -> list[tuple[str | None, int, list[str]]]:
    """Returns (image path, line, captions) of each image whose rows follow each other, and of each unusable
    row, which may stand among those of an image."""
    groups, last = [], None
    for name, number, caption in rows:
        if name and last and last[0] == name:
            last[2].append(caption)
            continue
        groups.append((name, number, [caption]))
        last = groups[-1] if name else last
    return groups


def _open(path: Path):
    # What is not UTF-8 becomes surrogates, which `make_pair` finds: one caption is bad, not the table.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
