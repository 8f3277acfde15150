"""Preparing a data set and reading it back; what stops it, and what a killed run leaves."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import ImageFolder
from clipmoe_jax.prepare import prepare


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
    expected = {"pairs": 6, "captions": 12, "image_bytes": image_bytes, "bad": 0, "bad_by_kind": {}}
    assert report == expected == json.loads((out / "report.json").read_text())
    assert sorted(os.listdir(out)) == ["bad_records.jsonl", "pairs", "report.json"]
    assert os.listdir(out.parent) == ["out"]


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
        with pytest.raises(IndexError, match=f"Index {index} is outside .* 6 records"):
            records[index]


def test_records_by_a_wrong_path_or_split(source, out):
    with pytest.raises(FileNotFoundError, match=f"prepare --source=KIND:PATH --out={out}"):
        Records(str(out))
    prepare(source, str(out), split="val")
    assert len(Records(str(out), "val")) == 6
    assert len(Records(str(out), "val[:4]")) == 4
    with pytest.raises(ValueError, match="no split 'train': it has val"):
        Records(str(out))


def test_damaged_records_are_named(source, out):
    prepare(source, str(out))
    (file,) = out.rglob("*array_record-*")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"Record 3 of {out} cannot be read"):
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
    with pytest.raises(ValueError) as error:
        prepare(source, str(out), max_bad_fraction=0.34)  # 2 of 6 pass, 3 do not
    message = str(error.value)
    assert "At least 3 of 6 records are bad, more than --max_bad_fraction=0.34" in message
    assert "3 unreadable image" in message and "00.png" in message and "\n" not in message
    assert not out.exists()
    log = out.with_name("out.unfinished") / "bad_records.jsonl"
    assert len(log.read_text().splitlines()) == 3


def test_nothing_usable(out, tmp_path):
    with pytest.raises(ValueError, match="source is empty"):
        prepare(make_folder(tmp_path / "empty", 0), str(out))
    source = make_folder(tmp_path / "pairs", 2)
    damage(tmp_path, [0, 1])
    with pytest.raises(ValueError, match="No usable pair in 2 records: 2 unreadable image"):
        prepare(source, str(out), max_bad_fraction=1.0)


def test_out_is_never_overwritten(source, out):
    prepare(source, str(out))
    with pytest.raises(ValueError, match=f"--out={out} exists already: delete it or pick"):
        prepare(source, str(out))
    other = out.with_name("other")
    other.mkdir()
    with pytest.raises(ValueError, match=f"--out={other} exists already"):
        prepare(source, str(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bad_fraction": 1.5}, "--max_bad_fraction=1.5 is not a fraction"),
        ({"num_shards": 0}, "--num_shards=0 is too few"),
        ({"split": "train[:3]"}, r"--split=train\[:3\] cannot name a split"),
        ({"split": "all"}, "--split=all cannot name a split"),
    ],
)
def test_arguments_out_of_range(source, out, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(source, str(out), **arguments)


def test_a_killed_run_leaves_nothing_that_reads_as_whole(source, out, tmp_path):
    killed = (
        "import os, sys; from clipmoe_jax import prepare as p\n"
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


def run_command(*arguments):
    command = [sys.executable, "-m", "clipmoe_jax.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(source, out, tmp_path):
    done = run_command(f"--source=folder:{tmp_path / 'pairs'}", f"--out={out}", "--split=val")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{out}: 6 pairs with 12 captions")
    assert len(Records(str(out), "val")) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source=folder:/nowhere", "--out=x"], "--source=folder:/nowhere is not a folder"),
        (["--source=folder:/", "--out=x", "--num_shard=2"], "Did you mean: num_shards"),
    ],
)
def test_command_errors_are_one_line(arguments, message):
    done = run_command(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
