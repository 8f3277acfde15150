"""Folders of image files with their captions beside them, or named after their classes."""

from collections.abc import Iterator
from pathlib import Path

from clipmoe_jax.data.sources.base import (
    IMAGE_SUFFIXES,
    BadRecord,
    Pair,
    files_under,
    pair_of_file,
    parse_json,
)


class ImageFolder:
    """A folder of images, each with a .txt of the same stem beside it, one caption a line.

    Subfolders count, linked ones too; the order is by path. A pair's id is the image's path under the folder.
    """

    kind = "folder"

    def __init__(self, root: str):
        """Raises FileNotFoundError if root is not a folder."""
        self._root = Path(root)
        if not self._root.is_dir():
            raise FileNotFoundError(f"source {self.kind}:{root} is not a folder")
        self._paths = sorted(path for path in files_under(root) if path.suffix.lower() in IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for path in self._paths:
            record_id = path.relative_to(self._root).as_posix()
            try:
                captions = self._captions(path)
            except UnicodeDecodeError:
                yield BadRecord(record_id, "invalid text", f"the caption file of {path} is not UTF-8")
            except OSError as error:
                yield BadRecord(record_id, "missing caption", f"{error.filename}: {error.strerror}")
            else:
                bad = isinstance(captions, BadRecord)
                yield captions._replace(id=record_id) if bad else pair_of_file(record_id, str(path), captions)

    def _captions(self, path: Path) -> list | BadRecord:
        lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").split("\n")
        return [line for line in lines if line.strip()] or [""]


class Img2Dataset(ImageFolder):
    """A folder that img2dataset wrote with `output_format=files`: 00000/000000000.jpg, its caption the whole
    .txt beside it, or else "caption" in the .json."""

    kind = "img2dataset"

    def _captions(self, path: Path) -> list | BadRecord:
        if path.with_suffix(".txt").exists():
            return [path.with_suffix(".txt").read_text(encoding="utf-8-sig")]
        fields = parse_json(path.name, path.with_suffix(".json").read_bytes())
        if isinstance(fields, BadRecord):
            return fields
        return [fields.get("caption") if isinstance(fields, dict) else None]


class Classes(ImageFolder):
    """A folder of labelled images: a subfolder for each class, with its images at any depth. The one caption
    of an image is the subfolder's name."""

    kind = "classes"

    def _captions(self, path: Path) -> list | BadRecord:
        name, *inside = path.relative_to(self._root).parts
        if not inside:
            return BadRecord(path.name, "missing caption", f"{path} is in no class's subfolder")
        return [name]
