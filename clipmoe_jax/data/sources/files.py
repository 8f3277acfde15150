"""The files that a source's path stands for: one, those of a folder, or those of a pattern."""

import functools
import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any

from etils import epath

from clipmoe_jax.core.checks import check_size
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.stamps import files_under, named_files
from clipmoe_jax.data.preprocess import limit_of

MAX_ANNOTATION_BYTES = "CLIPMOE_MAX_ANNOTATION_BYTES"
DEFAULT_MAX_ANNOTATION_BYTES = 2**33  # ShareGPT4V's captions have 1.5 GB
# What to do about a link, which may lead to any file of the machine.
FOLLOW_LINKS = "remove it, or add ?follow_links=true to the source (--follow_links of prepare)"
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")
_MAGIC = re.compile(r"[*?[]")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def find_file(path: str, kind: str) -> Path:
    """Returns the path of a source that is one file.

    Raises FileNotFoundError if there is none, ValueError if it is too large to read, or mostly holes.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"source {kind}:{path} does not exist")
    check_size(path, max_annotation_bytes(), f": set the environment variable {MAX_ANNOTATION_BYTES}")
    return Path(path)


def check_folder(path: str, told: str) -> None:
    """Raises FileNotFoundError, with `told` for the path, if it is not a folder."""
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{told} {'is not a folder' if os.path.exists(path) else 'does not exist'}")


def max_annotation_bytes() -> int:
    """Returns how many bytes a file of captions of many images may have. It is held in memory, several times
    its size."""
    return limit_of(MAX_ANNOTATION_BYTES, DEFAULT_MAX_ANNOTATION_BYTES)


def find_files(path: str, kind: str, suffix: str, follow_links: bool = False) -> dict[str, Path]:
    """Returns {name: file} of the files with a suffix: of one file, a folder with its subfolders, or a
    pattern with `*` or braces (`expand_braces`), on a disk or in a bucket. Hidden files and folders do not
    count.

    A name is the path under the folder, since subfolders may have files of the same name.

    Raises:
        FileNotFoundError: there are none, or none of one of those that braces name.
        ValueError: some are compressed, and would be left out; one is a link or in a linked folder, which
            `follow_links` reads; one is a device or a pipe.
    """
    if in_bucket(path):
        return _find_objects(path, kind, suffix)
    if os.path.isdir(path):
        found = [entry.path for entry in plain_files_under(path, kind, follow_links)]
        root, paths = path, sorted(map(Path, _with_suffix(found, suffix, f"{kind}:{path}")))
        named = path
    else:
        paths = sorted(set(map(Path, _all_matching(path, kind))))
        root = os.path.commonpath([file.parent for file in paths]) if paths else ""
        named = os.path.dirname(path)
        while paths != [Path(path)] and (glob.has_magic(named) or _BRACES.search(named)):
            named = os.path.dirname(named)
    files = {file.relative_to(root).as_posix(): file for file in paths}
    if not files:
        raise FileNotFoundError(f"source {kind}:{path} has no {suffix} file")
    for file in paths:
        if not follow_links and file != Path(path) and is_linked(named, file):
            raise ValueError(f"source {kind}:{path} has a link, {file}: {FOLLOW_LINKS}")
        if not file.is_file():
            raise ValueError(f"source {kind}:{path}: {file} is no plain file: remove it")
    return files


def _find_objects(path: str, kind: str, suffix: str) -> dict[str, Path]:
    """Returns what `find_files` does of a path in a bucket, where there are no links."""
    folder = epath.Path(path)
    if folder.is_dir():
        found = dict(named_files(folder))
        objects: dict[str, Any] = {
            name: found[name] for name in _with_suffix(found, suffix, f"{kind}:{path}")
        }
    else:
        found = sorted(set(_all_matching(path, kind)))
        root = os.path.commonprefix([f"{os.path.dirname(one)}/" for one in found]).rpartition("/")[0]
        objects = {one[len(root) + 1 :]: epath.Path(one) for one in found}
    if not objects:
        raise FileNotFoundError(f"source {kind}:{path} has no {suffix} file")
    return objects


def _with_suffix(files: Iterable[str], suffix: str, source: str) -> list[str]:
    """Returns the files of a source with a suffix, in any case. Raises ValueError if some are compressed."""
    compressed = tuple(suffix + ending for ending in COMPRESSED_SUFFIXES)
    if packed := sorted(file for file in files if file.lower().endswith(compressed)):
        raise ValueError(
            f"source {source} has {len(packed)} compressed files, the first {packed[0]}: unpack them"
        )
    return [file for file in files if file.lower().endswith(suffix)]


def plain_files_under(folder: str, kind: str, follow_links: bool) -> Iterator[os.DirEntry]:
    """Yields the files in a folder and its subfolders, as `files_under`.

    Raises ValueError for a linked folder if links are not followed: what is in it would be missing.
    """
    for entry in files_under(folder, follow_links):
        if not follow_links and entry.is_symlink() and entry.is_dir():
            raise ValueError(f"source {kind}:{folder} has a linked folder, {entry.path}: {FOLLOW_LINKS}")
        yield entry


def is_linked(root: str, path: os.PathLike | str) -> bool:
    """Returns whether a path under a folder is a link, or lies in one, below that folder."""
    below = os.path.relpath(path, root)
    return os.path.realpath(path) != os.path.normpath(os.path.join(os.path.realpath(root), below))


def matching(path: str) -> list[str]:
    """Returns the files that are there of those that a path or a pattern with `*` or braces stands for."""
    return [file for files in _by_brace(path).values() for file in files]


def _all_matching(path: str, kind: str) -> list[str]:
    """Returns `matching`. Raises FileNotFoundError for a file that braces name and that is not there."""
    for one, files in (found := _by_brace(path)).items():
        if one != path and not files:
            raise FileNotFoundError(
                f"source {kind}:{path} has no {one}: put it there, or leave it out of the braces"
            )
    return [file for files in found.values() for file in files]


def _by_brace(path: str) -> dict[str, list[str]]:
    """Returns {path: its files that are there} of a path, or of each of those that its braces name."""
    if in_bucket(path):
        objects_in = functools.cache(_objects_in)
        return {one: _matching_objects(one, objects_in) for one in expand_braces(path)}
    if os.path.isfile(path):
        return {path: [path]}
    return {
        one: [one] if os.path.isfile(one) else [file for file in glob.glob(one) if not os.path.isdir(file)]
        for one in expand_braces(path)
    }


def _matching_objects(path: str, objects_in: Callable[[str], Set[str]]) -> list[str]:
    """Returns the objects in a bucket that a path without braces stands for. objects_in: of a folder."""
    if path in objects_in(os.path.dirname(path)):
        return [path]
    if not (wild := _MAGIC.search(path)):
        return []
    folder = os.path.dirname(path[: wild.start()])
    return list(map(os.fspath, epath.Path(folder).glob(path[len(folder) + 1 :])))


def _objects_in(folder: str) -> set[str]:
    """Returns the objects right in a folder of a bucket: one request for all of them."""
    path = epath.Path(folder)
    return set(map(os.fspath, path.iterdir())) if path.is_dir() else set()


def expand_braces(path: str) -> Iterator[str]:
    """Yields the paths that one with braces names, as shells and WebDataset do: {00..12} is a range, as wide
    as its wider end if one begins with 0, and {a,b} names each."""
    if not (braces := _BRACES.search(path)):
        yield path
        return
    first, last, names = braces.groups()
    if names is None:
        width = max(len(first), len(last)) if any(re.match("0.", end) for end in (first, last)) else 0
        low, high = sorted((int(first), int(last)))
        values = (f"{number:0{width}}" for number in range(low, high + 1))
    else:
        values = names.split(",")
    for value in values:
        yield from expand_braces(path[: braces.start()] + value + path[braces.end() :])
