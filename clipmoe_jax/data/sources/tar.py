"""The members of tar archives, by their headers (POSIX, GNU and what came before).

tarfile believes what a header says. One of a stranger made it take any memory, recurse, or parse without end.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_HEADER = 2**20  # bytes of a long name or of pax records
GNU_NAME, GNU_LINK, GNU_SPARSE, PAX, GLOBAL_PAX, SUN_PAX = b"LKSxgX"
FOLDER = ord("5")
FILES = (*b"07", 0)
WITHOUT_DATA = (*b"123456",)  # links, devices, folders


class DamagedTarError(ValueError):
    """An archive is cut off or damaged; the message says where."""


class Member(NamedTuple):
    """An entry of an archive.

    Attributes:
        name: its path.
        is_file, is_folder: both False of links, devices, sparse files and what is not known.
        header: the first byte of its headers.
        start, size: the bytes of its contents; the file may end before.
    """

    name: str
    is_file: bool
    is_folder: bool
    header: int
    start: int
    size: int


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """Yields the members of a file of `size` bytes: of an archive, or of several that `cat` joined.

    Global pax headers are passed over. Raises DamagedTarError at the first header that is none, and if the
    last archive has no end.
    """
    place, header, said, ended = 0, 0, {}, False
    while place < size:
        file.seek(place)
        block = file.read(BLOCK)
        place += BLOCK
        if not any(block) and not said:
            header, ended = place, True
            continue
        kind, length, name = _parse(block, header)
        ended = False
        if kind in (GNU_NAME, GNU_LINK, PAX, SUN_PAX):
            if length > MAX_HEADER or place + length > size:
                raise DamagedTarError(f"a header of {length:,} bytes at byte {header:,}")
            contents = file.read(length)
            said |= {"path": _text(contents)} if kind == GNU_NAME else {}
            said |= _pax_records(contents, header) if kind in (PAX, SUN_PAX) else {}
            place += _padded(length)
        elif kind == GLOBAL_PAX:
            place += _padded(length)
        else:
            sparse = kind == GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in said)
            if kind == GNU_SPARSE and block[482]:  # the map goes on in blocks of its own
                while (more := file.read(BLOCK)) and len(more) == BLOCK and more[504]:
                    place += BLOCK
                place += BLOCK
            length = _size(said["size"], header) if "size" in said else length
            is_folder = kind == FOLDER or kind == 0 and name.endswith("/")
            name = said.get("GNU.sparse.name", said.get("path", name))
            yield Member(name, kind in FILES and not (sparse or is_folder), is_folder, header, place, length)
            place += 0 if kind in WITHOUT_DATA or is_folder else _padded(length)
            header, said = place, {}
    if not ended or said:
        raise DamagedTarError(f"cut off or damaged at byte {min(header, size):,}")


def _parse(block: bytes, place: int) -> tuple[int, int, str]:
    """Returns the kind of a header, the bytes that follow it and the name that it has."""
    damaged = DamagedTarError(f"cut off or damaged at byte {place:,}")
    if len(block) < BLOCK:
        raise damaged
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    try:
        said, length = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        raise damaged from None
    # Some programs of old summed bytes with their sign.
    if said not in (checksum, checksum - 256 * sum(byte > 127 for byte in block[:148] + block[156:])):
        raise damaged
    if length < 0:
        raise damaged
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return block[156], length, name


def _number(field: bytes) -> int:
    """Returns the number in a field: octal digits, or binary if the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") if field[0] == 0x80 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(contents: bytes, place: int) -> dict[str, str]:
    """Returns the records of a pax header, each "LENGTH KEY=VALUE" and the end of a line."""
    records, start = {}, 0
    while start < len(contents) and contents[start]:
        digits, space, _ = contents[start : start + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) < len(digits) + 3:
            raise DamagedTarError(f"a damaged pax header at byte {place:,}")
        key, _, value = contents[start + len(digits) + 1 : start + int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start += int(digits)
    return records


def _size(text: str, place: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamagedTarError(f"a pax header at byte {place:,} claims a size of {text[:20]!r}")
    return int(text)


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
