"""A repository of the hub in the cache, as its library lays it: refs, snapshots of links, blobs."""

import hashlib
import shutil

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache, repository, *files):
    """Puts files into a cache as a repository's; returns the folder of the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for needed in (snapshot, folder / "blobs", folder / "refs"):
        needed.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot
