"""WebDataset's tar shards, as img2dataset and others write them. Nothing is unpacked to disk."""

import codecs
import functools
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipmoe_jax.data.sources.base import (
    IMAGE_SUFFIXES,
    BadRecord,
    Pair,
    as_text,
    find_files,
    make_pair,
    parse_json,
)


class WebDataset:
    """Tar files in the order of their names; members KEY.jpg and KEY.txt or KEY.json that follow each other
    are a pair with the id SHARD/KEY.

    A shard that is cut off or damaged gives the samples that are whole before that and one bad record.
    """

    def __init__(self, path: str):
        """Raises FileNotFoundError if no shard is there."""
        self._shards = find_files(path, "webdataset", ".tar")

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        """The samples of all shards, counted by their headers."""
        return sum(1 for name, shard in self._shards.items() for _ in _samples(name, shard, read=False))

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for name, shard in self._shards.items():
            for sample in _samples(name, shard, read=True):
                yield sample if isinstance(sample, BadRecord) else _read(*sample)


def _samples(name: str, shard: Path, read: bool) -> Iterator[tuple[str, dict[str, bytes]] | BadRecord]:
    """Yields (id, {suffix: contents}) of each sample, in order; bad records for what cannot be one."""
    key, members = "", {}
    place = "its start"
    try:
        with tarfile.open(shard, "r:") as tar:
            size = shard.stat().st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: it keeps them all otherwise
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    yield BadRecord(f"{name}/{member.name}", "path outside the shard", member.name)
                    continue
                stem, _, suffix = path.name.partition(".")
                if not (member.isfile() and stem and suffix):  # WebDataset too skips README and .hidden
                    continue
                place = f"{member.name}, byte {member.offset:,}"
                here = f"{name.removesuffix('.tar')}/{path.parent / stem}"
                if here != key:
                    if members:
                        yield key, members
                    key, members = here, {}
                if member.offset_data + member.size > size:
                    members = {}  # the sample that the cut goes through
                    raise tarfile.ReadError("unexpected end of data")
                contents = tar.extractfile(member) if read else None
                members[f".{suffix.lower()}"] = contents.read() if contents else b""
            # tarfile takes a header that is damaged or cut off for the end; the true end is a block of zeros.
            place = f"byte {tar.offset:,}"
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("cut off or damaged")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if _is_whole(members):
            yield key, members
        yield BadRecord(name, "damaged shard", f"{shard} at {place}: {error}")
        return
    if members:
        yield key, members


def _is_whole(members: dict[str, bytes]) -> bool:
    """Returns whether image and caption are there: the next member may have been this sample's."""
    return any(suffix in members for suffix in IMAGE_SUFFIXES) and (".txt" in members or ".json" in members)


def _read(record_id: str, members: dict[str, bytes]) -> Pair | BadRecord:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        image = BadRecord(record_id, "missing image", f"the shard has {', '.join(members)} of it")
    if ".txt" in members:
        caption = as_text(members[".txt"].removeprefix(codecs.BOM_UTF8))
    else:
        fields = parse_json(record_id, members.get(".json", b"{}"))
        if isinstance(fields, BadRecord):
            return fields
        caption = fields.get("caption") if isinstance(fields, dict) else None
    return make_pair(record_id, image, [caption])
