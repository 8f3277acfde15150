"""Damage in each format: the entry is named, what is around it is read, and nothing is lost unseen."""

import json
import struct
import tarfile
import time

import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from test_formats import CAPTIONS, add, kinds, picture, prepared_by_tfds, write_tfds

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
    assert "a.tar after 0.txt, byte 1,536: cut off or damaged at byte 2,560" in bad.detail


def joined(folder, *names):
    """Shards of a sample for each name, as `cat` joins them."""
    contents = b""
    for name in names:
        with tarfile.open(folder / "part", "w") as tar:
            add(tar, f"{name}.jpg", name.encode())
            add(tar, f"{name}.txt", b"text")
        contents += (folder / "part").read_bytes()
    (folder / "a.tar").write_bytes(contents)
    return contents


def test_shards_joined_by_cat_are_read_to_the_end(tmp_path):
    contents = joined(tmp_path, "0", "1", "2")
    source = open_source(f"webdataset:{tmp_path}")
    assert kinds(source) == ["a/0", "a/1", "a/2"] and len(source) == 3
    size = len(contents) // 3
    (tmp_path / "a.tar").write_bytes(contents[: 2 * size + 700])  # cut in the image of the third
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["a/0", "a/1", "damaged shard"]
    (tmp_path / "a.tar").write_bytes(contents[:size] + b"no header" + bytes(503) + contents[size:])
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["a/0", "damaged shard"]
    (tmp_path / "a.tar").write_bytes(contents[:size] + bytes(700))  # what fills up a tape's record
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["a/0"]


def test_samples_of_one_key_are_duplicates_also_where_they_follow_each_other(tmp_path):
    joined(tmp_path, "0", "0", "1")
    source = open_source(f"webdataset:{tmp_path}")
    assert kinds(source) == ["a/0", "duplicate id", "a/1"] and len(source) == 3
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.JPG", "0.txt"):
            add(tar, name, name.encode())
    assert list(kinds(open_source(f"webdataset:{tmp_path}"))) == ["missing caption", "a/0"]


def test_each_image_of_a_sample_is_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.png", "0.jpg", "0.seg.png", "0.txt"):
            add(tar, name, name.encode())
        for i in range(3):  # the key is "photo"
            add(tar, f"photo.{i}.jpg", b"image")
            add(tar, f"photo.{i}.txt", b"text")
    source = open_source(f"webdataset:{tmp_path}")
    good, *bad = source
    assert good == Pair("a/0", b"0.jpg", ("0.txt",)) and len(source) == 5
    assert [record.id for record in bad] == ["a/0.png", "a/photo", "a/photo.1.jpg", "a/photo.2.jpg"]
    assert {record.kind for record in bad} == {"several images", "missing caption"}


def test_links_in_a_shard_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, kinds_of_member in enumerate(
            ((tarfile.REGTYPE, tarfile.LNKTYPE), (tarfile.SYMTYPE, tarfile.REGTYPE), 2 * (tarfile.LNKTYPE,))
        ):
            for suffix, kind in zip(("jpg", "txt"), kinds_of_member, strict=True):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.type, member.linkname = kind, "elsewhere"
                tar.addfile(member)
        member = tarfile.TarInfo("folder.d")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    source = open_source(f"webdataset:{tmp_path}")
    assert kinds(source) == ["not a file", "empty caption", "not a file"] and len(source) == 3


def test_header_of_any_size_is_damage(tmp_path):
    joined(tmp_path, "0")
    (tmp_path / "b.tar").write_bytes(huge_long_name())
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["a/0", "damaged shard"]


def huge_long_name():
    """A header of a name of 2^60 bytes."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**60
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


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
        for name in ("README", "._0.jpg", ".DS_Store", ".trash/1.jpg", "./0.jpg", "./0.txt"):
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


@pytest.mark.parametrize("index_type", ["int32", "int64"])
def test_one_invalid_caption_in_a_dictionary_of_parquet_is_found(tmp_path, index_type):
    indices = pyarrow.array([0, 1], index_type)
    captions = pyarrow.DictionaryArray.from_arrays(indices, invalid_text())
    table = pyarrow.table({"image": [b"a", b"b"], "caption": captions})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert kinds(open_source(f"parquet:{tmp_path}")) == ["invalid text", "x.parquet:1"]


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
    found = read_table(tmp_path, b'filepath\ttitle\na.png\ttext\nb.png\t"open\nc.png\tread\n')
    assert found == [("a.png", "text"), ("line 3", "malformed entry"), ("c.png", "read")]
    name = 40 * "././" + "b.png"
    rows = f"{name}\ttext\n".encode() * 1000  # more than csv takes as one cell
    found = read_table(tmp_path, b'filepath\ttitle\na.png\t"open\n' + rows + b"c.png\ttext\n")
    assert found == [("line 2", "malformed entry"), (name, *1000 * ["text"]), ("c.png", "text")]


def test_captions_with_commas_must_be_quoted_in_a_table_with_commas(tmp_path):
    found = read_table(tmp_path, b'image,caption\na.png,a red car, in the snow\nb.png,"a, b"\nc.png,text,\n')
    assert found == [("line 2", "malformed entry"), ("b.png", "a, b"), ("c.png", "text")]
    found = read_table(tmp_path, b'image,caption\na.png,text\nb.png,"open\nc.png,read\n')
    assert found == [("a.png", "text"), ("line 3", "malformed entry"), ("c.png", "read")]
    found = read_table(tmp_path, b'image,caption\na.png,"open\nb.png,"text"\nc.png,"two\nlines"\n')
    assert found == [("line 2", "malformed entry"), ("b.png", "text"), ("c.png", "two\nlines")]
    found = read_table(tmp_path, b"image|caption\na.png|x | y\nb.png|text\n")
    assert found == [("line 2", "malformed entry"), ("b.png", "text")]


def test_quote_that_closes_in_a_later_row_takes_in_no_row(tmp_path):
    rows = b'image,caption\na.png,"open\nb.png,text\nc.png,x"\n'
    assert read_table(tmp_path, rows) == [("line 2", "malformed entry"), ("b.png", "text"), ("c.png", 'x"')]
    rows = b'caption,image\n"open,a.png\ntext,b.png\n"x",c.png\n'
    assert read_table(tmp_path, rows) == [("line 2", "malformed entry"), ("b.png", "text"), ("c.png", "x")]
    rows = b'image,caption\na.png,"two lines,\nthe second, has commas"\nb.png,"three\n\nlines, at last"\n'
    captions = ("two lines,\nthe second, has commas", "three\n\nlines, at last")
    assert read_table(tmp_path, rows) == list(zip(("a.png", "b.png"), captions, strict=True))
    rows = b'image,caption,source\na.png,text,"open\nb.png,text,x\nc.png,text,y"\n'
    assert read_table(tmp_path, rows) == [
        ("line 2", "malformed entry"), ("b.png", "text"), ("c.png", "text")
    ]  # fmt: skip


@pytest.mark.parametrize(("line", "count"), [('b"\t"y', 3000), ('a",b,"c', 10_000)])
def test_quotes_that_never_close_are_not_looked_for_to_the_end(tmp_path, line, count):
    header = "filepath\ttitle" if "\t" in line else "image,caption,source"
    start = time.perf_counter()
    found = read_table(tmp_path, "\n".join([header, *count * [line], ""]).encode())
    assert len(found) == count and {kind for _, kind in found[:2000]} == {"malformed entry"}
    assert time.perf_counter() - start < 5  # 9 s to the end


def test_a_caption_of_a_table_has_a_limited_number_of_lines(tmp_path):
    def rows(lines):
        return b'image,caption\na.png,"' + lines * b"text\n" + b'"\nb.png,text\n'

    assert [found[0] for found in read_table(tmp_path, rows(199))] == ["a.png", "b.png"]
    found = read_table(tmp_path, rows(200))
    assert found[0] == ("line 2", "malformed entry") and found[-1] == ("b.png", "text")


def test_unusable_rows_do_not_part_the_captions_of_an_image(tmp_path):
    found = read_table(tmp_path, b"a.png#0\tx\nbroken\na.png#1\ty\nb.png#0\tz\n", "flickr30k")
    assert found == [("a.png", "x", "y"), ("line 2", "malformed entry"), ("b.png", "z")]


def test_rows_without_an_image_are_counted_one_by_one(tmp_path):
    missing = [("line 2", "missing image"), ("line 3", "missing image")]
    assert read_table(tmp_path, b"image,caption\n,x\n,y\na.png,z\n") == [*missing, ("a.png", "z")]
    found = read_table(tmp_path, b"a.png#0\tx\nb.png\ty\nc.png\tz\n", "flickr30k")
    assert found == [("a.png", "x"), *missing]


def test_joined_lines_are_told(tmp_path):
    """As `cat` makes them of files that do not end with the end of a line."""
    found = read_table(tmp_path, b"a.png#0\tx\nb.png#0\tyc.png#0\tz\n", "flickr30k")
    assert found == [("a.png", "x"), ("line 2", "malformed entry")]
    turns = '{"image": "%s", "conversations": [{"from": "gpt", "value": "} {"}]}'
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"image")
    (tmp_path / "x.jsonl").write_text(turns % "a.png" + turns % "b.png" + "\n" + turns % "a.png" + '{"half')
    found = kinds(open_source(f"sharegpt4v:{tmp_path / 'x.jsonl'}", str(tmp_path)))
    assert found == ["a.png", "b.png", "duplicate id", "malformed entry"]


def test_columns_of_one_name_are_refused(tmp_path):
    columns = [pyarrow.array([b"a"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    table = pyarrow.Table.from_arrays(columns, names=["image", "caption", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet has 2 columns 'caption': rename or remove all but one"):
        open_source(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match="table has 2 columns 'caption': rename"):
        read_table(tmp_path, b"image,caption,Caption\na.png,x,y\n")


def test_parquet_files_joined_by_cat_are_refused(tmp_path):
    """Their last rows would count, and the first would be read in place of them."""
    contents = b""
    for i in range(2):
        table = pyarrow.table({"image": [bytes([i])], "caption": [f"text {i}"]})
        pyarrow.parquet.write_table(table, tmp_path / "part")
        contents += (tmp_path / "part").read_bytes()
    (tmp_path / "x.parquet").write_bytes(contents)
    with pytest.raises(ValueError, match="x.parquet is several Parquet files in one: give them as files"):
        open_source(f"parquet:{tmp_path}")


def test_a_replacement_character_is_text(tmp_path):
    assert read_table(tmp_path, "filepath\ttitle\na.png\t\ufffd\n".encode()) == [("a.png", "\ufffd")]


def test_captions_of_no_image_in_coco_are_bad_records(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image")
    annotations = [{"image_id": i, "caption": f"of {i}"} for i in (1, 2, 2)]
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": annotations}
    (tmp_path / "x.json").write_text(json.dumps(content))
    good, bad = open_source(f"coco:{tmp_path / 'x.json'}", str(tmp_path))
    assert good == Pair("a.png", b"image", ("of 1",)) and bad.kind == "missing image"


def test_images_of_one_id_or_one_name_in_coco_are_counted(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"image")
    images = [{"id": i, "file_name": name} for i, name in ((1, "a.png"), (1, "b.png"), (2, "a.png"))]
    annotations = [{"image_id": i, "caption": f"of {i}"} for i in (1, 2, 1)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    source = open_source(f"coco:{tmp_path / 'x.json'}", str(tmp_path))
    assert kinds(source) == ["a.png", "missing caption", "duplicate id"] and len(source) == 3


def test_an_entry_of_no_split_is_not_left_out_unseen(tmp_path):
    entries = [
        {"filename": "a.png", "split": "test", "sentences": []},
        {"filename": "b.png", "sentences": []},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"images": entries}))
    assert len(open_source(f"coco:{tmp_path / 'x.json'}", str(tmp_path))) == 2
    with pytest.raises(ValueError, match="neither COCO's captions nor Karpathy's splits: KeyError..split"):
        open_source(f"coco:{tmp_path / 'x.json'}#test", str(tmp_path))


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


def flipped(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def test_flipped_bits_of_a_tfrecord_are_told(tmp_path):
    """In the data and its checksum one record is bad; in a length the rest of the file cannot be found."""
    _, (spec, _, _) = prepared_by_tfds(tmp_path, "tfrecord")
    path = next(tmp_path.rglob("*.tfrecord-*"))
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    for byte in (12, 11 + length, 12 + length, 15 + length):
        flipped(path, byte)
        bad = next(iter(open_source(spec)))
        assert bad.kind == "damaged record" and f"{length:,} bytes from 12 in {path}" in bad.detail
        flipped(path, byte)
    for byte in (0, 7, 8, 11):
        flipped(path, byte)
        with pytest.raises(ValueError, match="tfrecord-.* is damaged at byte 0: fetch or prepare it again"):
            open_source(spec)
        flipped(path, byte)
    assert len(kinds(open_source(spec))) == 3


def labelled(folder, numbers, **names):
    """A data set of TFDS whose images have the labels of these numbers."""
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(**names)}
    examples = [{"image": picture(number + 1), "label": number} for number in numbers]
    return f"tfds:{write_tfds(folder, features, examples)}?caption=label&split=val"


@pytest.mark.parametrize("names", [{"names": ["cat", "dog"]}, {"num_classes": 2}], ids=["names", "numbers"])
def test_unknown_labels_are_bad_records(tmp_path, names):
    source = open_source(labelled(tmp_path, [0, -1, 1], **names))
    cat, unknown, dog = source
    expected = names.get("names", ["0", "1"])
    assert [cat.captions, dog.captions] == [(name,) for name in expected]
    assert unknown.kind == "unknown label" and "-1 is none of the 2 classes" in unknown.detail


def test_file_that_lacks_records_is_refused(tmp_path):
    _, (spec, _, _) = prepared_by_tfds(tmp_path, "tfrecord")
    path = next(tmp_path.rglob("*.tfrecord-*"))
    contents = path.read_bytes()
    first = 16 + struct.unpack("<Q", contents[:8])[0]
    path.write_bytes(contents[:first])  # cut between two records
    with pytest.raises(
        ValueError, match="tfrecord-.* has 1 records, its data set says 3: prepare that again"
    ):
        open_source(spec)


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_splits_of_tfds_may_be_sums(tmp_path, form):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "a+b", form)
    part = open_source(spec.replace("split=val", "split=val[:1]+val[2:]"))
    assert [record.captions for record in part] == [tuple(CAPTIONS[0]), tuple(CAPTIONS[2])]
    for wrong in ("train", "val+train", "val[:1", "[:1]", "val[2:1]"):
        with pytest.raises(ValueError, match="has no split '.*': set split= to parts of .'val'."):
            open_source(spec.replace("split=val", f"split={wrong}"))
