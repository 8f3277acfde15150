"""Differences between a folder on a disk and one in a bucket ("gs://…").

etils.epath reads and writes both. But a bucket writes whole objects, one by one: it cannot append to one, nor
rename a folder in one step.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterator

from etils import epath

_Path = type(epath.Path())
_glob = _Path.glob


def _glob_in_folder(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """Yields what matches a pattern in a folder, as pathlib's `glob` does.

    That of etils takes brackets in the folder's own name ("lr[1e-3]") for a pattern. Orbax and TFDS call it,
    too, and miss their files in such a folder.
    """
    if in_bucket(self):
        yield from _glob(self, pattern)
    else:
        yield from map(_Path, glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


type.__setattr__(_Path, "glob", _glob_in_folder)


def in_bucket(path: os.PathLike | str) -> bool:
    """Returns whether a path names a folder or object in an object store."""
    return "://" in os.fspath(path)


def check_plain_file(path: os.PathLike | str) -> None:
    """Raises ValueError for a device or a pipe, which may be read for ever. Links are followed: caches of
    downloads have them."""
    # Not epath's `is_file`, which takes a pipe for one.
    if not in_bucket(path) and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is not a plain file")


def check_plain_folder(folder: os.PathLike | str) -> None:
    """Raises ValueError for the first link, pipe or device below a folder that a program reads and writes.

    Through a link a stranger's folder would have files elsewhere read, overwritten or deleted. The folder
    itself may be one. A run that goes on may delete others meanwhile.
    """
    waiting = [] if in_bucket(folder) else [os.fspath(folder)]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    kind = "a link" if entry.is_symlink() else "a pipe or a device"
                    raise ValueError(f"{entry.path} is {kind}: delete it, or put there what it stands for")


def absolute(path: os.PathLike | str) -> epath.Path:
    """Returns a path on a disk made absolute; a bucket's is returned as it is.

    `resolve` would put the working directory before it.
    """
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def with_home(text: str) -> str:
    """Returns a path with a leading `~` or `~user` replaced by the home folder.

    Also the paths of a line such as "folder:~/pairs?images=~/images" or "--out=~/set", which shells leave as
    they are. Raises ValueError if the home folder is not known.
    """

    def expand(match: re.Match) -> str:
        expanded = os.path.expanduser(match[0])
        if expanded.startswith("~/") or expanded == "~":
            raise ValueError(f"{text}: the home folder is not known: set HOME, or write the whole path")
        return expanded

    return re.sub(r"(?:^|(?<=[:=]))~[^/?&,:=]*(?=[/?&,]|$)", expand, text)


@contextlib.contextmanager
def written_whole(path: epath.Path) -> Iterator[epath.Path]:
    """Yields the path to write a file to that must appear at `path` whole or not at all."""
    if in_bucket(path):
        try:
            yield path
        except BaseException:  # closing an object makes it appear, whole or not
            path.unlink(missing_ok=True)
            raise
        return
    temporary = path.parent / f"{path.name}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # of a killed process, or a link through which another file would be written
    yield temporary
    temporary.replace(path)
