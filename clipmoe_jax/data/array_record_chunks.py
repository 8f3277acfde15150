"""The chunks of an ArrayRecord file, looked at before the library that reads the file expands one.

The format is Riegeli's: chunks of compressed records, interrupted by a block's header every 64 KiB. The last
block is the postscript, a chunk that says where the footer is. The footer is a chunk of protocol buffers: one
of the file, and one of each chunk before. The library believes them, and reads a few bytes as gigabytes.
"""

import array
import itertools
import os
import re
import struct
import weakref
from collections.abc import Sequence
from typing import NamedTuple

from clipmoe_jax.core.checks import check_expansion, check_not_sparse

BLOCK, BLOCK_HEADER, HEADER_BYTES = 1 << 16, 24, 40
USABLE = BLOCK - BLOCK_HEADER
# Of a chunk's header: a hash, the bytes of its data, their hash, the kind (1 byte) and the number (7) of its
# records, and their bytes. The library holds a simple chunk to these bytes, but not one of another kind.
HEADER, SIMPLE = struct.Struct("<8xQ8xQQ"), ord("r")
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
NUMBER, MAX_NUMBER = re.compile(rb"[\x80-\xff]{0,9}[\0-\x7f]"), 10  # of variable length; its bytes
# The records of postscript and footer, each field with its tag before it, as the library writes them. Where a
# field comes twice, it reads the last.
POSTSCRIPT = re.compile(rb"\x08(V)\x10V".replace(b"V", NUMBER.pattern))
OF_FILE = re.compile(rb'\n(V)\x08V\x10(V)\x18V(?:"(V)(.*))?'.replace(b"V", NUMBER.pattern), re.DOTALL)
OF_CHUNK = re.compile(rb"\x08(V)\x10V\x18(V)".replace(b"V", NUMBER.pattern))
MAX_BYTES = 2**29  # of a chunk's records; as a rule it has one


class _Header(NamedTuple):
    """A chunk's header: the bytes of its data, the number of its records and their bytes."""

    packed: int
    num_records: int
    expanded: int


class Chunks:
    """The chunks of a file on a disk, which it holds open. Threads may share it."""

    def __init__(self, path: str):
        """Raises ValueError for a sparse file, and for a footer that is damaged or expands to too much."""
        check_not_sparse(path)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._num_bytes = os.fstat(self._file).st_size
        try:
            if self._num_bytes < 2 * BLOCK or self._num_bytes % BLOCK:
                raise ValueError("it is cut off")
            limits, postscript = self._read_records(self._num_bytes - BLOCK)
            if not (found := POSTSCRIPT.fullmatch(postscript[: limits[0]])):
                raise ValueError("it does not say where its footer is")
            self._footer = _number(found[1])
            self._limits, self._entries = self._read_records(self._footer)
            self._num_chunks = _num_chunks(self._entries[: self._limits[0]])
            if self._num_chunks != len(self._limits) - 1:
                raise ValueError("its footer has other chunks than it says")
            self._group_size = self._chunk(0)[1] if self._num_chunks else 1
        except (IndexError, OverflowError, struct.error, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again, or make it again") from error

    def check(self, index: int) -> None:
        """Raises ValueError if the chunk with a record lies elsewhere or expands to more than it may."""
        chunk = index // self._group_size
        begin, _ = self._chunk(chunk)
        end = self._chunk(chunk + 1)[0] if chunk + 1 < self._num_chunks else self._footer
        if not begin < end <= self._footer:
            raise ValueError("its file's footer does not say where it is")
        header = self._read_header(begin)
        if header.expanded > MAX_BYTES:
            raise ValueError(f"it has {header.expanded:,} bytes, of which {MAX_BYTES:,} may be read")
        check_expansion(min(header.packed, end - begin), header.expanded)

    def _chunk(self, chunk: int) -> tuple[int, int]:
        """Returns where a chunk begins and how many records it has, as the footer says."""
        if chunk >= self._num_chunks:
            raise ValueError("its file has not so many records")
        found = OF_CHUNK.fullmatch(self._entries, *self._limits[chunk : chunk + 2])
        if not found or not 0 < (num_records := _number(found[2])) <= self._num_bytes:
            raise ValueError("its file's footer does not say where it is")
        return _number(found[1]), num_records

    def _read_records(self, begin: int) -> tuple[Sequence[int], bytes]:
        """Returns where each record of a small chunk ends, and its records, one after the other."""
        header = self._read_header(begin)
        data = self._read(begin, HEADER_BYTES + header.packed)[HEADER_BYTES:]
        length, start = _first_number(data[1:11])
        values = 1 + start + length
        sizes = _expanded(data[1 + start : values], data[0])
        content = _expanded(data[values:], data[0])
        if header.num_records > self._num_bytes or len(sizes) > MAX_NUMBER * header.num_records:
            raise ValueError(f"the chunk at byte {begin:,} has more records than may be")
        numbers = sizes if sizes.isascii() else map(_number, NUMBER.findall(sizes))
        limits = array.array("Q", itertools.accumulate(numbers))
        if (len(limits), len(content)) != header[1:] or limits[-1] != len(content):
            raise ValueError(f"the chunk at byte {begin:,} has other records than it says")
        return limits, content

    def _read_header(self, begin: int) -> _Header:
        """Returns the header of a simple chunk. Raises ValueError for chunks of another kind."""
        if 0 < begin % BLOCK <= BLOCK_HEADER:
            raise ValueError(f"no chunk can begin at byte {begin:,}")
        packed, kind, expanded = HEADER.unpack(self._read(begin, HEADER_BYTES))
        num_records, kind = kind >> 8, kind & 255
        if kind != SIMPLE:
            raise ValueError(f"the chunk at byte {begin:,} is not a simple one: write it without transpose")
        return _Header(packed, num_records, expanded)

    def _read(self, begin: int, length: int) -> bytes:
        """Returns so many bytes of the chunk that begins at a byte, without the headers of blocks.

        Raises ValueError if the file ends before.
        """
        end = begin + length + (length + (begin + USABLE - 1) % BLOCK) // USABLE * BLOCK_HEADER
        raw = os.pread(self._file, end - begin, begin) if end <= self._num_bytes else b""
        if len(raw) < end - begin:
            raise ValueError(f"the chunk at byte {begin:,} is cut off")
        blocks = range(begin // BLOCK * BLOCK - begin, end - begin, BLOCK)
        return b"".join([raw[max(block + BLOCK_HEADER, 0) : block + BLOCK] for block in blocks])


def _num_chunks(about: bytes) -> int:
    """Returns how many chunks the footer's first record tells of."""
    found = OF_FILE.fullmatch(about)
    if (
        not found
        or _number(found[1]) != len(about) - found.end(1)
        or (found[3] and _number(found[3]) != len(found[4]))
    ):
        raise ValueError("its footer is not that of an ArrayRecord file")
    return _number(found[2])


def _number(data: bytes) -> int:
    """Returns a number of variable length: 7 bits in each byte, the lowest first."""
    number = 0
    for byte in reversed(data):
        number = number << 7 | byte & 127
    return number


def _first_number(data: bytes) -> tuple[int, int]:
    """Returns the number that bytes begin with, and where it ends. Raises ValueError if there is none."""
    if not (found := NUMBER.match(data)):
        raise ValueError("it is cut off")
    return _number(found[0]), found.end()


def _expanded(data: bytes, codec: int) -> bytes:
    """Returns what a part of a chunk expands to. Raises ValueError if that is far more than it has bytes."""
    if not codec:
        return data
    if codec not in CODECS:
        raise ValueError(f"it is compressed by {codec}, which is none of Riegeli's ways")
    import pyarrow  # slow to import

    num_bytes, start = _first_number(data)
    check_expansion(len(data), num_bytes)
    return pyarrow.Codec(CODECS[codec]).decompress(data[start:], num_bytes, asbytes=True)
