"""The records that sources yield, the checks on them, and what else all kinds share."""

import errno
import functools
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from clipmoe_jax.core.checks import check_not_sparse, read_bytes, stored_bytes
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data.preprocess import num_pixels
from clipmoe_jax.data.sources.files import FOLLOW_LINKS, check_folder, is_linked

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
# Images of other kinds: not read, and counted as bad where a source looks for images.
OTHER_IMAGE_SUFFIXES = (
    *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".jxl", ".ppm", ".pgm"),
    *(".svg", ".tga", ".psd"),
)
# What a record may have: captions, characters in all of them, bytes of an image file. A model reads 248
# tokens, and to tokenise a million characters takes 100 MB.
MAX_CAPTIONS, MAX_TEXT, MAX_IMAGE_BYTES = 1000, 100_000, 2**28
# What entries that name an image again may cost in all, in bytes that are copied and pixels that are decoded:
# so many, or so many for each byte of the images.
REPEATED, REPETITION = 2**30, 1000
MAX_TEXT_BYTES = 2**23  # of a file that holds the captions of an image, or JSON with captions


class Pair(NamedTuple):
    """An image and its captions.

    Attributes:
        id: unlike those of all other pairs of the source.
        image: the contents of the image file, still encoded.
        captions: one or more.
        attributes: a value for each attribute of the source's table, if it has one.
    """

    id: str
    image: bytes
    captions: tuple[str, ...]
    attributes: Mapping[str, str] | None = None


class BadRecord(NamedTuple):
    """An entry that cannot be used: `kind` is one of a few (to count), `detail` names the thing."""

    id: str
    kind: str
    detail: str


class Entry(NamedTuple):
    """An entry that names a file of an image folder. image: its path there, if the entry is whole."""

    id: str
    image: object
    captions: Iterable[object]


class AttributeSpec(NamedTuple):
    """An attribute of images: its values, and a sentence with {} for a value, which classifies by text."""

    prompt: str
    values: tuple[str, ...]


AttributeTable = Mapping[str, AttributeSpec]


class Source(Protocol):
    """A data set, read from the start each time: a `Pair` for each usable entry and a `BadRecord` for each
    other one, in the same order every time.

    A source whose pairs carry attributes also has an `attribute_table`, {name: AttributeSpec}. One that can
    begin in its middle without reading what comes before has `entries_from(first)` (see below).
    """

    def __len__(self) -> int:
        """Returns the number of entries, bad ones too."""
        ...

    def __iter__(self) -> Iterator[Pair | BadRecord]: ...


def attribute_table(source: Source) -> AttributeTable | None:
    """Returns the attributes that the source's pairs carry, None if they carry none."""
    return getattr(source, "attribute_table", None)


def entries_from(source: Source, first: int) -> Iterator[Pair | BadRecord]:
    """Yields the entries of a source from number `first` on, 0 for all. What depends on earlier entries, such
    as whether an id came before, looks at these alone."""
    own = getattr(source, "entries_from", None)
    return own(first) if own and first else itertools.islice(source, first, None)


def id_digest(record_id: str) -> bytes:
    """Returns 16 bytes that stand for an id."""
    return hashlib.blake2b(record_id.encode("utf-8"), digest_size=16).digest()


class Unique:
    """A source whose ids come once: later records of the same id are bad. Keeps 16 bytes of each id.

    Attributes:
        spec: what `open_source` was given, for messages.
    """

    def __init__(self, source: Source, spec: str):
        self._source, self.spec = source, spec
        self.attribute_table = attribute_table(source)

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        seen = set()
        for record in entries_from(self._source, first):
            if isinstance(record, Pair):
                digest = id_digest(record.id)
                if digest in seen:
                    record = duplicate_of(record.id)
                seen.add(digest)
            yield record


def check_not_empty(source: Source) -> None:
    """Raises ValueError for a source without entries."""
    if not len(source):
        name = f"source {source.spec}" if isinstance(source, Unique) else "the source"
        raise ValueError(f"{name} is empty: check its path")


def duplicate_of(record_id: str) -> BadRecord:
    """Returns the bad record in place of a pair whose id came before."""
    return BadRecord(record_id, "duplicate id", "an earlier record has this id")


class Concatenated:
    """Several sources, one after the other; ids begin with the source's number ("0/", "1/", …). Attributes
    are carried if all sources have the same."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        first, *others = map(attribute_table, sources)
        self.attribute_table = first if all(table == first for table in others) else None

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        for i, source in enumerate(self._sources):
            if first < len(source):
                for record in entries_from(source, first):
                    yield record._replace(id=f"{i}/{record.id}")
            first = max(0, first - len(source))


class BadFileError(ValueError):
    """A file that is there and is not read. kind: as of `BadRecord`."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


class Images:
    """The folder that a source's image paths start from."""

    def __init__(self, root: str, follow_links: bool = False):
        """follow_links: reads links inside. Raises FileNotFoundError if root is not a folder."""
        check_folder(root, f"images={root}")
        self._root = os.path.abspath(root)
        self._follow_links = follow_links
        self._is_linked = functools.lru_cache(4096)(functools.partial(is_linked, self._root))

    def exists(self, name: str) -> bool:
        """Returns whether a file is at a path under the folder."""
        try:
            return os.path.isfile(os.path.join(self._root, name))
        except ValueError:  # a null byte in the path
            return False

    def pairs(self, entries: Iterable[Entry | Pair | BadRecord]) -> Iterator[Pair | BadRecord]:
        """Yields the pair of each entry that names an image, or what is wrong with it, and the others as they
        are. What images that are named again may cost is limited by the bytes of all.
        """
        costs, stored, repeated = {}, 0, 0  # of each file what naming it again costs, 0 until it is known
        for entry in entries:
            if not isinstance(entry, Entry):
                yield entry
                continue
            path = self._path(entry)
            if isinstance(path, BadRecord):
                yield path
                continue
            status = _status(path)
            file = status and status.st_dev << 64 | status.st_ino  # less memory than a tuple
            if status and file in costs:
                cost = costs[file] or status.st_size
                if repeated + cost > (most := max(REPEATED, REPETITION * stored)):
                    detail = f"{path}: entries that name images again may cost {most:,} bytes and pixels"
                    yield BadRecord(entry.id, "one image too often", detail)
                    continue
                repeated += cost
            record = pair_of_file(entry.id, path, entry.captions, self._follow_links)
            if status and file not in costs:
                costs[file] = 0
                stored += stored_bytes(path)
            elif status and isinstance(record, Pair) and not costs[file]:
                pixels = num_pixels(record.image)
                costs[file] = status.st_size + pixels
                repeated += pixels
            yield record

    def _path(self, entry: Entry) -> str | BadRecord:
        """Returns the path of an entry's image; one that climbs out or follows links is a bad record."""
        record_id, name = entry.id, entry.image
        if isinstance(name, list) and len(name) > 1:
            return BadRecord(
                record_id, "several images", f"a pair has one image, not {len(name)}: {name[:3]}"
            )
        if not isinstance(name, str) or not name:
            return BadRecord(record_id, "missing image", "no image path")
        path = os.path.normpath(os.path.join(self._root, name))
        if not Path(path).is_relative_to(self._root):
            return BadRecord(record_id, "path outside the image folder", name)
        try:
            if not self._follow_links and self._is_linked(folder := os.path.dirname(path)):
                return BadRecord(record_id, "a link", f"{folder} lies in a linked folder: {FOLLOW_LINKS}")
        except ValueError as error:  # a null byte in the path
            return BadRecord(record_id, "unreadable image", f"{path}: {error}")
        return path


def read_file(path: os.PathLike | str, follow_links: bool, most: int) -> bytes:
    """Returns the contents of a plain file.

    Raises BadFileError for a link, unless links are followed, for a device or a pipe, for more than `most`
    bytes, and for a large file that is mostly holes; OSError as `open`; ValueError for a null byte in the
    path.
    """
    others = os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)  # a pipe would be waited for
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | others)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadFileError("not a file", f"{path} is a device or a pipe")
            if status.st_size > most:
                detail = f"{path} has {status.st_size:,} bytes, of which {most:,} may be read"
                raise BadFileError("too large a file", detail)
            try:
                check_not_sparse(path, status)
            except ValueError as error:
                raise BadFileError("a sparse file", str(error)) from error
            return file.read()
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise BadFileError("a link", f"{path} is a link: {FOLLOW_LINKS}") from error
        raise


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return None


def pair_of_file(
    record_id: str, path: str, captions: Iterable[object], follow_links: bool = False
) -> Pair | BadRecord:
    """Returns the pair of an image file, or what is wrong with it."""
    try:
        image = read_file(path, follow_links, MAX_IMAGE_BYTES)
    except BadFileError as error:
        image = BadRecord(record_id, error.kind, str(error))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        image = BadRecord(record_id, "missing image", f"{path} does not exist")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise_passing(error, path)
        image = BadRecord(record_id, "unreadable image", f"{path}: {error}")
    return make_pair(record_id, image, captions)


def raise_passing(error: BaseException, path: os.PathLike | str) -> None:
    """Raises an error that is no fault of the file at `path`: too many open files, a bucket out of reach."""
    if isinstance(error, OSError) and (error.errno == errno.EMFILE or in_bucket(path)):
        raise error


def make_pair(record_id: str, image: bytes | BadRecord, captions: Iterable[object]) -> Pair | BadRecord:
    """Returns a pair, its captions stripped, or what is wrong: first of the captions, then of the image."""
    captions, texts = tuple(captions), []
    if not captions or any(caption is None for caption in captions):
        return BadRecord(record_id, "missing caption", "there is no caption")
    for caption in captions:
        if not isinstance(caption, str):
            return BadRecord(record_id, "malformed entry", f"a caption is a {type(caption).__name__}")
        if caption.strip():
            texts.append(caption.strip())
    if not texts:
        return BadRecord(record_id, "empty caption", "no caption has any text")
    if excess := excess_of_text(texts):
        return BadRecord(record_id, *excess)
    if isinstance(image, bytes) and len(image) > MAX_IMAGE_BYTES:
        detail = f"{len(image):,} bytes, of which {MAX_IMAGE_BYTES:,} may be read"
        image = BadRecord(record_id, "unreadable image", detail)
    try:
        "".join((record_id, *texts)).encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRecord(ascii(record_id), "invalid text", f"not valid Unicode: {error.reason}")
    return image if isinstance(image, BadRecord) else Pair(record_id, image, tuple(texts))


def excess_of_text(captions: Sequence[str]) -> tuple[str, str] | None:
    """Returns the kind and the detail of a bad record whose captions are too many or too long, or None."""
    if len(captions) > MAX_CAPTIONS:
        return "too many captions", f"{len(captions):,}, of which {MAX_CAPTIONS:,} may be read"
    if (length := sum(map(len, captions))) > MAX_TEXT:
        return "too much text", f"{length:,} characters, of which {MAX_TEXT:,} may be read"
    return None


def find_column(names: Sequence[str], wanted: Sequence[str], file: Path) -> str | None:
    """Returns the first of the wanted columns that a table has, None if it has none of them.

    Raises:
        ValueError: several columns have that name.
    """
    name = next((name for name in wanted if name in names), None)
    if name is not None and names.count(name) > 1:
        raise ValueError(f"{file} has {names.count(name)} columns {name!r}: rename or remove all but one")
    return name


def as_text(value: object) -> object:
    """Decodes bytes; what is not UTF-8 becomes surrogates, which `make_pair` reports."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def parse_json(record_id: str, contents: bytes) -> object:
    """Returns the value of an entry's own JSON, or a BadRecord."""
    try:
        return json.loads(contents.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRecord(record_id, "invalid text", f"JSON that is not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRecord(record_id, "malformed entry", f"not valid JSON: {error}")


def read_text(path: Path) -> str:
    """Reads a small UTF-8 file, with or without a byte order mark. Raises ValueError naming a byte that is
    not, or the size of a large file."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from error
