"""Differences between a folder on a disk and one in a bucket ("gs://…").

etils.epath reads and writes both. But a bucket writes whole objects, one by one: it cannot append to one, nor
rename a folder in one step.
"""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


def in_bucket(path: os.PathLike | str) -> bool:
    """Returns whether a path names a folder or object in an object store."""
    return "://" in os.fspath(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """Returns a path on a disk made absolute; a bucket's is returned as it is.

    `resolve` would put the working directory before it.
    """
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


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
    yield temporary
    temporary.replace(path)
