"""Text tables of image names and captions."""

import csv
import itertools
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
        self._groups = [
            (name, [caption for _, caption in rows])
            for name, rows in itertools.groupby(self._rows(), key=lambda row: row[0])
        ]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for i, (name, captions) in enumerate(self._groups):
            if name is None:
                yield BadRecord(f"row {i}", "malformed entry", f"{self._path}: a row has too few columns")
            elif any("\ufffd" in caption for caption in captions):
                yield BadRecord(name, "invalid text", f"{self._path}: a caption is not UTF-8")
            else:
                yield self._images.pair(name, name, captions)

    def _rows(self) -> Iterator[tuple[str | None, str]]:
        """(image path, caption) of each row; None for a row that is too short."""
        with _open(self._path) as file:
            header = file.readline()
            separator = next((mark for mark in "\t|" if mark in header), ",")
            names = [name.strip().lower() for name in next(csv.reader([header], delimiter=separator), [])]
            image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
            caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
            if image is None or caption is None:
                raise ValueError(
                    f"{self._path} has the columns {names}: name one of images ({', '.join(IMAGE_COLUMNS)}) "
                    f"and one of captions ({', '.join(CAPTION_COLUMNS)})."
                )
            # Bars separate captions in which quotes mean nothing.
            quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
            for row in csv.reader(file, delimiter=separator, quoting=quoting):
                if len(row) <= max(image, caption):
                    yield None, ""
                else:
                    yield row[image].strip(), row[caption]


class Flickr30k(Csv):
    """Flickr30k's captions: `results.token` (NAME.jpg#0, a tab, the caption), or a table as `Csv` takes it
    (results.csv with bars, Kaggle's captions.txt with commas)."""

    kind = "flickr30k"

    def _rows(self) -> Iterator[tuple[str | None, str]]:
        with _open(self._path) as file:
            first = file.readline()
        if "#0\t" not in first:
            yield from super()._rows()
            return
        with _open(self._path) as file:
            for line in file:
                name, tab, caption = line.rstrip("\n").partition("\t")
                yield (name.rpartition("#")[0], caption) if tab else (None, "")


def _open(path: Path):
    # What is not UTF-8 becomes a mark that `Csv.__iter__` finds: one caption is bad, not the table.
    return path.open(encoding="utf-8-sig", errors="replace", newline="")
