"""Formats in: image-caption data sets as people have them, read one pair at a time.

A source is a class with `__len__` and `__iter__`; it yields a `Pair` for each usable entry and a
`BadRecord` for each other one, and raises only if there is nothing to read at all. Another format
is another such class and a line in `open_source`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Pair(NamedTuple):
    """An image and its captions; `image` is the contents of the image file, still encoded."""

    id: str
    image: bytes
    captions: tuple[str, ...]


class BadRecord(NamedTuple):
    """An entry that cannot be used: `kind` is one of a few (to count), `detail` names the thing."""

    id: str
    kind: str
    detail: str


class ShareGPT4V:
    """A JSON list of conversations about images, as ShareGPT4V publishes its captions.

    An entry is {"id": str, "image": path under the image folder, "conversations": [{"from":
    "human", "value": …}, {"from": "gpt", "value": caption}]}; the caption is the first "gpt" turn.
    Links inside the image folder are followed; a path that climbs out of it is a bad record.
    """

    def __init__(self, json_path: str, image_root: str):
        """Raises FileNotFoundError for a wrong path and ValueError for a malformed file."""
        if not Path(json_path).is_file():
            raise FileNotFoundError(f"--source=sharegpt4v:{json_path} does not exist.")
        if not Path(image_root).is_dir():
            raise FileNotFoundError(f"--images={image_root} is not a folder.")
        self._image_root = os.path.abspath(image_root)
        self._entries = _read_json_list(json_path)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for i, entry in enumerate(self._entries):
            yield self._read(i, entry)

    def _read(self, i: int, entry: object) -> Pair | BadRecord:
        if not isinstance(entry, dict):
            return BadRecord(f"entry {i}", "malformed entry", f"a {type(entry).__name__}")
        name = entry.get("image")
        record_id = str(entry.get("id") or name or f"entry {i}")
        if not isinstance(name, str) or not name:
            return BadRecord(record_id, "missing image", f'entry {i} has no "image" path')
        try:
            caption = _first_answer(entry["conversations"])
        except (KeyError, TypeError, AttributeError):
            return BadRecord(record_id, "malformed entry", f'entry {i} has malformed "conversations"')
        if caption is None:
            return BadRecord(record_id, "missing caption", f'entry {i} has no "gpt" turn')
        path = os.path.normpath(os.path.join(self._image_root, name))
        if not Path(path).is_relative_to(self._image_root):
            return BadRecord(record_id, "path outside the image folder", name)
        return _make_pair(record_id, path, (caption,))


class ImageFolder:
    """A folder of images, each with a .txt of the same stem beside it, one caption a line.

    Subfolders count; the order is by path. A pair's id is the image's path under the folder.
    """

    def __init__(self, root: str):
        """Raises FileNotFoundError if root is not a folder."""
        self._root = Path(root)
        if not self._root.is_dir():
            raise FileNotFoundError(f"--source=folder:{root} is not a folder.")
        self._paths = sorted(path for path in self._root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for path in self._paths:
            yield self._read(path)

    def _read(self, path: Path) -> Pair | BadRecord:
        record_id = path.relative_to(self._root).as_posix()
        caption_path = path.with_suffix(".txt")
        try:
            text = caption_path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            return BadRecord(record_id, "invalid text", f"{caption_path} is not UTF-8")
        except OSError as error:
            return BadRecord(record_id, "missing caption", f"{caption_path}: {error.strerror}")
        captions = tuple(line.strip() for line in text.split("\n") if line.strip())
        return _make_pair(record_id, str(path), captions)


def open_source(spec: str, images: str | None = None) -> ShareGPT4V | ImageFolder:
    """Opens the source that KIND:PATH names.

    Args:
        spec: "sharegpt4v:captions.json" or "folder:path".
        images: the image folder, for kinds that keep captions and images apart.

    Raises:
        ValueError: an unknown kind, no path, or `images` missing or given without need.
        FileNotFoundError: a path that does not exist.
    """
    kind, _, path = spec.partition(":")
    if kind not in ("sharegpt4v", "folder") or not path:
        raise ValueError(f"--source={spec} is not KIND:PATH: use sharegpt4v:captions.json or folder:path.")
    if kind == "folder":
        if images is not None:
            raise ValueError(f"--images={images} has no use with --source={spec}: leave it out.")
        return ImageFolder(path)
    if images is None:
        raise ValueError(f"--source={spec} needs --images=DIR, the folder its image paths are in.")
    return ShareGPT4V(path, images)


def _read_json_list(path: str) -> list:
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path} is not valid JSON at {place}: {error.msg}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds a JSON {type(entries).__name__}, expected a list.")
    return entries


def _first_answer(conversations: list[dict]) -> str | None:
    answers = (turn["value"] for turn in conversations if turn.get("from") == "gpt")
    caption = next(answers, None)
    return caption if caption is None else caption.strip()


def _make_pair(record_id: str, image_path: str, captions: tuple[str, ...]) -> Pair | BadRecord:
    """Reads the image file; the checks that every format shares."""
    if not any(captions):
        return BadRecord(record_id, "empty caption", "no caption has any text")
    try:
        "".join((record_id, *captions)).encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(ascii(record_id), "invalid text", f"not valid Unicode: {error.reason}")
    try:
        image = Path(image_path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return BadRecord(record_id, "missing image", f"{image_path} does not exist")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        return BadRecord(record_id, "unreadable image", f"{image_path}: {error}")
    return Pair(record_id, image, captions)
