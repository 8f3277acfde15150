"""Text tables of image names and captions."""

import csv
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from clipmoe_jax.data.sources.base import BadRecord, Images, Pair, find_file

IMAGE_COLUMNS = ("filepath", "image", "image_name", "image_path", "file_name", "filename")
CAPTION_COLUMNS = ("title", "caption", "comment", "text")


class Csv:
    """A table with a header, separated by tabs, bars or commas: a column of image paths and one of captions.

    Columns are found by name: filepath and title (open_clip's), image and caption, and so on. Rows of one
    image that follow each other are the captions of one pair, whose id is the image's path.
    """

    kind = "csv"

    def __init__(self, path: str, images: str):
        """Raises FileNotFoundError for a wrong path, ValueError for a table without these columns."""
        self._path, self._images = find_file(path, self.kind), Images(images)
        # A row that cannot be used is a group of its own: its number makes its key another one.
        self._groups = [
            (name, number, [caption for *_, caption in rows])
            for (name, number), rows in itertools.groupby(
                self._rows(), key=lambda row: (row[0], row[1] if row[0] is None else None)
            )
        ]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for name, number, captions in self._groups:
            if name is None:
                yield BadRecord(f"line {number}", "malformed entry", f"{self._path}: {captions[0]}")
            else:
                yield self._images.pair(name, name, captions)

    def _rows(self) -> Iterator[tuple[str | None, int, str]]:
        """(image path, line, caption) of each row; (None, line, what is wrong) for an unusable one."""
        with _open(self._path) as file:
            header = file.readline()
            separator = next((mark for mark in "\t|" if mark in header), ",")
            names = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
            image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
            caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
            if image is None or caption is None:
                raise ValueError(
                    f"{self._path} has the columns {names}: name one of images ({', '.join(IMAGE_COLUMNS)}) "
                    f"and one of captions ({', '.join(CAPTION_COLUMNS)})"
                )
            # Bars separate captions in which quotes mean nothing.
            quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
            rows = csv.reader(file, delimiter=separator, quoting=quoting, strict=separator == ",")
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:  # a quote takes in rows up to the next one
                    yield None, 1 + rows.line_num, f"{error}: is a quote not closed?"
                    continue
                number = 1 + rows.line_num
                if len(row) <= max(image, caption):
                    if row:  # not a blank line
                        yield None, number, "a row has too few columns"
                elif any(row[len(names) :]):
                    yield None, number, f"a row has {len(row)} columns, the header {len(names)}"
                elif separator == "\t" and {"\t", "\n"} <= set(row[caption]):
                    yield None, number, "the caption runs on over rows: a quote in it is not closed"
                else:
                    yield row[image].strip(), number, row[caption]


class Flickr30k(Csv):
    """Flickr30k's captions: `results.token` (NAME.jpg#0, a tab, the caption), or a table as `Csv` takes it
    (results.csv with bars, Kaggle's captions.txt with commas)."""

    kind = "flickr30k"

    def _rows(self) -> Iterator[tuple[str | None, int, str]]:
        with _open(self._path) as file:
            first = file.readline()
        if not re.search(r"#\d+\t", first):
            yield from super()._rows()
            return
        with _open(self._path) as file:
            for number, line in enumerate(file, 1):
                name, tab, caption = line.partition("\t")
                if tab:
                    yield name.rpartition("#")[0], number, caption
                elif line.strip():
                    yield None, number, "a line without a tab"


def _open(path: Path):
    # What is not UTF-8 becomes surrogates, which `make_pair` finds: one caption is bad, not the table.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
