"""Checksums of a folder's files, so that damage on a disk is told where the file is read.

`checksums.json` has the CRC-32 of each file by its name below the folder; any single flipped bit changes it.
A file is read through once before it is used. ArrayRecord files have checksums of their own and are left out:
a data set of any size opens at once. Folders of earlier versions have no `checksums.json`, and are read
without.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from clipmoe_jax.core.checks import check_not_sparse
from clipmoe_jax.core.json_files import field, read_json
from clipmoe_jax.core.paths import check_plain_file, written_whole
from clipmoe_jax.core.stamps import BLOCK, named_files

CHECKSUMS = "checksums.json"
OWN_CHECKSUMS = ".array_record-"  # in the names of files that have them
KIND = "crc32"


def of_folder(folder: epath.Path, without: Sequence[str] = ()) -> dict[str, str]:
    """Returns {name: checksum} of the files below a folder. without: names in the folder to leave out."""
    without = (*without, CHECKSUMS)
    return {
        name: _of_file(file)
        for name, file in _files(folder).items()
        if name.partition("/")[0] not in without and OWN_CHECKSUMS not in name
    }


def of_text(text: str) -> str:
    """Returns the checksum of a file with this text."""
    return f"{zlib.crc32(text.encode()):08x}"


def write(folder: epath.Path, checksums: Mapping[str, str]) -> None:
    """Writes checksums.json, {name: checksum}, whole or not at all."""
    with written_whole(folder / CHECKSUMS) as path:
        path.write_text(json.dumps({KIND: checksums}, indent=2) + "\n")


def read(folder: epath.Path, fix: str = "") -> dict[str, str]:
    """Returns the {name: checksum} of a folder; {} if it has none. Raises ValueError if they are damaged.

    fix: what the error advises; by default to make the folder again.
    """
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    try:
        return field(read_json(path), KIND, dict, str(path))
    except ValueError as error:
        raise _damaged(path, "it holds no checksums", folder, fix) from error


def verify(folder: epath.Path, *names: str, fix: str = "") -> None:
    """Reads files, and those in subfolders, of these names in a folder and compares their checksums.

    What has none there is not read. Raises ValueError naming the first file that is damaged or gone. fix: as
    of `read`.
    """
    folder = epath.Path(folder)
    checksums = read(folder, fix)
    for name in names:
        recorded = {n: value for n, value in checksums.items() if f"{n}/".startswith(f"{name}/")}
        files = _files(folder, name) if recorded else {}
        for file_name, expected in recorded.items():
            if file_name not in files:
                raise _damaged(folder / file_name, "it is gone", folder, fix)
            if (found := _of_file(files[file_name])) != expected:
                reason = f"its CRC-32 is {found}, {CHECKSUMS} says {expected}"
                raise _damaged(folder / file_name, reason, folder, fix)


def read_verified(path: epath.Path, fix: str = "") -> dict[str, Any]:
    """Returns the content of a JSON file, as `read_json`. Raises ValueError if it is damaged, as `verify`."""
    verify(path.parent, path.name, fix=fix)
    return read_json(path)


def _files(folder: epath.Path, name: str = "") -> dict[str, epath.Path]:
    """Returns {name: file} of the files below a folder, or of one file or subfolder in it."""
    return {f"{name}/{below}".strip("/"): file for below, file in named_files(folder / name)}


def _of_file(path: epath.Path) -> str:
    check_plain_file(path)
    check_not_sparse(path)
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def _damaged(path: epath.Path, reason: str, folder: epath.Path, fix: str) -> ValueError:
    fix = fix or f"delete {folder} and make it again by the same command, or copy it again"
    return ValueError(f"{path} is damaged ({reason}): {fix}; if you changed it, delete {folder / CHECKSUMS}")
