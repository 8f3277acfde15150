"""WebDataset's tar shards, as img2dataset and others write them. Nothing is unpacked to disk."""

import functools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from clipmoe_jax.data.sources.base import IMAGE_SUFFIXES, BadRecord, Pair, find_files, make_pair


class WebDataset:
    """Tar files in the order of their names; members KEY.jpg and KEY.txt or KEY.json that follow each other
    are a pair with the id SHARD/KEY.

    A shard that is cut off gives what is before the cut and one bad record.
    """

    def __init__(self, path: str):
        """Raises FileNotFoundError if no shard is there."""
        self._shards = find_files(path, "webdataset", ".tar")

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def _count(self) -> int:
        """Samples of all shards, from the headers alone."""
        return sum(1 for shard in self._shards for _ in _samples(shard, read=False))

    def __iter__(self) -> Iterator[Pair | BadRecord]:
        for shard in self._shards:
            for sample in _samples(shard, read=True):
                yield sample if isinstance(sample, BadRecord) else _read(*sample)


def _samples(shard: Path, read: bool) -> Iterator[tuple[str, dict[str, bytes]] | BadRecord]:
    """(id, {suffix: contents}) of each sample, in order; bad records for what cannot be one."""
    key, members = None, {}
    place = "its start"
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                place = member.name
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    yield BadRecord(f"{shard.name}/{member.name}", "path outside the shard", member.name)
                    continue
                if not member.isfile():
                    continue
                stem, _, suffix = path.name.partition(".")
                here = f"{shard.stem}/{path.parent / stem}"
                if here != key:
                    if members:
                        yield key, members
                    key, members = here, {}
                contents = b""
                if read:
                    contents = tar.extractfile(member).read()
                    if len(contents) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
                elif member.offset_data + member.size > shard.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                members[f".{suffix.lower()}"] = contents
    except (tarfile.TarError, OSError, EOFError) as error:
        yield BadRecord(f"{shard.name}", "damaged shard", f"{shard} at {place}: {error}")
        return
    if members:
        yield key, members


def _read(record_id: str, members: dict[str, bytes]) -> Pair | BadRecord:
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if image is None:
        image = BadRecord(record_id, "missing image", f"the shard has {', '.join(members)} of it")
    try:
        if ".txt" in members:
            caption = members[".txt"].decode("utf-8-sig")
        else:
            fields = json.loads(members.get(".json", b"{}").decode("utf-8-sig"))
            caption = fields.get("caption") if isinstance(fields, dict) else None
    except UnicodeDecodeError as error:
        return BadRecord(record_id, "invalid text", f"not UTF-8 at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRecord(record_id, "malformed entry", f"not valid JSON: {error.msg}")
    return make_pair(record_id, image, [caption])
