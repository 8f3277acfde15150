"""Folders of image files: with their captions beside them, named after their classes, or alone."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipmoe_jax.data.sources.base import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    OTHER_IMAGE_SUFFIXES,
    BadFileError,
    BadRecord,
    Pair,
    pair_of_file,
    parse_json,
    raise_passing,
    read_file,
)
from clipmoe_jax.data.sources.files import check_folder, plain_files_under

IMAGES = rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES))})$"


class ImageFolder:
    """A folder of images, each with a .txt of the same stem beside it, one caption a line.

    Subfolders count, but not hidden ones; the order is by path. A pair's id is the image's path under the
    folder. Images of one stem share their captions. Captions without an image and images of other kinds are
    bad records.
    """

    kind = "folder"
    captions = r"\.txt$"  # names of the files beside images that hold captions

    def __init__(self, root: str, follow_links: bool = False):
        """follow_links: reads links to files and folders; otherwise links to files are bad records.

        Raises FileNotFoundError if root is not a folder, ValueError for a linked folder.
        """
        self._root, self._follow_links = Path(root), follow_links
        check_folder(root, f"source {self.kind}:{root}")
        paths, stems, captions = [], set(), {}
        for entry in plain_files_under(root, self.kind, follow_links):
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
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        for path in itertools.islice(self._paths, first, None):
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
        except BadFileError as error:
            return BadRecord(record_id, error.kind, str(error))
        except OSError as error:
            raise_passing(error, path)
            return BadRecord(record_id, "missing caption", f"{error.filename}: {error.strerror}")
        if isinstance(captions, BadRecord):
            return captions._replace(id=record_id)
        return pair_of_file(record_id, str(path), captions, self._follow_links)

    def _captions(self, path: Path) -> list | BadRecord:
        return [line for line in self._text(path).split("\n") if line.strip()] or [""]

    def _text(self, image: Path) -> str:
        """Returns the contents of the .txt beside an image."""
        contents = self._beside(image, ".txt").decode("utf-8-sig")
        return contents.replace("\r\n", "\n").replace("\r", "\n")

    def _beside(self, image: Path, suffix: str) -> bytes:
        """Returns the contents of the file beside an image. Raises as `read_file`."""
        return read_file(image.with_suffix(suffix), self._follow_links, MAX_TEXT_BYTES)


class Img2Dataset(ImageFolder):
    """A folder that img2dataset wrote with `output_format=files`: 00000/000000000.jpg, its caption the whole
    .txt beside it, or else "caption" in the .json."""

    kind = "img2dataset"
    captions = r"\.txt$|^\d+\.json$"  # others, such as 00000_stats.json, are of no image

    def _captions(self, path: Path) -> list | BadRecord:
        if path.with_suffix(".txt").exists():
            return [self._text(path)]
        fields = parse_json(path.name, self._beside(path, ".json"))
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
            return BadRecord(path.name, "missing class", f"{path} is in no class's subfolder")
        return [name]


class NamedImages(ImageFolder):
    """A folder of images without captions. The one caption of an image is its file's name without the
    ending."""

    kind = "images"
    captions = "(?!)"  # none

    def _captions(self, path: Path) -> list | BadRecord:
        return [path.stem]
