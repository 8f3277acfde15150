"""The chunks of an ArrayRecord file, looked at before the library that reads the file expands one.

The format is Riegeli's: chunks of compressed records, interrupted by a block's header every 64 KiB. The last
block is the postscript, a chunk that says where the footer is. The footer is a chunk of protocol buffers: one
of the file, and one of each chunk before. The library believes them, and reads a few bytes as gigabytes.
"""

import array
import os
import struct
import weakref
from typing import NamedTuple

import numpy as np

from clipmoe_jax.core.checks import check_expansion, check_not_sparse
from clipmoe_jax.core.varints import Reader

BLOCK, BLOCK_HEADER, HEADER_BYTES = 1 << 16, 24, 40
USABLE = BLOCK - BLOCK_HEADER
# Of a chunk's header: a hash, the bytes of its data, their hash, the kind (1 byte) and the number (7) of its
# records, and their bytes. The library holds a simple chunk to these bytes, but not one of another kind.
HEADER, SIMPLE = struct.Struct("<8xQ8xQQ"), ord("r")
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
# The tags of the fields in records of postscript and footer, as the library writes them: of what is nested in
# the footer's first record, of that record, and of an option in it. Where a field comes twice, it reads the
# last.
OF_POSTSCRIPT, OF_CHUNK = (0x08, 0x10), (0x08, 0x10, 0x18)
OF_FILE, NESTED, OPTIONS = (0x08, 0x10, 0x18), 0x0A, 0x22
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
            ends, postscript = self._read_records(self._num_bytes - BLOCK)
            footer = int(_fields(OF_POSTSCRIPT, ends[:1], postscript[: int(ends[0])])[0, 0])
            ends, entries = self._read_records(footer)
            first = int(ends[0])
            if _num_chunks(entries[:first]) != len(ends) - 1:
                raise ValueError("its footer has other chunks than it says")
            chunks = _fields(OF_CHUNK, ends[1:] - ends[0], entries[first:])
            limits = np.append(chunks[:, 0], np.uint64(footer))
            if (limits[1:] <= limits[:-1]).any() or not chunks[:, 2].all():
                raise ValueError("it does not say where its chunks are")
            self._limits = array.array("Q", limits.tobytes())  # where each chunk begins, and the footer
            self._group_size = int(chunks[0, 2]) if len(chunks) else 1
        except (EOFError, IndexError, OverflowError, struct.error, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy it again, or make it again") from error

    def check(self, index: int) -> None:
        """Raises ValueError if the chunk with a record lies elsewhere or expands to more than it may."""
        chunk = index // self._group_size
        if chunk + 1 >= len(self._limits):
            raise ValueError("its file has not so many records")
        begin, end = self._limits[chunk], self._limits[chunk + 1]
        header = self._read_header(begin)
        if header.expanded > MAX_BYTES:
            raise ValueError(f"it has {header.expanded:,} bytes, of which {MAX_BYTES:,} may be read")
        check_expansion(min(header.packed, end - begin), header.expanded)

    def _read_records(self, begin: int) -> tuple[np.ndarray, bytes]:
        """Returns where each record of a small chunk ends, and its records, one after the other."""
        header = self._read_header(begin)
        if header.num_records > self._num_bytes // HEADER_BYTES:  # the footer has one for each chunk
            raise ValueError(f"the chunk at byte {begin:,} has more records than may be")
        data = Reader(self._read(begin, HEADER_BYTES + header.packed)[HEADER_BYTES:])
        codec = data.byte()
        sizes = Reader(_expanded(data.take(data.number()), codec))
        content = _expanded(data.rest(), codec)
        numbers = sizes.numbers(header.num_records)
        ends = np.cumsum(numbers)
        others = sizes.rest() or len(content) != header.expanded or numbers.max(initial=0) > len(content)
        if others or ends[-1] != len(content):
            raise ValueError(f"the chunk at byte {begin:,} has other records than it says")
        return ends, content

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
        if len(raw) == length:  # within a block
            return raw
        blocks = range(begin // BLOCK * BLOCK - begin, end - begin, BLOCK)
        return b"".join([raw[max(block + BLOCK_HEADER, 0) : block + BLOCK] for block in blocks])


def _num_chunks(about: bytes) -> int:
    """Returns how many chunks the footer's first record tells of."""
    record = Reader(about)
    nested = record.numbers(2).tolist() == [NESTED, len(record.rest())]
    found = record.numbers(2 * len(OF_FILE)).tolist()
    if record.rest():
        nested = nested and record.numbers(2).tolist() == [OPTIONS, len(record.rest())]
    if not nested or tuple(found[::2]) != OF_FILE:
        raise ValueError("its footer is not that of an ArrayRecord file")
    return found[3]


def _fields(tags: tuple[int, ...], ends: np.ndarray, content: bytes) -> np.ndarray:
    """Returns the fields of records, uint64 (records, fields), each of which has its tag before it.

    ends: where each record ends in the content. Raises ValueError for records that have others.
    """
    found = Reader(content).numbers(2 * len(tags) * len(ends)).reshape(len(ends), len(tags), 2)
    is_last = np.frombuffer(content, np.uint8) < 128  # of a number
    num_read = np.cumsum(is_last)[ends.astype(np.int64) - 1]
    whole = (num_read == 2 * len(tags) * np.arange(1, len(ends) + 1)).all()
    if not whole or not is_last[ends.astype(np.int64) - 1].all() or (found[..., 0] != tags).any():
        raise ValueError("it does not say where its chunks are")
    return found[..., 1]


def _expanded(data: bytes, codec: int) -> bytes:
    """Returns what a part of a chunk expands to. Raises ValueError if that is far more than it has bytes."""
    if not codec:
        return data
    if codec not in CODECS:
        raise ValueError(f"it is compressed by {codec}, which is none of Riegeli's ways")
    import pyarrow  # slow to import

    packed = Reader(data)
    num_bytes = packed.number()
    check_expansion(len(data), num_bytes)
    return pyarrow.Codec(CODECS[codec]).decompress(packed.rest(), num_bytes, asbytes=True)
