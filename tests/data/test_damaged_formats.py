"""Damage in each format: the entry is named, what is around it is read, and nothing is lost unseen."""

import json
import struct
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from test_formats import add, kinds, prepared_by_tfds

from clipmoe_jax.data.sources import BadRecord, Pair, open_source


def shard(path, num_samples):
    """Samples of 2,560 bytes: jpg header 512 and contents 1,024 with padding, txt header 512 and 512."""
    with tarfile.open(path, "w") as tar:
        for i in range(num_samples):
            add(tar, f"{i}.jpg", bytes(600))
            add(tar, f"{i}.txt", b"text")


@pytest.mark.parametrize(
    ("size", "whole"),
    [
        pytest.param(2560, 1, id="between samples"),
        pytest.param(2560 + 100, 1, id="in a header"),
        pytest.param(2560 + 512, 1, id="after a header"),
        pytest.param(2560 + 700, 1, id="in an image"),
        pytest.param(2560 + 1536, 1, id="between an image and its caption"),
        pytest.param(2560 + 2048 + 2, 1, id="in a caption"),
        pytest.param(3 * 2560, 3, id="before the end mark"),
        pytest.param(100, 0, id="in the first header"),
        pytest.param(0, 0, id="empty"),
    ],
)
def test_a_cut_shard_gives_its_whole_samples_and_one_bad_record(tmp_path, size, whole):
    shard(tmp_path / "a.tar", 3)
    shard(tmp_path / "b.tar", 1)
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:size])
    source = open_source(f"webdataset:{tmp_path}")
    assert kinds(source) == [*(f"a/{i}" for i in range(whole)), "damaged shard", "b/0"]
    assert len(source) == whole + 2


def test_a_damaged_header_is_not_the_end_of_a_shard(tmp_path):
    shard(tmp_path / "a.tar", 3)
    contents = bytearray((tmp_path / "a.tar").read_bytes())
    contents[2560:2660] = b"\x99" * 100
    (tmp_path / "a.tar").write_bytes(contents)
    good, bad = open_source(f"webdataset:{tmp_path}")
    assert good.id == "a/0" and bad.kind == "damaged shard"
    assert "a.tar at byte 2,560" in bad.detail


def test_files_of_one_name_in_two_folders_have_different_ids(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "0.tar", 1)
        table = pyarrow.table({"image": [b"image"], "text": ["text"]})
        pyarrow.parquet.write_table(table, tmp_path / folder / "0.parquet")
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["x/0/0", "y/0/0"]
    assert kinds(open_source(f"webdataset:{tmp_path}/*/[0-9].tar")) == ["x/0/0", "y/0/0"]
    assert kinds(open_source(f"parquet:{tmp_path}")) == ["x/0.parquet:0", "y/0.parquet:0"]


def test_members_of_no_sample_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("README", "._0.jpg", ".DS_Store", "0.jpg", "0.txt"):
            add(tar, name, b"contents")
    assert list(open_source(f"webdataset:{tmp_path}")) == [Pair("a/0", b"contents", ("contents",))]


def test_json_too_deep_to_parse_is_a_bad_record(tmp_path):
    deep = "[" * 200_000
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, contents in (("0.jpg", "x"), ("0.json", deep), ("1.jpg", "x"), ("1.txt", "text")):
            add(tar, name, contents.encode())
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["malformed entry", "a/1"]
    (tmp_path / "x.jsonl").write_text(f"{deep}\n")
    assert kinds(open_source(f"sharegpt4v:{tmp_path / 'x.jsonl'}", str(tmp_path))) == ["malformed entry"]
    (tmp_path / "0.jpg").write_bytes(b"x")
    (tmp_path / "0.json").write_text(deep)
    assert kinds(open_source(f"img2dataset:{tmp_path}")) == ["malformed entry"]


def invalid_text():
    """Arrow does not check text: ["\\xff\\xfe", "good"] as a file may hold it."""
    offsets = pyarrow.py_buffer(struct.pack("<3i", 0, 2, 6))
    return pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"\xff\xfegood"))


@pytest.mark.parametrize("form", ["text", "list"])
def test_one_invalid_caption_of_parquet_is_one_bad_record(tmp_path, form):
    captions = invalid_text()
    if form == "list":
        captions = pyarrow.ListArray.from_arrays([0, 1, 2], captions)
    table = pyarrow.table({"image": [b"a", b"b"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    bad, good = open_source(f"parquet:{tmp_path}")
    assert bad.kind == "invalid text" and good == Pair("x.parquet:1", b"b", ("good",))


@pytest.mark.parametrize(
    ("index_type", "expected"),
    [
        ("int32", ["invalid text", "x.parquet:1"]),
        # pyarrow converts these indices, checks the text as it does, and reads no row of the row group.
        ("int64", ["damaged row", "damaged row"]),
    ],
)
def test_one_invalid_caption_in_a_dictionary_of_parquet_is_found(tmp_path, index_type, expected):
    indices = pyarrow.array([0, 1], index_type)
    captions = pyarrow.DictionaryArray.from_arrays(indices, invalid_text())
    table = pyarrow.table({"image": [b"a", b"b"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert kinds(open_source(f"parquet:{tmp_path}")) == expected


@pytest.mark.parametrize("index_type", ["int8", "int32", "int64"])
def test_dictionaries_of_parquet_are_read_as_text(tmp_path, index_type):
    captions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([1, 0], index_type), ["one", "two"])
    table = pyarrow.table({"image": [b"a", b"b"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert [record.captions for record in open_source(f"parquet:{tmp_path}")] == [("two",), ("one",)]


def test_damaged_row_group_of_parquet_ends_at_the_next(tmp_path):
    path = tmp_path / "x.parquet"
    table = {"image": [bytes([i]) * 5000 for i in range(20)], "caption": ["text"] * 20}
    pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=5)
    column = pyarrow.parquet.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    contents = bytearray(path.read_bytes())
    contents[start : start + 40] = b"\xff" * 40
    path.write_bytes(contents)
    source = open_source(f"parquet:{path}")
    expected = [f"x.parquet:{i}" if not 5 <= i < 10 else "damaged row" for i in range(20)]
    assert kinds(source) == expected and len(source) == 20


def test_hugging_face_images_outside_the_file_need_the_folder(tmp_path):
    images = [{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.png"}, {"bytes": None, "path": None}]
    pyarrow.parquet.write_table(
        pyarrow.table({"image": images, "text": 3 * ["text"]}), tmp_path / "x.parquet"
    )
    (tmp_path / "b.png").write_bytes(b"b")
    assert kinds(open_source(f"parquet:{tmp_path}")) == ["x.parquet:0", "missing image", "missing image"]
    assert [record.image for record in list(open_source(f"parquet:{tmp_path}", str(tmp_path)))[:2]] == [
        b"a",
        b"b",
    ]


def test_paths_in_parquet_need_the_folder_from_the_start(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"], "text": ["text"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="holds paths of images in 'path': add .images=DIR"):
        open_source(f"parquet:{tmp_path}")


def read_table(tmp_path, text, kind="csv"):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(b"image")
    (tmp_path / "table").write_bytes(text)
    source = open_source(f"{kind}:{tmp_path / 'table'}", str(tmp_path))
    records = list(source)
    assert len(source) == len(records)
    return [
        record[:2] if isinstance(record, BadRecord) else (record.id, *record.captions) for record in records
    ]


def test_short_rows_of_a_table_are_bad_and_blank_ones_are_none(tmp_path):
    found = read_table(tmp_path, b"filepath\ttitle\na.png\nb.png\n\nc.png\ttext\n\n")
    assert found == [("line 2", "malformed entry"), ("line 3", "malformed entry"), ("c.png", "text")]
    found = read_table(tmp_path, b"a.png#1\tx\r\na.png#0\ty\n\nbroken\nb.png#0\tz\n", "flickr30k")
    assert found == [("a.png", "x", "y"), ("line 4", "malformed entry"), ("b.png", "z")]


def test_quotes_in_a_table_open_and_close(tmp_path):
    found = read_table(tmp_path, b'filepath\ttitle\na.png\t"Oh" he said\nb.png\ta "big" dog\nc.png\t"1\t2"\n')
    assert found == [("a.png", "Oh he said"), ("b.png", 'a "big" dog'), ("c.png", "1\t2")]
    found = read_table(tmp_path, b'filepath\ttitle\na.png\ttext\nb.png\t"open\nc.png\tlost\n')
    assert found == [("a.png", "text"), ("line 4", "malformed entry")]
    rows = b"b.png\ttext\n" * 20_000  # more than csv takes as one cell
    found = read_table(tmp_path, b'filepath\ttitle\na.png\t"open\n' + rows + b"c.png\ttext\n")
    assert found[0][1] == "malformed entry" and found[-1] == ("c.png", "text")


def test_captions_with_commas_must_be_quoted_in_a_table_with_commas(tmp_path):
    found = read_table(tmp_path, b'image,caption\na.png,a red car, in the snow\nb.png,"a, b"\nc.png,text,\n')
    assert found == [("line 2", "malformed entry"), ("b.png", "a, b"), ("c.png", "text")]
    found = read_table(tmp_path, b'image,caption\na.png,text\nb.png,"open\nc.png,lost\n')
    assert found == [("a.png", "text"), ("line 4", "malformed entry")]
    found = read_table(tmp_path, b'image,caption\na.png,"open\nb.png,"text"\nc.png,"two\nlines"\n')
    assert found == [("line 3", "malformed entry"), ("c.png", "two\nlines")]
    found = read_table(tmp_path, b"image|caption\na.png|x | y\nb.png|text\n")
    assert found == [("line 2", "malformed entry"), ("b.png", "text")]


def test_a_replacement_character_is_text(tmp_path):
    assert read_table(tmp_path, "filepath\ttitle\na.png\t\ufffd\n".encode()) == [("a.png", "\ufffd")]


def test_captions_of_no_image_in_coco_are_bad_records(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image")
    annotations = [{"image_id": i, "caption": f"of {i}"} for i in (1, 2, 2)]
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": annotations}
    (tmp_path / "x.json").write_text(json.dumps(content))
    good, bad = open_source(f"coco:{tmp_path / 'x.json'}", str(tmp_path))
    assert good == Pair("a.png", b"image", ("of 1",)) and bad.kind == "missing image"


def test_an_empty_coco_is_empty(tmp_path):
    (tmp_path / "x.json").write_text('{"images": [], "annotations": []}')
    assert len(open_source(f"coco:{tmp_path / 'x.json'}", str(tmp_path))) == 0


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_tfds_features_are_checked_at_the_start(tmp_path, form):
    _, (spec, _, _) = prepared_by_tfds(tmp_path, form)
    for wrong in ("captions/nope", "captions"):
        with pytest.raises(
            ValueError, match=f"no feature '{wrong}': set caption= to one of .*'captions/text'"
        ):
            open_source(spec.replace("captions/text", wrong))


def test_damaged_records_of_tfds_are_bad_records(tmp_path):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "tfrecord", "tfrecord")
    path = next(tmp_path.rglob("*.tfrecord-*"))
    contents = bytearray(path.read_bytes())
    contents[12:40] = b"\xff" * 28  # past the first record's length and checksum
    path.write_bytes(contents)
    assert kinds(open_source(spec)) == ["damaged record", "val:1", "val:2"]

    _, (spec, _, _) = prepared_by_tfds(tmp_path / "array_record", "array_record")
    path = next(tmp_path.rglob("*.array_record-*"))
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2 : len(contents) // 2 + 60] = b"\xff" * 60
    path.write_bytes(contents)
    assert "damaged record" in kinds(open_source(spec))
