"""Folders of image files with their captions beside them, or named after their classes."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipmoe_jax.core.stamps import files_under
from clipmoe_jax.data.sources.base import (
    IMAGE_SUFFIXES,
    OTHER_IMAGE_SUFFIXES,
    BadRecord,
    Pair,
    pair_of_file,
    parse_json,
)

IMAGES = rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES))})$"


class ImageFolder:
    """A folder of images, each with a .txt of the same stem beside it, one caption a line.

    Subfolders count, linked ones too, but not hidden ones; the order is by path. A pair's id is the image's
    path under the folder. Images of one stem share their captions. Captions without an image and images of
    other kinds are bad records.
    """

    kind = "folder"
    captions = r"\.txt$"  # names of the files beside images that hold captions

    def __init__(self, root: str):
        """Raises FileNotFoundError if root is not a folder."""
        self._root = Path(root)
        if not self._root.is_dir():
            raise FileNotFoundError(f"source {self.kind}:{root} is not a folder")
        paths, stems, captions = [], set(), {}
        for entry in files_under(root):
            stem, suffix = os.path.splitext(entry.path)
            if suffix.lower() in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES:
                paths.append(Path(entry.path))
                stems.add(stem)
            elif re.search(self.captions, entry.name):
                captions[stem] = max(entry.path, captions.get(stem, ""))  # one of .txt and .json
        alone = [Path(path) for stem, path in captions.items() if stem not in stems]
        self._paths = sorted(paths + alone)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for path in self._paths:
            yield self._read(path.relative_to(self._root).as_posix(), path)

    def _read(self, record_id: str, path: Path) -> Pair | BadRecord:
        if re.search(self.captions, path.name):
            return BadRecord(record_id, "missing image", f"no image lies beside {path}")
        if path.suffix.lower() in OTHER_IMAGE_SUFFIXES:
            kinds = ", ".join(IMAGE_SUFFIXES)
            return BadRecord(record_id, "another kind of image", f"{path} is none of {kinds}: convert it")
        try:
            captions = self._captions(path)
        except UnicodeDecodeError:
            return BadRecord(record_id, "invalid text", f"the caption file of {path} is not UTF-8")
        except OSError as error:
            return BadRecord(record_id, "missing caption", f"{error.filename}: {error.strerror}")
        if isinstance(captions, BadRecord):
            return captions._replace(id=record_id)
        return pair_of_file(record_id, str(path), captions)

    def _captions(self, path: Path) -> list | BadRecord:
        lines = path.with_suffix(".txt").read_text(encoding="utf-8-sig").split("\n")
        return [line for line in lines if line.strip()] or [""]


class Img2Dataset(ImageFolder):
    """A folder that img2dataset wrote with `output_format=files`: 00000/000000000.jpg, its caption the whole
    .txt beside it, or else "caption" in the .json."""

    kind = "img2dataset"
    captions = r"\.txt$|^\d+\.json$"  # others, such as 00000_stats.json, are of no image

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
    captions = "(?!)"  # none

    def _captions(self, path: Path) -> list | BadRecord:
        name, *inside = path.relative_to(self._root).parts
        if not inside:
            return BadRecord(path.name, "missing caption", f"{path} is in no class's subfolder")
        return [name]
