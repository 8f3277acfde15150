"""Sources in a bucket. A folder stands in for it, behind the interface that s3fs and gcsfs have (fsspec)."""

import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from test_formats import parquet, webdataset

from clipmoe_jax.core.stamps import digest
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import open_source, source_stamp


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder whose files are those of s3://b."""

    class S3(DirFileSystem):
        protocol = "s3"

        def __init__(self):
            super().__init__(path=str(tmp_path / "s3"), fs=LocalFileSystem())

    (tmp_path / "s3" / "b").mkdir(parents=True)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: S3())
    return tmp_path / "s3" / "b"


def records(source):
    return [(pair.id, pair.image, pair.captions) for pair in open_source(source)]


@pytest.mark.parametrize(
    "write", [webdataset, lambda folder: parquet(folder, "image")], ids=["tar", "parquet"]
)
def test_bucket_is_read_as_a_folder_is(bucket, tmp_path, write):
    (bucket / "pairs" / "one").mkdir(parents=True)
    (_, (source, *_)) = write(bucket / "pairs" / "one")
    kind, suffix = (
        source.partition(":")[0],
        {"webdataset": "tar", "parquet": "parquet"}[source.partition(":")[0]],
    )
    folder = f"{kind}:s3://b/pairs"
    on_disk = records(f"{kind}:{bucket}/pairs")
    assert len(on_disk) == 3 and records(folder) == on_disk
    for path in ("s3://b/pairs/one", f"s3://b/pairs/one/*.{suffix}", f"s3://b/pairs/*/*.{suffix}"):
        assert records(f"{kind}:{path}") == records(f"{kind}:{bucket}{path.removeprefix('s3://b')}"), path
    prepare(open_source(folder), tmp_path / "out")
    assert len(Records(tmp_path / "out", "train")) == 3
    assert digest("s3://b/pairs") == digest(bucket / "pairs")
    before = source_stamp(folder)
    (bucket / "pairs" / "one" / "notes.txt").write_text("not read")
    assert source_stamp(folder) == before
    file = next((bucket / "pairs" / "one").glob(f"*.{suffix}"))
    file.write_bytes(file.read_bytes() + bytes(512))
    assert source_stamp(folder) != before != source_stamp("folder:s3://b/pairs")


def test_braces_name_objects(bucket):
    webdataset(bucket)
    source = "webdataset:s3://b/{00000..00001}.tar"
    assert records(source) == records(f"webdataset:{bucket}/{{00000..00001}}.tar")
    before = source_stamp(source)
    (bucket / "00001.tar").unlink()
    assert source_stamp(source) != before
    with pytest.raises(FileNotFoundError, match=r"has no s3://b/00001.tar: put it there, or leave it out"):
        open_source(source)
    with pytest.raises(FileNotFoundError, match=r"source webdataset:s3://b/nothing has no .tar file"):
        open_source("webdataset:s3://b/nothing")


def test_connection_that_is_lost_is_no_damaged_shard(bucket, monkeypatch):
    webdataset(bucket)
    source = open_source("webdataset:s3://b/00000.tar")

    def lost(*args, **kwargs):
        raise OSError("connection reset")

    monkeypatch.setattr(LocalFileSystem, "open", lost)
    with pytest.raises(OSError, match="connection reset"):
        list(source)


def test_bucket_that_cannot_be_read_is_told_in_one_line(bucket, monkeypatch):
    def denied(*args, **kwargs):
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(LocalFileSystem, "isdir", denied)
    for use in (open_source, source_stamp):
        with pytest.raises(
            ValueError, match=r"webdataset:s3://x: its bucket cannot be read: Unable to locate"
        ):
            use("webdataset:s3://x")
