"""The index of an OCDBT database, looked at before TensorStore expands it.

OCDBT keeps the arrays of a checkpoint in few files: a manifest names the root of a B+tree, whose leaves hold
small values and say where large ones are (TensorStore's documentation has the format). Nodes are compressed,
and a key repeats the beginning of the one before it: TensorStore makes gigabytes of 48 KB. Values of arrays
expand no further than their shapes say.
"""

import os
from typing import NamedTuple

import numpy as np

from clipmoe_jax.core.varints import Reader

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC, NODE_MAGIC = bytes.fromhex("0cdb3a2a"), bytes.fromhex("0cdb20de")
SINGLE, PLAIN, ZSTD = 0, 0, 1  # a kind of manifest, and two of compression
MISSING = 2**64 - 1  # the place of the root of an empty database
MAX_NAME = 2**16 - 1  # bytes of a key, or of a file's name
# What an index may expand to in memory, and what a node and an entry take there beside their contents.
MAX_EXPANDED, OF_NODE, OF_ENTRY = 2**28, 2**15, 2**7


class _Place(NamedTuple):
    """The place of a node. base: what the names of files begin with that the node tells of."""

    base: bytes
    file: bytes
    offset: int
    length: int


def check_index(folder: os.PathLike | str) -> None:
    """Raises ValueError if the index of a database on a disk is damaged, or expands to more than it may."""
    try:
        _Index(folder).check()
    except (EOFError, IndexError, OverflowError) as error:
        raise ValueError(f"its index is damaged ({error})") from error


class _Index:
    """The index of a database, and what its nodes expand to so far."""

    def __init__(self, folder: os.PathLike | str):
        self._folder = os.fsencode(folder)
        self._expanded = 0

    def check(self) -> None:
        """Goes through all nodes of the newest version."""
        path = os.path.join(self._folder, MANIFEST.encode())
        manifest = self._opened(_Place(b"", MANIFEST.encode(), 0, os.path.getsize(path)), MANIFEST_MAGIC)
        manifest.take(16)  # the database's id
        if manifest.byte() != SINGLE:
            raise ValueError("its manifest is in several files, as Orbax writes none")
        manifest.numbers(2)
        manifest.byte()
        if manifest.number() == ZSTD:
            manifest.take(4)
        files = self._files(manifest, b"")
        num_versions = manifest.number()
        self._count(OF_ENTRY * num_versions)
        manifest.numbers(num_versions)
        manifest.take(num_versions)
        waiting = _places(manifest, files, num_versions)[-1:]
        while waiting:
            if (place := waiting.pop()).offset != MISSING:
                waiting += self._children(place)

    def _children(self, place: _Place) -> list[_Place]:
        """Returns the places of a node's children."""
        self._count(OF_NODE)
        node = self._opened(place, NODE_MAGIC)
        height = node.byte()
        files = self._files(node, place.base)
        if not (num_keys := node.number()):
            raise ValueError("its index has an empty node")
        self._count(OF_ENTRY * num_keys)
        lengths = [node.numbers(num_keys - 1), suffixes := node.numbers(num_keys)]
        self._count_names(lengths)
        if not height:
            return []
        node.numbers(num_keys)
        node.take(int(suffixes.sum()))
        return _places(node, files, num_keys)

    def _files(self, node: Reader, base: bytes) -> list[tuple[bytes, bytes]]:
        """Returns the files that a node tells of: what their names begin with, and their names.

        base: what the files' names begin with that the node's own place gives.
        """
        num_files = node.number()
        self._count(OF_ENTRY * num_files)
        prefixes, suffixes, bases = (node.numbers(n) for n in (max(num_files - 1, 0), num_files, num_files))
        self._count(num_files * len(base))
        self._count_names([prefixes, suffixes, bases])
        files, name = [], b""
        for i in range(num_files):
            name = name[: int(prefixes[i - 1])] if i else b""
            name += node.take(int(suffixes[i]))
            files.append((base + name[: int(bases[i])], base + name))
        return files

    def _opened(self, place: _Place, magic: bytes) -> Reader:
        """Returns what a manifest or a node expands to."""
        if os.path.isabs(place.file) or b".." in place.file.split(b"/"):
            raise ValueError("it names files of other folders")
        try:
            with open(os.path.join(self._folder, place.file), "rb") as file:
                content = os.pread(file.fileno(), min(place.length, MAX_EXPANDED), place.offset)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise ValueError("its index is not where it should be") from error
        if content[:4] != magic or int.from_bytes(content[4:12], "little") != len(content):
            raise ValueError("its index is not where it should be")
        body = Reader(content[12:-4])  # a checksum is last
        body.number()
        if (compression := body.number()) not in (PLAIN, ZSTD):
            raise ValueError(f"its index is compressed by {compression}, which OCDBT does not know")
        expanded = body.rest()
        if compression == ZSTD:
            import pyarrow  # slow to import

            try:
                with pyarrow.CompressedInputStream(pyarrow.BufferReader(expanded), "zstd") as stream:
                    expanded = stream.read(MAX_EXPANDED + 1)
            except OSError as error:
                raise ValueError(f"its index is damaged: {error}") from error
        self._count(len(expanded))
        return Reader(expanded)

    def _count_names(self, lengths: list[np.ndarray]) -> None:
        """Counts names, of each of which these are the lengths of parts."""
        if any(part.max(initial=0) > MAX_NAME for part in lengths):
            raise ValueError(f"its index has names of more than {MAX_NAME:,} bytes")
        self._count(sum(int(part.sum()) for part in lengths))

    def _count(self, num_bytes: int) -> None:
        """Counts what a part expands to. Raises ValueError if that is too much, with the parts before."""
        self._expanded += num_bytes
        if self._expanded > MAX_EXPANDED:
            raise ValueError(f"its index expands to more than {MAX_EXPANDED:,} bytes")


def _places(node: Reader, files: list[tuple[bytes, bytes]], number: int) -> list[_Place]:
    """Reads so many places of nodes. files: those that the node tells of."""
    fields = (node.numbers(number).tolist() for _ in range(3))
    return [_Place(*files[i], *place) for i, *place in zip(*fields, strict=True)]
