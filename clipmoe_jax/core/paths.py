"""What differs between a folder on a disk and one in a bucket ("gs://…"), which etils.epath reads and writes
alike: a bucket's objects are written whole, one by one; nothing is renamed at once or added to."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


def in_bucket(path: os.PathLike | str) -> bool:
    """Whether it names an object store's folder or object."""
    return "://" in os.fspath(path)


def absolute(path: os.PathLike | str) -> epath.Path:
    """A disk's path from its root; a bucket's as it is (`resolve` puts the working directory before it)."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


@contextlib.contextmanager
def written_whole(path: epath.Path) -> Iterator[epath.Path]:
    """Where to write a file that is to appear at `path` whole or not at all."""
    if in_bucket(path):
        try:
            yield path
        except BaseException:  # an object that is closed is there, whole or not
            path.unlink(missing_ok=True)
            raise
        return
    temporary = path.parent / f"{path.name}.tmp"
    yield temporary
    temporary.replace(path)
