"""WebDataset's tar shards, as img2dataset and others write them. Nothing is unpacked to disk."""

import codecs
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from etils import epath

from clipmoe_jax.data.sources import tar
from clipmoe_jax.data.sources.base import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    BadRecord,
    Pair,
    as_text,
    make_pair,
    parse_json,
    raise_passing,
)
from clipmoe_jax.data.sources.files import find_files

# {suffix: contents} of a sample; why there are none of a member that is no file.
Members = dict[str, bytes | BadRecord]


class WebDataset:
    """Tar files in the order of their names; members KEY.jpg and KEY.txt or KEY.json that follow each other
    are a pair with the id SHARD/KEY.

    A member whose suffix the sample has already begins another sample. Of several images in a sample the
    first of IMAGE_SUFFIXES counts, and each other one is a bad record. A shard may be several archives joined
    by `cat`. One that is cut off or damaged gives the samples that are whole before that and one bad record.
    """

    def __init__(self, path: str, follow_links: bool = False):
        """Raises FileNotFoundError if no shard is there, ValueError for compressed ones and links."""
        self._shards = find_files(path, "webdataset", ".tar", follow_links)

    def __len__(self) -> int:
        return sum(self._counts)

    @functools.cached_property
    def _counts(self) -> list[int]:
        """The samples of each shard, counted by their headers."""
        return [sum(1 for _ in _samples(*shard, read=False)) for shard in self._shards.items()]

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        return self.entries_from(0)

    def entries_from(self, first: int) -> Iterator[Pair | BadRecord]:
        for i, (name, shard) in enumerate(self._shards.items()):
            if first and first >= self._counts[i]:
                first -= self._counts[i]
                continue
            for sample in itertools.islice(_samples(name, shard, read=True), first, None):
                yield sample if isinstance(sample, BadRecord) else _read(*sample)
            first = 0


def _samples(name: str, shard: Path, read: bool) -> Iterator[tuple[str, Members] | BadRecord]:
    """Yields (id, members) of each sample, in order; bad records for what cannot be one."""
    key, members = "", {}
    place = "its start"
    try:
        with shard.open("rb") as file:
            size = epath.Path(shard).stat().length
            for member in tar.members(file, size):
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    yield BadRecord(f"{name}/{member.name}", "path outside the shard", member.name)
                    continue
                stem, _, suffix = path.name.partition(".")
                hidden = any(part.startswith(".") for part in path.parts)
                if member.is_folder or hidden or not (stem and suffix):  # as WebDataset: README, .hidden
                    continue
                place = f"{member.name}, byte {member.header:,}"
                here, suffix = f"{name.removesuffix('.tar')}/{path.parent / stem}", f".{suffix.lower()}"
                if here != key or suffix in members:
                    yield from _parts(key, members)
                    key, members = here, {}
                if member.is_file and member.start + member.size > size:
                    members = {}  # the sample that the cut goes through
                    raise tar.DamagedTarError("unexpected end of data")
                members[suffix] = _contents(file, member, here, suffix) if read else b""
    except (tar.DamagedTarError, OSError) as error:
        raise_passing(error, shard)
        if _is_whole(members):
            yield from _parts(key, members)
        yield BadRecord(name, "damaged shard", f"{shard} after {place}: {error}")
        return
    yield from _parts(key, members)


def _contents(file: BinaryIO, member: tar.Member, key: str, suffix: str) -> bytes | BadRecord:
    """Returns the contents of an image or a caption, nothing of others, or why there are none."""
    most = MAX_IMAGE_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT_BYTES
    if not member.is_file:
        return BadRecord(key, "not a file", f"{member.name} is a link, a device or a sparse file")
    if suffix not in (*IMAGE_SUFFIXES, ".txt", ".json"):
        return b""
    if member.size > most:
        detail = f"{member.name} has {member.size:,} bytes, of which {most:,} may be read"
        return BadRecord(key, "too large a file", detail)
    file.seek(member.start)
    return file.read(member.size)


def _parts(key: str, members: Members) -> Iterator[tuple[str, Members] | BadRecord]:
    """Yields a sample, if there is one, and a bad record for each image that it has beyond the first."""
    if not members:
        return
    yield key, members
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in members]
    for suffix in (images or [suffix for suffix in members if suffix.endswith(IMAGE_SUFFIXES)])[1:]:
        detail = f"a key, which ends at the first dot, has one image: this has {', '.join(members)}"
        yield BadRecord(key + suffix, "several images", detail)


def _is_whole(members: Members) -> bool:
    """Returns whether image and caption are there: the next member may have been this sample's."""
    return any(suffix in members for suffix in IMAGE_SUFFIXES) and (".txt" in members or ".json" in members)


def _read(record_id: str, members: Members) -> Pair | BadRecord:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        image = BadRecord(record_id, "missing image", f"the shard has {', '.join(members)} of it")
    caption = members.get(".txt", members.get(".json", b"{}"))
    if isinstance(caption, BadRecord):
        return caption
    if ".txt" in members:
        text = as_text(caption.removeprefix(codecs.BOM_UTF8))
    else:
        fields = parse_json(record_id, caption)
        if isinstance(fields, BadRecord):
            return fields
        text = fields.get("caption") if isinstance(fields, dict) else None
    return make_pair(record_id, image, [text])
