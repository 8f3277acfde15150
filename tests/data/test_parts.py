"""Preparing in parts and merging them: the same as one process makes, whatever is killed."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from killing import KILLING
from PIL import Image

from clipmoe_jax.data import parts
from clipmoe_jax.data.parts import Part, merge, prepare_part
from clipmoe_jax.data.preparation import TooManyBadRecordsError, prepare
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import open_source

SHARDS = 7
# A file has three entries; of two parts the second begins with file 3, of three with files 2 and 4. Ids come
# again in the same part, in later ones, with bad images, and after an entry without a caption, no pair.
IDS = "a b c d e f g h b i a j k d l m n b o p".split()
BAD_IMAGES, NO_CAPTION = {3, 7, 13, 19}, {5}


@pytest.fixture
def spec(tmp_path):
    """A source of 20 entries, some bad and some of ids that came before."""
    images = tmp_path / "images"
    images.mkdir()
    lines = []
    for i, name in enumerate(IDS):
        file = io.BytesIO()
        Image.new("RGB", (9, 8), (i, 0, 0)).save(file, "PNG")
        (images / f"{i}.png").write_bytes(b"broken" if i in BAD_IMAGES else file.getvalue())
        value = None if i in NO_CAPTION else f"caption {i}"
        turns = [{"from": "gpt", "value": value}]
        lines.append(json.dumps({"id": name, "image": f"{i}.png", "conversations": turns}))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    return f"sharegpt4v:{tmp_path}/x.jsonl?images={images}"


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "nested" / "out")


OPTIONS = {"num_shards": SHARDS, "max_bad_fraction": 0.5, "name": "it"}


def make(spec, out, number, total, **options):
    return prepare_part(open_source(spec), out, Part(number, total), **(OPTIONS | options))


def make_all(spec, out, total, **options):
    return [make(spec, out, number, total, **options) for number in range(total)]


def contents(folder):
    """{path: bytes} of every file."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("total", "pixels"), [(1, None), (2, 16), (3, None), (SHARDS, None)])
def test_merged_parts_are_what_one_process_makes(spec, out, tmp_path, total, pixels):
    whole = prepare(open_source(spec), str(tmp_path / "whole"), **OPTIONS, pixels=pixels)
    assert whole["bad_by_kind"] == {"unreadable image": 3, "missing caption": 1, "duplicate id": 4}
    counts = make_all(spec, out, total, pixels=pixels)
    assert make(spec, out, 0, total, pixels=pixels) == counts[0]  # which is there
    report = merge(out, max_bad_fraction=0.5)
    assert report == whole
    assert contents(tmp_path / "nested" / "out") == contents(tmp_path / "whole")
    assert os.listdir(tmp_path / "nested") == ["out"]
    assert "".join(Records(out)[i]["id"] for i in range(len(Records(out)))) == "abcegijklmno"


def test_parts_of_several_sources_keep_their_attributes(out, tmp_path):
    spec = "digit_scenes:train?pairs=8,digit_scenes:test?pairs=7"
    prepare(open_source(spec), str(tmp_path / "whole"), **OPTIONS)
    make_all(spec, out, 4)
    merge(out)
    assert contents(tmp_path / "nested" / "out") == contents(tmp_path / "whole")


def test_ids_are_compared_a_few_at_a_time(spec, out, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "IDS_AT_A_TIME", 3)
    prepare(open_source(spec), str(tmp_path / "whole"), **OPTIONS)
    make_all(spec, out, 3)
    merge(out, max_bad_fraction=0.5)
    assert contents(tmp_path / "nested" / "out") == contents(tmp_path / "whole")


def test_nothing_is_copied_where_a_file_can_have_two_names(spec, out, tmp_path, monkeypatch):
    make_all(spec, out, 2)
    first = next((tmp_path / "nested").rglob("*-00000-of-00007"))
    inode = first.stat().st_ino
    shutil.copytree(f"{out}.parts", tmp_path / "nested" / "copied.parts")
    merge(out, max_bad_fraction=0.5)
    assert next((tmp_path / "nested" / "out").rglob("*-00000-of-00007")).stat().st_ino == inode

    def elsewhere(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    merge(str(tmp_path / "nested" / "copied"), max_bad_fraction=0.5)
    assert contents(tmp_path / "nested" / "copied") == contents(tmp_path / "nested" / "out")


KILLED = (
    KILLING
    + """
from clipmoe_jax.data import parts, shard_files
from clipmoe_jax.data.sources import open_source

place, call, spec, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
module, name = place.split(".")
kill_at(parts if module == "parts" else shard_files, name, call)
if spec:
    options = {"num_shards": 7, "max_bad_fraction": 0.5, "name": "it"}
    parts.prepare_part(open_source(spec), out, parts.Part(1, 2), **options)
else:
    parts.merge(out, max_bad_fraction=0.5)
"""
)


def kill(place, call, spec, out):
    done = subprocess.run([sys.executable, "-c", KILLED, place, str(call), spec, out])
    assert done.returncode == -9


def test_killed_part_and_killed_merge_are_gone_on_with(spec, out, tmp_path):
    prepare(open_source(spec), str(tmp_path / "whole"), **OPTIONS)
    make(spec, out, 0, 2)
    kill("shard_files.preprocess_image", 8, spec, out)
    unfinished = tmp_path / "nested" / "out.parts" / "00001-of-00002.unfinished"
    written = {path: path.stat().st_mtime_ns for path in unfinished.rglob("*.done.json")}
    assert written
    with pytest.raises(ValueError, match="has 1 of 2 parts: 1/2 is not whole; prepare each with --part=K/2"):
        merge(out)
    make(spec, out, 1, 2)
    for path, time in written.items():
        now = path.parents[3] / "00001-of-00002" / path.relative_to(unfinished)
        assert now.stat().st_mtime_ns == time
    kill("parts.write_set", 1, "", out)
    assert not os.path.exists(out)
    merge(out, max_bad_fraction=0.5)
    assert contents(tmp_path / "nested" / "out") == contents(tmp_path / "whole")


def test_merge_that_was_killed_at_its_end_says_what_is_left(spec, out, tmp_path, monkeypatch):
    make_all(spec, out, 2)
    shutil.copytree(f"{out}.parts", tmp_path / "kept")
    merge(out, max_bad_fraction=0.5)
    shutil.copytree(tmp_path / "kept", f"{out}.parts")
    for again in (lambda: merge(out), lambda: make(spec, out, 1, 2)):
        with pytest.raises(
            ValueError, match="out exists already: delete .*parts if it was made of them; oth"
        ):
            again()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"split": "test"},
            "00001-of-00003 was made with split=test, .*00000-of-00003 with split=train: del",
        ),
        ({"pixels": 16}, "was made with pixels=16, .* with pixels=None: delete those that are wrong"),
        ({"name": "other"}, "was made with source=other, .* with source=it"),
        ({"num_shards": 5}, "was made with per_shard=4, .* with per_shard=3"),
        ({"files": "1 2"}, "was made from other files than .*00000-of-00003 .names, sizes or times of the"),
    ],
)
def test_parts_of_different_sets_are_not_merged(spec, out, change, message):
    for number in range(3):
        make(spec, out, number, 3, **(change if number == 1 else {}))
    with pytest.raises(ValueError, match=message):
        merge(out)
    with pytest.raises(ValueError, match="this command with|other files than this command"):
        make(spec, out, 1, 3)
    assert not os.path.exists(out) and len(os.listdir(f"{out}.parts")) == 3


def test_parts_that_are_missing_or_of_another_number_are_named(spec, out):
    with pytest.raises(FileNotFoundError, match="out.parts does not exist: prepare parts first, --part=0/N"):
        merge(out)
    make(spec, out, 1, SHARDS)
    message = (
        "has 1 of 7 parts: 0/7 is missing, 2/7 is missing, .*, 5/7 is missing and 1 more; prepare each with"
    )
    with pytest.raises(ValueError, match=message):
        merge(out)
    make(spec, out, 1, 2)
    with pytest.raises(ValueError, match="has parts of 2 and of 7: delete those of all numbers but one"):
        merge(out)


def damage(path, contents):
    path.unlink()  # other names keep theirs
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*-00002-of-00007", "cannot be read .*: copy it again, or delete .*00000-of-00002 and prepare that"),
        ("*.entries.npy", "entries.npy is damaged .its CRC-32 is"),
        ("part.json", "part.json is damaged .its CRC-32 is"),
    ],
)
def test_damaged_parts_are_named(spec, out, tmp_path, pattern, message):
    make_all(spec, out, 2)
    path = next((tmp_path / "nested" / "out.parts" / "00000-of-00002").rglob(pattern))
    damage(path, path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=message):
        merge(out, max_bad_fraction=0.5)
    assert os.listdir(tmp_path / "nested") == ["out.parts"]


def test_part_under_another_name_is_not_merged(spec, out, tmp_path):
    make(spec, out, 0, 2)
    folder = tmp_path / "nested" / "out.parts"
    shutil.copytree(folder / "00000-of-00002", folder / "00001-of-00002")
    with pytest.raises(ValueError, match="00001-of-00002 has no file .*-00003-of-00007, whole: delete it"):
        merge(out)


def test_bad_records_count_by_the_whole_source(spec, out, tmp_path):
    """8 are bad: a part may have all that the source may have."""
    for number in range(2):
        make(spec, out, number, 2, max_bad_fraction=0.3)
    with pytest.raises(TooManyBadRecordsError, match="^8 of 20 records are bad, .*prepare their parts"):
        merge(out, max_bad_fraction=0.3)
    log = tmp_path / "nested" / "out.parts" / "bad_records.jsonl"
    assert len(log.read_text().splitlines()) == 8
    assert merge(out, max_bad_fraction=0.4)["bad"] == 8
    with pytest.raises(TooManyBadRecordsError, match="^2 of 20 records are bad, .* start again"):
        make(spec, out + "2", 1, 2, max_bad_fraction=0.05)


@pytest.mark.parametrize("text", ["", "3", "3/", "a/b", "3/3", "0/0", "-1/3", "1/3 ", "٣/٤", "1/1000000"])
def test_wrong_parts_are_refused(text):
    with pytest.raises(ValueError, match="is not K/N with K from 0 to N - 1: 64 parts are 0/64 to 63/64"):
        Part.parse(text)


def test_more_parts_than_files_are_refused(spec, out):
    with pytest.raises(
        ValueError, match="part=7/8: 20 entries make 7 files, too few for 8 parts: take at most 7"
    ):
        make(spec, out, 7, 8)
