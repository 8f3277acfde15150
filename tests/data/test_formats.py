"""Every format round trip: files of exactly that format, prepared, read by index, the same pixels and text.
What is bad about them is counted.
"""

import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import fuzz
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import BadRecord, Pair, open_source
from clipmoe_jax.data.sources import parquet as parquet_source
from clipmoe_jax.data.sources.base import entries_from


def picture(i, format="PNG"):
    """An image file that no other number has."""
    pixels = np.random.default_rng(i).integers(0, 256, (12 + i, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


CAPTIONS = [["a red cube", "the cube is red"], ["café, two “tables”", "tables"], ["three", "3 | 4"]]


def write_images(folder):
    (folder / "images").mkdir(exist_ok=True)
    for i in range(3):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
    return str(folder / "images")


def sharegpt4v(folder):
    return "json", conversations(folder, json.dumps(turns()))


def jsonl(folder):
    return "jsonl", conversations(folder, "\n".join(map(json.dumps, turns())) + "\n\n", "x.jsonl")


def turns():
    return [
        {"id": str(i), "image": f"{i}.png", "conversations": [{"from": "gpt", "value": CAPTIONS[i][0]}]}
        for i in range(3)
    ]


def conversations(folder, text, name="x.json"):
    (folder / name).write_text(text, encoding="utf-8")
    return f"sharegpt4v:{folder / name}", write_images(folder), [captions[:1] for captions in CAPTIONS]


def image_folder(folder):
    images = write_images(folder)
    for i, captions in enumerate(CAPTIONS):
        (folder / "images" / f"{i}.txt").write_text("\n".join(captions), encoding="utf-8")
    return "folder", (f"folder:{images}", None, CAPTIONS)


def img2dataset(folder):
    (folder / "00000").mkdir()
    for i, captions in enumerate(CAPTIONS):
        stem = folder / "00000" / f"00000000{i}"
        stem.with_suffix(".jpg").write_bytes(picture(i))
        fields = {"key": f"00000000{i}", "caption": captions[0], "url": "u", "status": "success"}
        stem.with_suffix(".json").write_text(json.dumps(fields))
        if i:
            stem.with_suffix(".txt").write_text(captions[0], encoding="utf-8")
    return "img2dataset", (f"img2dataset:{folder}", None, [captions[:1] for captions in CAPTIONS])


def classes(folder):
    # Sorted by path: the class's own subfolders count, its name alone is the caption.
    for i, name in enumerate(("great shark/a.png", "n0144/val/0.png", "n0144/x.JPEG")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return "classes", (f"classes:{folder}", None, [["great shark"], ["n0144"], ["n0144"]])


def add(tar, name, contents):
    member = tarfile.TarInfo(name)
    member.size = len(contents)
    tar.addfile(member, io.BytesIO(contents))


def webdataset(folder):
    for shard, numbers in (("00000", (0, 1)), ("00001", (2,))):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in numbers:
                add(tar, f"{i:09d}.jpg", picture(i))
                fields = json.dumps({"caption": CAPTIONS[i][0]}).encode()
                add(tar, f"{i:09d}.json", fields)
                if i:
                    add(tar, f"{i:09d}.txt", CAPTIONS[i][0].encode())
    return "webdataset", (f"webdataset:{folder}", None, [captions[:1] for captions in CAPTIONS])


def parquet(folder, column):
    import pyarrow
    import pyarrow.parquet

    images = write_images(folder)
    values = {
        "image": [{"bytes": picture(i), "path": f"{i}.png"} for i in range(3)],
        "image_bytes": [picture(i) for i in range(3)],
        "image_path": [f"{i}.png" for i in range(3)],
    }[column]
    table = pyarrow.table({column: values, "url": ["a", "b", "c"], "captions": CAPTIONS})
    for name, part in (("a", table[:2]), ("b", table[2:])):
        pyarrow.parquet.write_table(part, folder / f"part-{name}.parquet")
    return f"parquet of {column}", (f"parquet:{folder}", images if column == "image_path" else None, CAPTIONS)


def huggingface(folder):
    fuzz.write_huggingface(folder)
    return "huggingface", (f"huggingface:{folder}", None, CAPTIONS)


def coco(folder):
    content = {
        "images": [{"id": 10 - i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [
            {"image_id": 10 - i, "id": 100 + i, "caption": CAPTIONS[i][k]} for k in (0, 1) for i in (2, 0, 1)
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content))
    return "coco", (f"coco:{folder / 'captions.json'}", write_images(folder), CAPTIONS)


def karpathy(folder):
    entries = [
        {
            "filename": f"{i}.png",
            "filepath": ".",
            "split": split,
            "sentences": [{"raw": text} for text in CAPTIONS[i]],
        }
        for i, split in enumerate(("train", "restval", "train"))
    ]
    entries.append({"filename": "3.png", "split": "test", "sentences": []})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return "karpathy", (f"coco:{folder / 'dataset_coco.json'}#train", write_images(folder), CAPTIONS)


def flickr30k(folder, form):
    lines = {
        "token": [f"{i}.png#{k}\t{text}" for i, two in enumerate(CAPTIONS) for k, text in enumerate(two)],
        "bars": ["image_name| comment_number| comment"]
        + [f"{i}.png| {k}| {two[k].replace('|', '/')}" for i, two in enumerate(CAPTIONS) for k in (0, 1)],
        "commas": ["image,caption"] + [f'{i}.png,"{text}"' for i, two in enumerate(CAPTIONS) for text in two],
    }[form]
    (folder / "results").write_text("\n".join(lines) + "\n", encoding="utf-8")
    captions = [[text.replace("|", "/") for text in two] for two in CAPTIONS] if form == "bars" else CAPTIONS
    return f"flickr30k, {form}", (f"flickr30k:{folder / 'results'}", write_images(folder), captions)


def csv(folder):
    rows = [f"{i}.png\t{two[0]}" for i, two in enumerate(CAPTIONS)]
    (folder / "x.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n", encoding="utf-8")
    return "csv", (f"csv:{folder / 'x.tsv'}", write_images(folder), [two[:1] for two in CAPTIONS])


def prepared_by_tfds(folder, form):
    """Nested captions, as coco_captions has them."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "image/filename": tfds.features.Text(),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
    examples = [
        {
            "image": picture(i),
            "image/filename": f"{i}.png",
            "captions": [{"id": k, "text": text} for k, text in enumerate(two)],
        }
        for i, two in enumerate(CAPTIONS)
    ]
    write_tfds(folder, features, examples, form)
    spec = f"tfds:my_captions?data_dir={folder}&split=val&caption=captions/text"
    return f"tfds, {form}", (spec, None, CAPTIONS)


def write_tfds(folder, features, examples, form="array_record"):
    """Writes a data set, its split "val"; returns its version's folder."""
    fuzz.write_tfds(data := folder / "my_captions" / "1.1.0", features, examples, form)
    return data


FORMATS = [
    sharegpt4v,
    jsonl,
    image_folder,
    img2dataset,
    classes,
    webdataset,
    lambda folder: parquet(folder, "image"),
    lambda folder: parquet(folder, "image_bytes"),
    lambda folder: parquet(folder, "image_path"),
    huggingface,
    coco,
    karpathy,
    lambda folder: flickr30k(folder, "token"),
    lambda folder: flickr30k(folder, "bars"),
    lambda folder: flickr30k(folder, "commas"),
    csv,
    lambda folder: prepared_by_tfds(folder, "array_record"),
    lambda folder: prepared_by_tfds(folder, "tfrecord"),
]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_comes_back_from_a_prepared_set(write, tmp_path):
    (tmp_path / "in").mkdir()
    name, (spec, images, captions) = write(tmp_path / "in")
    source = open_source(spec, images)
    assert len(source) == 3, name
    assert list(source) == list(source)
    two = open_source(f"{spec},{spec}", images)
    assert [list(entries_from(two, first)) for first in range(7)] == [list(two)[k:] for k in range(7)]
    report = prepare(source, str(tmp_path / "out"))
    assert report["pairs"] == 3 and report["bad"] == 0, name
    records = Records(str(tmp_path / "out"))
    for i in range(3):
        assert records[i]["captions"] == captions[i], name
        np.testing.assert_array_equal(
            preprocess_image(records[i]["image"], 8), preprocess_image(picture(i), 8), err_msg=name
        )


def test_tfds_takes_a_slice_and_an_id_feature(tmp_path):
    _, (spec, _, _) = prepared_by_tfds(tmp_path, "tfrecord")
    part = open_source(spec.replace("split=val", "split=val[1:]") + "&id=image/filename")
    assert [record.captions for record in part] == [tuple(two) for two in CAPTIONS[1:]]
    path = next(tmp_path.rglob("*tfrecord*"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"cut off at byte"):
        open_source(spec)


def kinds(source):
    return [record.kind if isinstance(record, BadRecord) else record.id for record in source]


def test_a_shard_cut_in_the_middle_ends_there(tmp_path):
    webdataset(tmp_path)
    first = tmp_path / "00000.tar"
    whole = first.read_bytes()
    for size in range(512, len(whole), 700):
        first.write_bytes(whole[:size])
        source = open_source(f"webdataset:{tmp_path}")
        found = kinds(source)
        assert len(source) == len(found) and found[-1] == "00001/000000002"
        assert set(found[:-1]) <= {"00000/000000000", "00000/000000001", "damaged shard", "missing caption"}
    first.write_bytes(whole[:700])
    assert kinds(open_source(f"webdataset:{tmp_path}")) == ["damaged shard", "00001/000000002"]


def test_bad_samples_of_a_shard_are_named_by_kind(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "../../outside.jpg", picture(0))
        add(tar, "/etc/absolute.jpg", picture(0))
        add(tar, "a.jpg", picture(0))
        add(tar, "b.txt", b"no image")
        add(tar, "c.jpg", picture(1))
        add(tar, "c.txt", b"\xff\xfe")
        add(tar, "d.jpg", picture(1))
        add(tar, "d.json", b'{"caption": "half')
        add(tar, "e.jpg", picture(1))
        add(tar, "e.txt", b" \n")
        link = tarfile.TarInfo("f.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    outside = "path outside the shard"
    expected = [outside, outside, "missing caption", "missing image", "invalid text", "malformed entry"]
    expected += ["empty caption", "missing caption"]  # a link is no image, and no reason to lose its sample
    assert kinds(open_source(f"webdataset:{tmp_path}")) == expected


def test_bad_lines_of_jsonl_are_named_by_kind(tmp_path):
    images = write_images(tmp_path)
    lines = [
        json.dumps(turns()[0]).encode(),
        b'{"id": "half',
        b"\xff{}",
        b"[]",
        json.dumps(turns()[0]).encode(),
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = kinds(open_source(f"sharegpt4v:{tmp_path / 'x.jsonl'}", images))
    assert found == ["0", "malformed entry", "invalid text", "malformed entry", "duplicate id"]


def test_bad_rows_of_a_table_are_named_by_kind(tmp_path):
    images = write_images(tmp_path)
    table = b"filepath\ttitle\n0.png\t\xff\n1.png\n../x.png\tclimbs\nno.png\tgone\n2.png\t \n0.png\tgood\n"
    (tmp_path / "x.tsv").write_bytes(table)
    outside = "path outside the image folder"
    expected = ["invalid text", "malformed entry", outside, "missing image", "empty caption", "0.png"]
    assert kinds(open_source(f"csv:{tmp_path / 'x.tsv'}", images)) == expected


def test_bad_files_of_class_folders_are_named_by_kind(tmp_path):
    for name in (b"0.png", b"caf\xe9/0.png", b"dog/0.png"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(0))
    (tmp_path / "dog" / "notes.txt").write_text("is no image")
    alone, latin, good = open_source(f"classes:{tmp_path}")
    assert (alone.id, alone.kind) == ("0.png", "missing class") and "no class's subfolder" in alone.detail
    assert latin.kind == "invalid text"
    assert good == Pair("dog/0.png", picture(0), ("dog",))


def test_bad_rows_of_parquet_are_named_by_kind(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = {"image": [None, picture(0), picture(1), picture(2)], "caption": ["x", None, "", "good"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    found = kinds(open_source(f"parquet:{tmp_path / 'x.parquet'}"))
    assert found == ["missing image", "missing caption", "empty caption", "x.parquet:3"]


def test_rows_of_parquet_are_read_from_any_on(tmp_path, monkeypatch):
    """From the row group that it lies in, also behind rows that are damaged."""
    import pyarrow
    import pyarrow.parquet

    captions = [f"caption {i}" for i in range(10)]
    for name in "ab":
        table = pyarrow.table({"image": [picture(0)] * 10, "caption": captions})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    source, groups, read = open_source(f"parquet:{tmp_path}"), [], parquet_source._rows

    def rows(opened, texts, group, file):
        groups.append(f"{file.name[0]}{group}")
        yield from itertools.islice(read(opened, texts, group, file), 3 if groups[-1] == "a1" else None)

    monkeypatch.setattr(parquet_source, "_rows", rows)
    whole = list(source)
    assert kinds(whole).count("damaged row") == 1 and groups == ["a0", "a1", "a2", "b0", "b1", "b2"]
    for first in range(21):
        assert list(entries_from(source, first)) == whole[first:]
    groups.clear()
    assert len(list(entries_from(source, 14))) == 6 and groups == ["b1", "b2"]


def test_classes_and_splits_of_hugging_face(tmp_path):
    """Of a DatasetDict one split is named; a label is the name of its class."""
    fuzz.write_huggingface(tmp_path / "test")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="has the splits train, test: name one, as in .*/train"):
        open_source(f"huggingface:{tmp_path}")
    spec, info = f"huggingface:{tmp_path}/test", tmp_path / "test" / "dataset_info.json"
    records = list(open_source(f"{spec}?caption=label&id=label"))
    assert [(record.id, record.captions) for record in records[:2]] == [("0", ("cat",)), ("1", ("dog",))]
    assert records[2].kind == "duplicate id"
    info.write_text(info.read_text().replace(', \n        "dog"', "").replace('",\n        "dog"', '"'))
    cat, unknown, _ = open_source(f"{spec}?caption=label")
    assert cat.captions == ("cat",)
    assert unknown.kind == "unknown label" and unknown.detail == "1 is none of the 1 classes"
    for option, message in (
        (
            "caption=image",
            "text, lists of it, or ClassLabel: set caption= to one of .'image', 'captions', 'label'.",
        ),
        ("image=label", "image=label is no column of the feature Image"),
        ("id=x", "id=x is no column of text or whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(f"{spec}?{option}")


def bad_images():
    """What a crawl holds: (file name, contents, whether it can be used)."""

    def encoded(image, format="PNG", **options):
        file = io.BytesIO()
        image.save(file, format, **options)
        return file.getvalue()

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    deep = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50))
    return [
        ("truncated.jpg", encoded(noise, "JPEG")[:900], False),
        ("bomb.png", encoded(Image.new("1", (20000, 20000))), False),
        ("cmyk.jpg", encoded(noise.convert("CMYK"), "JPEG"), True),
        ("deep.png", encoded(deep), True),
        ("palette.png", encoded(noise.convert("P")), True),
        ("transparent.png", encoded(noise.convert("RGBA")), True),
        ("animated.gif", encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)]), True),
        ("line.png", encoded(Image.new("RGB", (1, 5000))), False),
        ("empty.jpg", b"", False),
        ("page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", False),
    ]


def test_bad_images_are_counted_and_nothing_is_written_elsewhere(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, contents, _ in bad_images():
        (folder / name).write_bytes(contents)
        (folder / name).with_suffix(".txt").write_text("text")
    (folder / "alone.png").write_bytes(picture(0))
    (folder / "blank.png").write_bytes(picture(0))
    (folder / "blank.txt").write_text(" \n")
    (folder / "latin.png").write_bytes(picture(0))
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    before = {path for path in tmp_path.rglob("*")}
    source, out = open_source(f"folder:{folder}"), tmp_path / "out"
    report = prepare(source, str(out), max_bad_fraction=1.0)
    good = [name for name, _, usable in bad_images() if usable]
    assert report["bad_by_kind"] == {
        "missing caption": 1,
        "unreadable image": len(bad_images()) - len(good),
        "empty caption": 1,
        "invalid text": 1,
    }
    records = Records(str(out))
    assert sorted(records[i]["id"] for i in range(len(records))) == sorted(good)
    written = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(out) for path in written)


@pytest.mark.parametrize(
    ("spec", "images", "error", "message"),
    [
        ("webdataset:/no", None, FileNotFoundError, "webdataset:/no has no .tar file"),
        ("parquet:/no", None, FileNotFoundError, "parquet:/no has no .parquet file"),
        ("coco:/no.json", "/", FileNotFoundError, "coco:/no.json does not exist"),
        ("tfds:no_such", None, FileNotFoundError, "tfds:no_such: no prepared data set"),
        ("tfds:x?colour=1", None, ValueError, "no option colour; tfds has data_dir, split"),
        ("csv:x.csv", None, ValueError, "needs the folder its image paths start from: add .images=DIR"),
        ("webdataset:x", "/", ValueError, "has no use for images=/"),
    ],
)
def test_wrong_sources_raise_what_is_wrong(spec, images, error, message):
    with pytest.raises(error, match=message):
        open_source(spec, images)


def test_table_without_its_columns_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"has the columns \['a', 'b'\]: name one of images \(filepath"):
        open_source(f"csv:{tmp_path / 'x.csv'}", str(tmp_path))
