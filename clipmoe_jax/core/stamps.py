"""Tells whether files are the ones that they were: by sizes and times, by contents, by the place that a path
names. Hidden files, whose names begin with a dot, never count."""

import hashlib
import os
import re
from collections.abc import Iterator

from etils import epath

from clipmoe_jax.core.checks import check_not_sparse
from clipmoe_jax.core.paths import in_bucket

BLOCK = 1 << 20  # bytes read at a time


def canonical(path: os.PathLike | str) -> str:
    """Returns the one spelling of a path: absolute, without links, `..` and `~`; a bucket's as it is."""
    path = os.fspath(path)
    return path.rstrip("/") if in_bucket(path) else os.path.realpath(os.path.expanduser(path))


def files_under(folder: os.PathLike | str, follow_links: bool = True) -> Iterator[os.DirEntry]:
    """Yields the files in a folder on a disk and its subfolders, but hidden ones, in no order.

    follow_links: also those in linked folders, but for links back to a folder above; False yields the links
    themselves.
    """
    waiting = [(os.fspath(folder), frozenset())]  # folders, and what lies above each
    while waiting:
        path, above = waiting.pop()
        real = os.path.realpath(path) if follow_links else path
        if real in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=follow_links):
                    waiting.append((entry.path, above | {real}))
                else:
                    yield entry


def stamp(*paths: os.PathLike | str, names: str = "", follow_links: bool = True) -> str:
    """Returns a text that changes when files do; "" if there are none.

    Of one file it is "SIZE TIME" (nanoseconds); of a folder, of several files, or of what lies in a bucket,
    a hash of all names, sizes and times, for which the folder is gone through once. S3 tells no times.

    names: a regular expression, found in the names of those files of folders that count, in any case.
    follow_links: as of `files_under`.
    """
    if len(paths) == 1 and os.path.isfile(paths[0]):
        return _size_and_time(os.stat(paths[0]))
    lines = []
    for i, path in enumerate(paths):
        if in_bucket(path):
            for name, item in named_files(epath.Path(path)):
                if not name or re.search(names, name, re.IGNORECASE):
                    status = item.stat()
                    lines.append(f"{i} {name or item.name} {status.length} {status.mtime}")
        elif os.path.isdir(path):
            files = files_under(path, follow_links)
            counting = (entry for entry in files if re.search(names, entry.name, re.IGNORECASE))
            lines += [f"{i} {_name_below(path, entry)} {_described(entry)}" for entry in counting]
        elif os.path.isfile(path):
            lines.append(f"{i} {os.path.basename(path)} {_size_and_time(os.stat(path))}")
    return hashlib.sha256(_encoded("\n".join(sorted(lines)))).hexdigest()[:16] if lines else ""


def digest(*paths: os.PathLike | str) -> str:
    """Returns a hash of the contents of files and folders, and of the names in these; "" if nothing is there.

    Copies and renamed folders have the same. All of it is read. Raises ValueError for a large file that is
    mostly holes.
    """
    files = [file for path in paths for file in named_files(epath.Path(path))]
    if not files:
        return ""
    for _, path in files:
        check_not_sparse(path)
    whole = hashlib.sha256()
    for name, path in files:
        of_file = hashlib.sha256(_encoded(name))
        with path.open("rb") as opened:
            while block := opened.read(BLOCK):
                of_file.update(block)
        whole.update(of_file.digest())
    return whole.hexdigest()[:16]


def named_files(path: epath.Path) -> list[tuple[str, epath.Path]]:
    """Returns (name below the path, file) of a file or of all files in a folder, in the order of names."""
    if not path.is_dir():
        return [("", path)] if path.exists() else []
    if not in_bucket(path):
        files = (entry for entry in files_under(path) if entry.is_file())  # no link to nothing
        return sorted((_name_below(path, entry), epath.Path(entry.path)) for entry in files)
    shown = sorted(item for item in path.iterdir() if not item.name.startswith("."))
    # The name below a file itself is "".
    return [(f"{item.name}/{name}".rstrip("/"), file) for item in shown for name, file in named_files(item)]


def _name_below(folder: os.PathLike | str, entry: os.DirEntry) -> str:
    return entry.path[len(os.path.join(folder, "")) :]


def _described(entry: os.DirEntry) -> str:
    try:
        return _size_and_time(entry.stat())
    except OSError:  # a link to nothing
        return "gone"


def _size_and_time(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
