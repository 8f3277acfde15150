"""Preparing a data set and reading it back; what stops it, and what a killed run leaves."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from grids import exhaustive
from killing import KILLING
from PIL import Image

from clipmoe_jax.data import array_records, preparation
from clipmoe_jax.data.loader import StreamedPairs
from clipmoe_jax.data.preparation import TooManyBadRecordsError, prepare, write_pairs
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.records import NoSplitError, Records
from clipmoe_jax.data.sources import AttributeSpec, BadRecord, ImageFolder, Pair, open_source
from clipmoe_jax.data.tokenizer import Tokenizer, word_ids


def make_folder(root, num_pairs=6):
    """Images 00.png … with captions "caption i" and "second caption i"."""
    root.mkdir()
    for i in range(num_pairs):
        Image.new("RGB", (9, 8), (i, 0, 0)).save(root / f"{i:02}.png")
        (root / f"{i:02}.txt").write_text(f"caption {i}\nsecond caption {i} é\n")
    return ImageFolder(str(root))


@pytest.fixture
def source(tmp_path):
    return make_folder(tmp_path / "pairs")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "nested" / "out"


def damage(tmp_path, numbers):
    for number in numbers:
        (tmp_path / "pairs" / f"{number:02}.png").write_bytes(b"broken")


def test_prepared_records_come_back_in_order(source, out, tmp_path):
    report = prepare(source, str(out))
    records = Records(str(out))
    assert len(records) == 6
    for i, record in enumerate(records[j] for j in range(6)):
        image = (tmp_path / "pairs" / f"{i:02}.png").read_bytes()
        captions = [f"caption {i}", f"second caption {i} é"]
        assert record == {"id": f"{i:02}.png", "image": image, "captions": captions}
    image_bytes = sum(path.stat().st_size for path in tmp_path.glob("pairs/*.png"))
    expected = {"pairs": 6, "captions": 12, "image_bytes": image_bytes, "pixels": None}
    (shard,) = out.rglob("*.array_record-*")
    contents = b"".join(array_record_module.ArrayRecordReader(str(shard)).read_all())
    of_shard = hashlib.sha256(contents).hexdigest()
    expected |= {"bad": 0, "bad_by_kind": {}, "sha256": hashlib.sha256(of_shard.encode()).hexdigest()}
    assert report == expected == json.loads((out / "report.json").read_text())
    files = ["bad_records.jsonl", "checksums.json", "pairs", "report.json", "token_counts-train.npy"]
    assert sorted(os.listdir(out)) == files
    assert os.listdir(out.parent) == ["out"]


def test_token_counts_are_those_of_the_longest_caption(source, out):
    prepare(source, str(out), split="val")
    # start, "second", "caption", the digit, "é", end
    assert Records(str(out), "val").token_counts.tolist() == 6 * [6]
    assert Records(str(out), "val[1:4]").token_counts.tolist() == 3 * [6]
    (out / "token_counts-val.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"does not exist: prepare the data set again"):
        _ = Records(str(out), "val").token_counts


def test_pixels_are_those_of_the_files(source, out, tmp_path):
    """And tokens those of the captions; both forms give the same batch."""
    report = prepare(source, str(out), pixels=24)
    files = tmp_path / "files"
    prepare(source, str(files))
    assert report["pixels"] == 24
    found, expected = Records(str(out)), Records(str(files))
    assert found.image_size == 24 and expected.image_size is None
    assert found.fingerprint != expected.fingerprint
    assert found.token_counts.tolist() == expected.token_counts.tolist()
    for i in range(6):
        assert found[i]["id"] == expected[i]["id"] and found[i]["captions"] == expected[i]["captions"]
        np.testing.assert_array_equal(found[i]["image"], preprocess_image(expected[i]["image"], 24))
        assert [list(words) for words in found[i]["tokens"]] == word_ids(expected[i]["captions"])
    for length in (5, 12):  # cut, and with room to spare
        of_pixels, of_files = (StreamedPairs(r, Tokenizer(length), 24) for r in (found, expected))
        for turns in (None, np.ones(6, np.uint64)):
            for name, array in of_files.gather(np.arange(6), turns).items():
                np.testing.assert_array_equal(of_pixels.gather(np.arange(6), turns)[name], array)


def test_pixels_of_another_size_than_the_models_are_refused(source, out):
    prepare(source, str(out), pixels=24)
    with pytest.raises(ValueError, match="holds pixels of size 24 and the model takes 32: .* pixels=32"):
        StreamedPairs(Records(str(out)), Tokenizer(8), 32).gather(np.arange(2))


def test_tfds_reads_it_by_name_and_without_tensorflow(source, out):
    prepare(source, str(out), num_shards=2)
    data = tfds.data_source("pairs", split="train[1:3]", data_dir=out)
    assert [example["id"] for example in data] == [b"01.png", b"02.png"]
    assert data[0]["image"].shape == (8, 9, 3)
    assert len(list(out.rglob("*array_record-*"))) == 2
    assert "tensorflow" not in sys.modules


def test_records_pickle_and_check_their_index(source, out):
    prepare(source, str(out))
    records = pickle.loads(pickle.dumps(Records(str(out))))
    assert records[np.int64(5)]["id"] == "05.png"
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"index {index} is outside .* 6 records"):
            records[index]


def test_wrong_path_or_split_is_refused(source, out):
    with pytest.raises(
        FileNotFoundError,
        match=f"{out} is not a prepared data set: make one with python -m clipmoe_jax.prepare",
    ):
        Records(str(out))
    pairs = out.parents[1] / "pairs"
    with pytest.raises(
        FileNotFoundError,
        match=f"so make one with .* --source=folder:{pairs} --out=DIR .*embed take folder:{pairs} as",
    ):
        Records(str(pairs))
    prepare(source, str(out), split="val")
    assert len(Records(str(out), "val")) == 6
    assert len(Records(str(out), "val[:4]")) == 4
    for wrong in ("train", "val+train", "[:4]", "val[:4", "val[::2]", "val[:7]", "val[4:2]", "val[2:2]"):
        with pytest.raises(NoSplitError) as error:
            Records(str(out), wrong)
        expected = f"{out} has no split {wrong!r}: choose val (6 records), or parts of one as in val[:50%]"
        assert str(error.value) == expected


def test_parts_of_a_split_come_one_after_the_other(source, out):
    prepare(source, str(out), split="val")
    parts = Records(str(out), "val[:2] + val[4:]")
    assert len(parts) == 4 and parts.split_name == "val"
    assert [parts[i]["id"] for i in range(4)] == ["00.png", "01.png", "04.png", "05.png"]
    assert parts.token_counts.tolist() == 4 * [6]
    assert parts.take(list("abcdef")) == list("abef")
    assert parts.take(np.arange(6)).tolist() == [0, 1, 4, 5]
    assert parts.fingerprint != Records(str(out), "val").fingerprint


def test_sources_of_a_data_set_are_told_by_their_ids(source, out):
    spec = "digit_scenes:train?pairs=2,glyphs:train?pairs=9,digit_scenes:test?pairs=3"
    prepare(open_source(spec), out)
    assert Records(out).source_sizes(3) == [2, 9, 3]
    assert Records(out, "train[1:4]+train[11:]").source_sizes(3) == [1, 2, 3]
    for split, number in (("train", 2), ("train", 4), ("train[:5]", 3)):
        with pytest.raises(ValueError, match=f"sources with commas between them, not of {number}: give as"):
            Records(out, split).source_sizes(number)
    with pytest.raises(ValueError, match="the parts of .* must ascend"):
        Records(out, "train[5:]+train[:5]").source_sizes(3)


def test_path_of_a_data_set_may_begin_at_home(source, out, monkeypatch):
    prepare(source, str(out))
    monkeypatch.setenv("HOME", str(out.parent))
    assert len(Records("~/out")) == 6 and Records("~/out").path == str(out)


def test_data_set_of_more_files_than_may_be_open_is_read(source, out, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8, limits[1]))
    prepare(source, str(out), num_shards=6)
    records, opened = Records(str(out)), len(os.listdir("/dev/fd"))
    for copy in (records, pickle.loads(pickle.dumps(records))):
        assert [copy[i]["id"] for i in range(6)] == [f"{i:02}.png" for i in range(6)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: records[i % 6]["id"], range(60)))
    assert found == 10 * [f"{i:02}.png" for i in range(6)]
    assert len(os.listdir("/dev/fd")) <= opened + 2 * 8 // 4


@contextlib.contextmanager
def no_more_files():
    """Lets this process open no file."""
    limits, opened = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 5, limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_open_files_are_no_damage(source, out):
    """Neither of a data set nor of a source."""
    prepare(source, str(out))
    data_set = open_source(f"tfds:{out}/pairs/1.0.0?split=train")
    for read in (lambda: Records(str(out))[0], lambda: next(iter(source)), lambda: next(iter(data_set))):
        read()  # imports what it needs
    records, data_set = Records(str(out)), open_source(f"tfds:{out}/pairs/1.0.0?split=train")
    for read in (lambda: records[0], lambda: next(iter(source)), lambda: next(iter(data_set))):
        with no_more_files(), pytest.raises(OSError, match="Too many open files: .*/(00|pairs-train)"):
            read()


def test_no_more_files_are_open_than_have_room(source, out, monkeypatch):
    monkeypatch.setattr(array_records, "MOST_OPEN", 2)
    prepare(source, str(out), num_shards=6)
    records, opened = Records(str(out)), len(os.listdir("/dev/fd"))
    assert [records[i]["id"] for i in range(6)] == [f"{i:02}.png" for i in range(6)]
    assert len(os.listdir("/dev/fd")) <= opened + 4  # each is open twice


def test_damaged_records_are_named(source, out):
    prepare(source, str(out))
    (file,) = out.rglob("*array_record-*")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"record 3 of {out} cannot be read"):
        Records(str(out))[3]


def test_bad_records_are_counted_named_and_skipped(source, out, tmp_path):
    damage(tmp_path, [1])
    (tmp_path / "pairs" / "04.txt").unlink()
    report = prepare(source, str(out), max_bad_fraction=0.5)
    assert report["pairs"] == 4 and report["bad"] == 2
    assert report["bad_by_kind"] == {"unreadable image": 1, "missing caption": 1}
    lines = [json.loads(line) for line in (out / "bad_records.jsonl").read_text().splitlines()]
    assert [(line["id"], line["kind"]) for line in lines] == [
        ("01.png", "unreadable image"),
        ("04.png", "missing caption"),
    ]
    assert [Records(str(out))[i]["id"] for i in range(4)] == [
        "00.png",
        "02.png",
        "03.png",
        "05.png",
    ]


def test_too_many_bad_records_stop_it(source, out, tmp_path):
    damage(tmp_path, [0, 2, 3])
    with pytest.raises(TooManyBadRecordsError) as error:
        prepare(source, str(out), max_bad_fraction=0.16)  # none of 6 passes, all 3 are told of
    log = out.with_name("out.unfinished") / "bad_records.jsonl"
    assert str(error.value) == (
        "3 of 6 records are bad, more than max_bad_fraction=0.16 allows: 3 unreadable image. "
        f"{log} lists them: fix them and start again, or raise max_bad_fraction"
    )
    assert not out.exists() and len(log.read_text().splitlines()) == 3


def test_large_source_of_bad_records_is_not_read_to_its_end(out):
    bad = BadRecord("a", "unreadable image", "broken")
    with pytest.raises(TooManyBadRecordsError, match="^at least 101 of 500 records are bad"):
        prepare([bad] * 500, str(out))


@pytest.mark.parametrize("num_pairs", [6, 120])
def test_images_without_captions_are_told_to_have_some(out, tmp_path, num_pairs):
    source = make_folder(tmp_path / "pairs", num_pairs)
    for path in (tmp_path / "pairs").glob("*.txt"):
        path.unlink()
    with pytest.raises(TooManyBadRecordsError, match=r"folder:DIR a \.txt of its name beside it$"):
        prepare(source, str(out))


def test_images_of_no_class_are_told_to_have_one(out, tmp_path):
    make_folder(tmp_path / "pairs", 6)
    with pytest.raises(TooManyBadRecordsError, match=r"6 missing class\. .*classes:DIR needs a subfolder"):
        prepare(open_source(f"classes:{tmp_path}/pairs"), str(out))


def test_source_without_a_usable_pair_is_refused(out, tmp_path):
    empty = make_folder(tmp_path / "empty", 0)
    with pytest.raises(ValueError, match="^the source is empty: check its path$"):
        prepare(empty, str(out))
    spec = f"folder:{tmp_path}/empty"
    with pytest.raises(ValueError, match=f"^source {spec} is empty: check its path$"):
        prepare(open_source(spec), str(out))
    source = make_folder(tmp_path / "pairs", 2)
    damage(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="no usable pair in 2 records: 2 unreadable image"):
        prepare(source, str(out), max_bad_fraction=1.0)


def test_out_is_never_overwritten(source, out):
    prepare(source, str(out))
    with pytest.raises(ValueError, match=f"{out} exists already: delete it or choose"):
        prepare(source, str(out))
    other = out.with_name("other")
    other.mkdir()
    with pytest.raises(ValueError, match=f"{other} exists already"):
        prepare(source, str(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bad_fraction": 1.5}, "max_bad_fraction=1.5 is not a fraction"),
        ({"num_shards": 0}, "num_shards=0 is too few"),
        ({"split": "train[:3]"}, r"split=train\[:3\] cannot name a split"),
        ({"split": "all"}, "split=all cannot name a split"),
    ],
)
def test_arguments_out_of_range_are_refused(source, out, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, str(out), **arguments)


def test_a_bucket_is_no_place_to_write_to(source):
    with pytest.raises(ValueError, match="gs://bucket/data lies in a bucket: prepare on a disk"):
        prepare(source, "gs://bucket/data")


def test_a_killed_run_leaves_nothing_that_reads_as_whole(source, out, tmp_path):
    killed = (
        "import os, sys; from clipmoe_jax.data import preparation as p\n"
        "from clipmoe_jax.data.sources import ImageFolder\n"
        "class Dying(ImageFolder):\n"
        "    def __iter__(self):\n"
        "        for i, pair in enumerate(super().__iter__()):\n"
        "            if i == 300: os._exit(9)\n"  # past the first chunk: records are being written
        "            yield pair\n"
        "p.prepare(Dying(sys.argv[1]), sys.argv[2])\n"
    )
    root = tmp_path / "many"
    make_folder(root, 301)
    run = subprocess.run([sys.executable, "-c", killed, str(root), str(out)])
    assert run.returncode == 9
    assert out.with_name("out.unfinished").exists() and not out.exists()
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        Records(str(out))
    prepare(source, str(out))
    assert len(Records(str(out))) == 6
    assert os.listdir(out.parent) == ["out"]


def contents(folder):
    """{path: bytes} of every file."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KILLED = (
    KILLING
    + """
from clipmoe_jax.data import preparation, shard_files
from clipmoe_jax.data.sources import ImageFolder

place, call, root, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
kill_at(shard_files if hasattr(shard_files, place) else preparation, place, call)
preparation.prepare(ImageFolder(root), out, num_shards=8, max_bad_fraction=0.1, pixels=64, name="it")
"""
)


@exhaustive
def test_resume_after_kills_at_random_moments_gives_the_same_bytes(out, tmp_path):
    """In the middle of a file ten times, further each time, and before the last lines."""
    root = tmp_path / "many"
    source = make_folder(root, 120)
    (root / "07.png").write_bytes(b"broken")
    options = {"num_shards": 8, "max_bad_fraction": 0.1, "pixels": 64, "name": "it"}
    whole = tmp_path / "whole"
    prepare(source, str(whole), **options)
    kept, rng = [], random.Random(0)
    places = [("preprocess_image", rng.randrange(1, 40)) for _ in range(10)]
    for place, call in [*places, ("_write_metadata", 1)]:
        process = subprocess.run([sys.executable, "-c", KILLED, place, str(call), str(root), str(out)])
        if process.returncode == 0:  # less was left to do
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
        kept.append(len(list(out.parent.rglob("*.done.json"))))
    assert max(kept) == 8 and len(set(kept)) > 3  # what was whole was kept
    prepare(source, str(out), **options)
    assert contents(out) == contents(whole)
    assert len(Records(str(out))) == 119


def test_other_captions_are_another_data_set(source, out, tmp_path):
    """Of the same length, too: what a run made from the old ones is not taken for it."""
    prepare(source, str(out))
    (tmp_path / "pairs" / "03.txt").write_text("caption 7\nsecond caption 7 é\n")
    prepare(source, str(tmp_path / "other"))
    (tmp_path / "pairs" / "03.txt").write_text("caption 3\nsecond caption 3 é\n")
    prepare(source, str(tmp_path / "again"), num_shards=1)
    first, other, again = (
        Records(str(path)).fingerprint for path in (out, tmp_path / "other", tmp_path / "again")
    )
    assert first == again != other


def test_another_source_does_not_go_on_with_what_is_there(source, out, tmp_path):
    unfinished = out.with_name("out.unfinished")
    with pytest.raises(KeyboardInterrupt):
        prepare(Interrupted(6, 4), str(out), num_shards=3, name="one")
    assert len(list(unfinished.rglob("*.done.json"))) == 2
    report = prepare(source, str(out), num_shards=3, name="another")
    assert report["pairs"] == 6 and Records(str(out))[0]["id"] == "00.png"


def test_stopped_run_goes_on_only_from_what_the_source_still_holds(source, out, tmp_path):
    """Captions, images and bad records of files that are whole may have changed since."""
    folder, pairs = out.with_name("out.unfinished"), tmp_path / "pairs"
    damage(tmp_path, [5])

    def stop():
        with pytest.raises(TooManyBadRecordsError, match="fix them and start again"):
            prepare(source, str(out), num_shards=3, max_bad_fraction=0, name="it")
        (first,) = folder.rglob("*-00000-of-00003")
        return first.stat().st_mtime_ns

    written = stop()
    assert stop() == written
    stopped = {path.name: path.read_bytes() for path in pairs.iterdir()}
    for name, contents in (("01.txt", b"another caption"), ("00.png", stopped["02.png"])):
        (pairs / name).write_bytes(contents)
        assert stop() != written
        (pairs / name).write_bytes(stopped[name])
        written = stop()
    (pairs / "05.png").write_bytes(stopped["04.png"])
    (pairs / "03.txt").write_text("new")
    prepare(source, str(out), num_shards=3, max_bad_fraction=0, name="it")
    assert Records(str(out))[3]["captions"] == ["new"] and len(Records(str(out))) == 6


def test_bad_records_that_were_mended_are_read_again(source, out, tmp_path):
    damage(tmp_path, [0, 5])
    with pytest.raises(TooManyBadRecordsError, match="2 unreadable image"):
        prepare(source, str(out), num_shards=3, max_bad_fraction=0.2, name="it")
    for name in ("00.png", "05.png"):
        shutil.copy(tmp_path / "pairs" / "03.png", tmp_path / "pairs" / name)
    assert prepare(source, str(out), num_shards=3, max_bad_fraction=0.2, name="it")["bad"] == 0


@pytest.mark.parametrize(("length", "yielded"), [(4, 6), (6, 4)])
def test_source_that_changes_while_it_is_read_is_refused(out, length, yielded):
    class Changing(Interrupted):
        def __iter__(self):
            return itertools.islice(Interrupted(8, 8), yielded)

    with pytest.raises(ValueError, match=f"source had {length} records, and {yielded} were read: it changes"):
        prepare(Changing(length, 8), str(out), num_shards=2)


class Interrupted:
    """A source that stops after some entries."""

    def __init__(self, length, after):
        self._length, self._after = length, after

    def __len__(self):
        return self._length

    def __iter__(self):
        image = io.BytesIO()
        Image.new("RGB", (9, 8)).save(image, "PNG")
        for i in range(self._length):
            if i == self._after:
                raise KeyboardInterrupt
            yield Pair(f"other {i}", image.getvalue(), ("text",))


def test_write_pairs_goes_on_with_whole_files(out, tmp_path):
    """As inside a folder of the caller's own; other arguments begin anew."""
    out.mkdir(parents=True)
    folder, whole = epath.Path(out), tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        write_pairs(Interrupted(6, 4), folder, num_shards=3)
    first = next(out.rglob("*-00000-of-00003"))
    inode = first.stat().st_ino
    report = write_pairs(Interrupted(6, 7), folder, num_shards=3)
    assert first.stat().st_ino == inode
    assert report == prepare(Interrupted(6, 7), str(whole), num_shards=3)
    (whole / "checksums.json").unlink()  # `prepare` writes it
    assert contents(out) == contents(whole)
    write_pairs(Interrupted(6, 7), folder, num_shards=2)
    assert len(list(out.rglob("*array_record-*"))) == 2 and len(Records(str(out))) == 6


@pytest.mark.parametrize("pixels", [None, 16])
def test_attributes_come_back_with_their_table(out, tmp_path, pixels):
    scenes = open_source("digit_scenes:train?pairs=5")
    prepare(scenes, str(out), pixels=pixels)
    records = Records(str(out))
    assert records.attribute_table == scenes.attribute_table
    assert list(records.attribute_table)[:2] == ["ink", "background"]  # in order
    assert [records[i]["attributes"] for i in range(5)] == [pair.attributes for pair in scenes]
    fingerprint = records.fingerprint
    table = (out / "attributes.json").read_text()
    (out / "attributes.json").write_text(table.replace("mark {}", "a mark in the {}"))
    with pytest.raises(
        ValueError, match="attributes.json is damaged .*; if you changed it, delete .*checksums"
    ):
        Records(str(out))
    (out / "checksums.json").unlink()
    assert Records(str(out)).fingerprint != fingerprint


def test_records_without_attributes_say_so(source, out):
    prepare(source, str(out))
    records = Records(str(out))
    assert records.attribute_table is None and "attributes" not in records[0]
    assert not (out / "attributes.json").exists()


LIES = {
    "pixels of files": (None, {"report.json": {"pixels": 32}}, "no pixels, tokens: prepare"),
    "files of pixels": (16, {"report.json": {}}, "no image: prepare"),
    "other pixels": (
        16,
        {"report.json": {"pixels": 17}},
        "768 bytes of pixels, and report.json says 17 x 17",
    ),
    "pixels in words": (16, {"report.json": {"pixels": "16"}}, "pixels='16' must be a whole number"),
    "attributes of none": (
        None,
        {"attributes.json": {"a": {"prompt": "", "values": ["b"]}}},
        "no attributes",
    ),
    "no values": (None, {"attributes.json": {"a": {"prompt": "", "values": []}}}, "a: values must be a list"),
    "numbers": (None, {"attributes.json": {"a": {"prompt": "", "values": [1]}}}, "a: values must be a list"),
}


@pytest.mark.parametrize(("pixels", "files", "message"), LIES.values(), ids=LIES)
def test_files_that_are_not_of_the_records_are_named(source, out, pixels, files, message):
    prepare(source, str(out), pixels=pixels)
    (out / "checksums.json").unlink()
    [(name, content)] = files.items()
    (out / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name) as told:
        _ = Records(str(out))[0]
    assert message in str(told.value) and str(out) in str(told.value)


def test_a_prepared_set_without_splits_is_told(source, out):
    prepare(source, str(out))
    (out / "checksums.json").unlink()
    (file,) = out.rglob("dataset_info.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"splits": []}))
    with pytest.raises(ValueError, match=f"{file} names no split: prepare"):
        Records(str(out))


TABLES = {
    "another number": (lambda table: table.pop("ink"), "it has 8 attributes, attributes.json 7"),
    "other values": (
        lambda table: table["ink"].update(values=["x"]),
        r"its ink is '\w+', none of those in attri",
    ),
}


@pytest.mark.parametrize(("change", "message"), TABLES.values(), ids=TABLES)
def test_attributes_that_are_not_in_the_table_name_the_record(out, change, message):
    prepare(open_source("digit_scenes:train?pairs=2"), str(out))
    (out / "checksums.json").unlink()
    table = json.loads((out / "attributes.json").read_text())
    change(table)
    (out / "attributes.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"record 0 of {out} cannot be read \({message}"):
        _ = Records(str(out))[0]


class Shapes(list):
    attribute_table = {"shape": AttributeSpec("a {}", ("cube", "ball"))}


def test_pair_whose_attribute_is_not_in_the_table_is_bad(source, out):
    image = next(iter(source)).image
    pairs = [Pair(str(i), image, ("text",), {"shape": shape}) for i, shape in enumerate(("ball", "cone"))]
    report = prepare(Shapes([*pairs, Pair("2", image, ("text",))]), str(out), max_bad_fraction=0.7)
    assert report["bad_by_kind"] == {"bad attribute": 2}
    assert Records(str(out))[0]["attributes"] == {"shape": "ball"}


def test_attributes_of_several_sources_are_kept_if_they_are_the_same(out, tmp_path):
    scenes, folder = "digit_scenes:test?pairs=2", f"folder:{tmp_path / 'pairs'}"
    make_folder(tmp_path / "pairs", 2)
    both = open_source(f"{scenes},{scenes}&seed=1")
    assert both.attribute_table == open_source(scenes).attribute_table
    assert open_source(f"{scenes},{folder}").attribute_table is None
    prepare(open_source(f"{scenes},{folder}"), str(out))
    assert [Records(str(out))[i]["id"] for i in range(4)] == ["0/000000", "0/000001", "1/00.png", "1/01.png"]


def test_large_data_sets_have_larger_files_not_more():
    entries = (1, 10**6, 4096**2, 4096**2 + 1, 10**8, 13 * 10**8)
    assert [preparation.entries_per_shard(n) for n in entries] == [4096, 4096, 4096, 8192, 24576, 319488]
    assert all(-(-n // preparation.entries_per_shard(n)) <= 4096 for n in entries)
