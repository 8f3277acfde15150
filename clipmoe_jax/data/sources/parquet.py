"""Parquet files, as Hugging Face data sets and img2dataset's metadata come."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipmoe_jax.data.sources.base import BadRecord, Images, Pair, find_files, make_pair

IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "png", "image_path", "path", "file_name", "filepath")
CAPTION_COLUMNS = ("re_caption", "caption", "captions", "text", "title")
ID_COLUMNS = ("id", "key", "url")


class Parquet:
    """The files of a folder in the order of their names, read by row groups.

    The image column holds file contents, {"bytes", "path"} as Hugging Face's `Image` feature does, or paths
    under the image folder. The caption column holds a string or a list of them; `re_caption` is
    Recap-DataComp's. Ids are those of an id column, else FILE:ROW.
    """

    def __init__(self, path: str, images: str | None):
        """Raises FileNotFoundError for a wrong path, ValueError for missing columns or without pyarrow."""
        try:
            import pyarrow.parquet  # optional, and slow to import
        except ImportError as error:
            raise ValueError("Parquet files need pyarrow: pip install pyarrow.") from error
        self._images = None if images is None else Images(images)
        self._files = []
        for file in find_files(path, "parquet", ".parquet"):
            try:
                self._files.append((file, pyarrow.parquet.ParquetFile(file)))
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file} is not a Parquet file: {error}") from error

    def __len__(self) -> int:
        return sum(opened.metadata.num_rows for _, opened in self._files)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for file, opened in self._files:
            names = opened.schema_arrow.names
            image, caption, record_id = (
                next((name for name in names_of_kind if name in names), None)
                for names_of_kind in (IMAGE_COLUMNS, CAPTION_COLUMNS, ID_COLUMNS)
            )
            if image is None or caption is None:
                raise ValueError(
                    f"{file} has the columns {names}: name one of images ({', '.join(IMAGE_COLUMNS)}) and "
                    f"one of captions ({', '.join(CAPTION_COLUMNS)})."
                )
            row = 0
            columns = [name for name in (image, caption, record_id) if name]
            for batch in opened.iter_batches(batch_size=256, columns=columns):
                for fields in batch.to_pylist():
                    found = fields[record_id] if record_id else None
                    name = f"{file.name}:{row}" if found is None else str(found)
                    yield self._read(name, fields[image], fields[caption], file)
                    row += 1

    def _read(self, record_id: str, image: Any, captions: Any, file: Path) -> Pair | BadRecord:
        captions = captions if isinstance(captions, list) else [captions]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return make_pair(record_id, image, captions)
        if image is None:
            return make_pair(record_id, BadRecord(record_id, "missing image", "the cell is empty"), captions)
        if self._images is None:
            raise ValueError(f"{file} holds paths of images: give --images=DIR, the folder they start from.")
        return self._images.pair(record_id, image, captions)
