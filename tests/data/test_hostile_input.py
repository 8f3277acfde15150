"""Files of strangers: nothing that they bring runs, and small ones take little memory."""

import importlib
import io
import json
import os
import pathlib
import re
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from test_formats import prepared_by_tfds

from benchmarks import fuzz
from clipmoe_jax.core import checks
from clipmoe_jax.data import array_record_chunks, records
from clipmoe_jax.data.preparation import prepare
from clipmoe_jax.data.preprocess import MAX_PIXELS, UnreadableImageError, decode_image, preprocess_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import BadRecord, Pair, base, files, open_source, parquet, source_stamp, tfds
from clipmoe_jax.data.sources.parquet_pages import expanded_bytes

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.fixture
def module_in_working_directory(tmp_path, monkeypatch):
    """Writes a module where `python -m` looks first; returns the file that it writes when it is imported."""
    trace = tmp_path / "it_ran"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield trace
    sys.modules.pop("evil", None)


def name_a_class(folder: pathlib.Path, name: str) -> None:
    (file,) = folder.rglob("features.json")
    features = json.loads(file.read_text())
    first = next(iter(features["featuresDict"]["features"].values()))
    first["pythonClassName"] = name
    file.write_text(json.dumps(features))


@pytest.mark.parametrize("name", ["evil.Feature", "tensorflow_datasets_core.features.Text", "Feature"])
def test_a_data_set_of_tfds_runs_no_code(tmp_path, module_in_working_directory, name):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "data", "array_record")
    name_a_class(tmp_path / "data", name)
    with pytest.raises(ValueError, match=f"tfds:my_captions: its features.json names the class '{name}'"):
        open_source(spec)
    assert not module_in_working_directory.exists()


def test_a_prepared_set_runs_no_code(tmp_path, module_in_working_directory):
    prepared_by_tfds(tmp_path / "data", "array_record")
    (features,) = (tmp_path / "data").rglob("features.json")
    (tmp_path / "set" / "pairs").mkdir(parents=True)
    features.parent.rename(tmp_path / "set" / "pairs" / "1.0.0")
    name_a_class(tmp_path / "set", "evil.Feature")
    with pytest.raises(ValueError, match="set: its features.json names the class 'evil.Feature'"):
        Records(str(tmp_path / "set"), "val")
    assert not module_in_working_directory.exists()


def test_an_eps_file_is_no_image_and_starts_no_ghostscript(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/it_ran\n")
    ghostscript.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UnreadableImageError, match="not an image file"):
        decode_image(EPS)
    assert not (tmp_path / "it_ran").exists()


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that ends where its pixels begin."""

    def chunk(name, contents):
        return (
            struct.pack(">I", len(contents))
            + name
            + contents
            + struct.pack(">I", zlib.crc32(name + contents))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", b"")


def webp(side):
    """A black square of 34 bytes, whole."""
    contents = bytearray(encoded(Image.new("RGB", (64, 64)), "WEBP", lossless=True))
    contents[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    return bytes(contents)


@pytest.mark.parametrize("contents", [png_header(8193, 8192), webp(13300)], ids=["PNG", "WebP"])
def test_the_pixels_of_an_image_are_limited_by_its_header(contents):
    with pytest.raises(
        UnreadableImageError, match=f"pixels, of which 67,108,864 may be .* variable {MAX_PIXELS}"
    ):
        decode_image(contents)


SMALL = Image.new("RGB", (64, 48))
FORMATS = {form: encoded(SMALL, form) for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000")}


@pytest.mark.parametrize("form", FORMATS)
def test_the_limit_on_pixels_can_be_set(form, monkeypatch):
    monkeypatch.setenv(MAX_PIXELS, str(64 * 48))
    assert preprocess_image(FORMATS[form], 8).shape == (8, 8, 3)
    monkeypatch.setenv(MAX_PIXELS, str(64 * 48 - 1))
    for image in (FORMATS[form], Image.open(io.BytesIO(FORMATS[form]))):
        with pytest.raises(UnreadableImageError, match="it has 3,072 pixels, of which 3,071 may be decoded"):
            preprocess_image(image, 8)


@pytest.mark.parametrize("value", ["1e8", "-1", "0", "many"])
def test_a_limit_on_pixels_that_is_none_is_told(value, monkeypatch):
    monkeypatch.setenv(MAX_PIXELS, value)
    with pytest.raises(ValueError, match=f"{MAX_PIXELS}={value} is no whole number") as caught:
        preprocess_image(FORMATS["PNG"], 8)
    assert not isinstance(caught.value, UnreadableImageError)  # no image is bad


def test_a_tile_larger_than_its_image_counts(monkeypatch):
    monkeypatch.setenv(MAX_PIXELS, "5000")
    directory = Image.open(io.BytesIO(FORMATS["TIFF"])).tag_v2
    for tag in (322, 323):  # width and height of its tiles
        directory.tagtype[tag] = 4
        directory[tag] = 128
    image = Image.new("RGB", (64, 48))
    image.tag_v2 = directory
    with pytest.raises(UnreadableImageError, match="it has 16,384 pixels"):
        decode_image(image)


def test_an_icon_may_hold_another_size_than_its_header_says():
    inside = png_header(13300, 13300)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22)
    with pytest.raises(UnreadableImageError, match="not an image file"):
        decode_image(struct.pack("<HHH", 0, 1, 1) + entry + inside)


def jpeg(num_scans):
    """A black square whose last scan comes again and again."""
    contents = encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    scan = contents[contents.rindex(b"\xff\xda") : -2]
    return contents[:-2] + scan * (num_scans - contents.count(b"\xff\xda")) + contents[-2:]


def test_the_scans_of_a_jpeg_are_limited(tmp_path):
    assert preprocess_image(jpeg(100), 8).shape == (8, 8, 3)
    (tmp_path / "bad.jpg").write_bytes(jpeg(101))
    (tmp_path / "bad.txt").write_text("a caption")
    (tmp_path / "good.jpg").write_bytes(jpeg(100))
    (tmp_path / "good.txt").write_text("a caption")
    prepare(open_source(f"folder:{tmp_path}"), str(tmp_path / "out"), max_bad_fraction=1)
    (bad,) = (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(bad) == {
        "id": "bad.jpg",
        "kind": "unreadable image",
        "detail": "a JPEG of more than 100 scans: save it anew",
    }


@pytest.mark.parametrize(("num_colours", "message"), [(1, "more than 100 scans"), (3, "broken data stream")])
def test_the_first_scan_of_all_colours_ends_an_image_that_is_not_progressive(num_colours, message):
    contents = encoded(Image.new("RGB", (16, 16)), "JPEG")
    header, _, scan = contents[:-2].partition(b"\xff\xda")
    scan = b"\xff\xda" + scan[:2] + bytes([num_colours]) + scan[3:]
    with pytest.raises(UnreadableImageError, match=message):
        decode_image(header + scan * 101 + contents[-2:])


def test_what_looks_like_scans_beside_those_of_a_jpeg_does_not_count():
    contents = jpeg(10)
    profile = b"\xff\xe2" + struct.pack(">H", 2 + 2 * 200) + b"\xff\xda" * 200
    for image in (contents[:2] + profile + contents[2:], contents + b"\xff\xda" * 200):
        assert preprocess_image(image, 8).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", [b"P1", b"P2", b"P3"])
def test_the_comments_of_a_ppm_of_text_are_limited(kind):
    maximum = b"" if kind == b"P1" else b"1\n"
    header = kind + b" 16 16\n" + maximum
    pixels = b"1 " * 16 * 16 * 3
    assert preprocess_image(header + b"#\n" * 100 + pixels, 8).shape == (8, 8, 3)
    with pytest.raises(UnreadableImageError, match="a PPM of more than 100 comments"):
        preprocess_image(header + b"#\n" * 101 + pixels, 8)


PEAK = """
import re, sys
def peak():  # of this process alone: getrusage begins with its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024
"""


def run_measured(code, *arguments):
    """Runs a script that has `peak()`, the MB that it has taken; returns what it prints and its errors."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + code, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip(), done.stderr


DECODE = """
from clipmoe_jax.data.preprocess import UnreadableImageError, preprocess_image
contents = open(sys.argv[1], "rb").read()
start = peak()
try:
    preprocess_image(contents, 224)
except UnreadableImageError:
    pass
print(peak() - start)
"""


def test_16_bits_of_grey_are_converted_without_floats(tmp_path):
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(np.zeros((4000, 4000), np.uint16)), "PNG"))
    megabytes, errors = run_measured(DECODE, tmp_path / "x.png")
    assert int(megabytes) < 16 * 10 and not errors  # 10 bytes a pixel


def test_no_warning_tells_of_an_image_without_naming_it(tmp_path):
    (tmp_path / "x.png").write_bytes(png_header(10000, 10000))  # Pillow warns from 89 million pixels
    _, errors = run_measured(DECODE, tmp_path / "x.png")
    assert not errors


def test_warning_of_an_image_names_it(tmp_path):
    """Pillow says what is odd, and not of which image."""
    image = encoded(Image.new("RGB", (8, 8)), "PNG")
    no_frames = struct.pack(">I4sII", 8, b"acTL", 0, 0)
    odd = (
        image[:33] + no_frames + struct.pack(">I", zlib.crc32(no_frames[4:])) + image[33:]
    )  # after the header
    for name, contents in (("plain", image), ("odd\x1b", odd)):
        (tmp_path / f"{name}.png").write_bytes(contents)
        (tmp_path / f"{name}.txt").write_text("caption")
    arguments = [f"--source=folder:{tmp_path}", f"--out={tmp_path}/out"]
    command = [sys.executable, "-m", "clipmoe_jax.prepare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == r"warning: odd\x1b.png: Invalid APNG, will use default PNG image if possible" + "\n"


READ = """
import collections, resource, time
import pyarrow.parquet
from clipmoe_jax.data.sources import BadRecord, open_source
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
start, began = peak(), time.perf_counter()
kinds = collections.Counter(r.kind if isinstance(r, BadRecord) else "pair" for r in open_source(sys.argv[1]))
assert peak() - start < 1000 and time.perf_counter() - began < 10, peak() - start
print(sorted(kinds.items()))
"""


def write_parquet(file, **columns):
    options = {"compression": "zstd", "dictionary_pagesize_limit": 2**30, "store_schema": False}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **options)


def repeated(value, times):
    """An Arrow array that holds a value once."""
    places = pyarrow.array(np.zeros(times, np.int32))
    return pyarrow.DictionaryArray.from_arrays(places, pyarrow.array([value]))


def one_list(values):
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)


def test_what_expands_in_parquet_is_not_expanded(tmp_path):
    long, images = "a " * 500_000, [b"%d" % i for i in range(1000)]
    write_parquet(tmp_path / "0.parquet", image=[b"x"], captions=one_list(repeated("a", 5_000_000)))
    write_parquet(tmp_path / "1.parquet", image=[b"x"], captions=one_list(repeated(long, 5000)))
    write_parquet(tmp_path / "2.parquet", image=images, caption=repeated(long, 1000))
    write_parquet(tmp_path / "3.parquet", image=images, text=1000 * ["x"], id=repeated(long, 1000))
    write_parquet(tmp_path / "4.parquet", image=[bytes(3 * 10**7)], text=["x"])
    write_parquet(tmp_path / "5.parquet", image=repeated(bytes(10**7), 200), text=200 * ["x"])
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    found, errors = run_measured(READ, f"parquet:{tmp_path}")
    assert found == str([("damaged row", 1 + 174), ("pair", 26), ("too much text", 2002)]), errors


def test_a_row_group_of_parquet_that_belies_its_size_is_not_expanded(tmp_path):
    """The footer says that 60 MB are 1,000 bytes."""
    file = tmp_path / "x.parquet"
    write_parquet(file, image=[b"x", bytes(60_000_000)], caption=["a", "b"])
    footer = pyarrow.parquet.read_metadata(file)
    true = thrift_number(footer.row_group(0).column(0).total_uncompressed_size)
    false = bytearray(thrift_number(1000).ljust(len(true), b"\x80"))
    false[1] |= 0x80
    false[-1] = 0
    contents = file.read_bytes()
    assert contents.count(true) == 1
    file.write_bytes(contents.replace(true, false))
    footer = pyarrow.parquet.read_metadata(file)
    assert footer.row_group(0).column(0).total_uncompressed_size == 1000
    first, second = open_source(f"parquet:{tmp_path}")
    assert first.kind == second.kind == "damaged row"
    assert re.search(r"row group 0: image expands from [\d,]+ to 60,000,\d+ bytes", first.detail)


def thrift_number(number):
    number, result = 2 * number, b""
    while number > 127:
        number, result = number >> 7, result + bytes([number & 127 | 128])
    return result + bytes([number])


def test_a_page_header_of_any_kinds_of_fields_is_read():
    """Thrift passes over fields that it does not know, and takes the last of two of a number."""
    unknown = (
        b"\x11\x12"  # true, false
        b"\x13\7\x17" + bytes(8) + b"\x18\3abc"  # a byte, a double, bytes
        b"\x19\x28\1a\1b\x1a\xf1\x10"
        + bytes(16)  # a list of bytes, a set of 16 truth values
        + b"\x1b\1\x8c\1a\x15\2\0"  # a map from bytes to a struct of one number
        b"\x1c\x1c\x15\2\0\0"  # a struct in a struct
    )
    sizes = b"\x05\4\x0e\x05\6\x06\x05\4" + thrift_number(1000)  # field 2: 7, field 3: 3, field 2: 1000
    page = unknown + sizes + b"\0" + b"abc"
    end = 2 * len(page)
    assert expanded_bytes(io.BytesIO(page + page), 0, end) == 2000
    assert expanded_bytes(io.BytesIO(page + b"\x1e" + page), 0, end + 1) == 1000  # a kind that there is not
    assert expanded_bytes(io.BytesIO(page + page[:-5]), 0, end) == 1000
    assert expanded_bytes(io.BytesIO(b"\x1c" * 100_000), 0, 100_000) == 0


def test_values_that_come_again_and_again_in_parquet_are_bad_records(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "EXPANDED", 2**16)
    for name in ("a", "b"):
        values = {"image": repeated(bytes(10**4), 100), "caption": repeated("x", 100)}
        write_parquet(tmp_path / f"{name}.parquet", **values)
    size = (tmp_path / "a.parquet").stat().st_size
    records = list(open_source(f"parquet:{tmp_path}"))
    assert len(records) == 200
    num_whole = max(50 * size, 2**16) // 10_001
    assert 5 < num_whole < 50
    for of_file in (records[:100], records[100:]):
        assert all(isinstance(record, Pair) for record in of_file[:num_whole])
        assert {record.kind for record in of_file[num_whole:]} == {"damaged row"}
    assert f"a.parquet, row group 0: its {size:,} bytes expand to" in records[99].detail


def test_a_row_group_of_parquet_has_not_any_number_of_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LIST_VALUES", 9)
    write_parquet(tmp_path / "x.parquet", image=[b"x"], captions=one_list(repeated("a", 10)))
    (bad,) = open_source(f"parquet:{tmp_path}")
    assert (
        bad.kind == "damaged row" and "has 10 values, and 9 may be read at once: write smaller" in bad.detail
    )


def test_parquet_of_more_rows_than_bytes_is_refused(tmp_path):
    write_parquet(tmp_path / "x.parquet", image=pyarrow.nulls(10_000, "binary"), text=repeated("x", 10_000))
    with pytest.raises(ValueError, match=r"x.parquet of \S+ bytes claims 10,000 rows"):
        open_source(f"parquet:{tmp_path}")


def write_arrow(folder, compression=None, **columns):
    """A folder of `datasets` whose one stream has these columns; returns the stream's file."""
    fuzz.write_huggingface(folder)
    file, table = folder / "data-00000-of-00002.arrow", pyarrow.table(columns)
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with file.open("wb") as opened, pyarrow.ipc.new_stream(opened, table.schema, options=options) as stream:
        stream.write_table(table)
    state = folder / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": file.name}]}))
    return file


def test_what_an_arrow_stream_claims_is_not_believed(tmp_path):
    spec, values = f"huggingface:{tmp_path}", {"image": [b"x", b"y"], "text": ["one", "second"]}
    file = write_arrow(tmp_path, "zstd", image=[bytes(10**8)], text=["x"])
    with pytest.raises(ValueError, match="data-00000-of-00002.arrow is not .*: it is compressed: save the"):
        open_source(spec)
    write_arrow(tmp_path, image=[b"x"], text=pyarrow.array(["x"]).dictionary_encode())
    with pytest.raises(ValueError, match="it has a dictionary, and batches of rows alone are read"):
        open_source(spec)
    contents = write_arrow(tmp_path, **values).read_bytes()
    assert [record.captions for record in open_source(spec)] == [("one",), ("second",)]
    for damaged in (contents[:-8], contents + contents):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match="arrow is cut off or goes on after its end, byte .*: copy it again"
        ):
            open_source(spec)
    ends = np.array([0, 3, 9], np.int32).tobytes()
    assert contents.count(ends) == 1
    file.write_bytes(contents.replace(ends, np.array([0, 3, 2**30], np.int32).tobytes()))
    assert [(bad.id, bad.kind) for bad in open_source(spec)] == [
        (f"{file.name}:{i}", "damaged row") for i in (0, 1)
    ]
    file.write_bytes(contents.replace(b"onesecond", b"one\xffecond"))
    good, bad = open_source(spec)
    assert good.captions == ("one",) and bad.kind == "invalid text"
    write_arrow(tmp_path, image=pyarrow.array([None] * 9999, "binary"), text=pyarrow.nulls(9999, "string"))
    rows, more = (np.array([number], np.int64).tobytes() for number in (9999, 9_999_999))
    file.write_bytes(file.read_bytes().replace(rows, more, 1))
    with pytest.raises(ValueError, match="bytes claims 9,999,999 rows: no image and caption take less"):
        open_source(spec)


def test_a_folder_of_hugging_face_names_its_own_files(tmp_path):
    file = write_arrow(tmp_path / "data", image=[b"x"], text=["x"])
    file.rename(tmp_path / "other.arrow")
    link(file, "../other.arrow")
    with pytest.raises(ValueError, match="has a link, .*00002.arrow: remove it, or add .follow_links=true"):
        open_source(f"huggingface:{tmp_path}/data")
    assert len(open_source(f"huggingface:{tmp_path}/data?follow_links=true")) == 1
    (tmp_path / "data" / "state.json").write_text('{"_data_files": [{"filename": "../other.arrow"}]}')
    with pytest.raises(ValueError, match=r"state.json names '../other.arrow', no file beside it"):
        open_source(f"huggingface:{tmp_path}/data")


@pytest.mark.parametrize(("times", "unit"), [([0, 2**62 + 1], "ns"), ([0, 2**60], "us")])
def test_times_as_ids_of_parquet_are_text(tmp_path, times, unit):
    write_parquet(tmp_path / "x.parquet", image=2 * [b"x"], text=["a", "b"], id=pyarrow.array(times, "int64"))
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    table = table.set_column(2, "id", table["id"].cast(pyarrow.timestamp(unit)))
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    first, second = open_source(f"parquet:{tmp_path}")
    assert first.id.startswith("1970-01-01") and isinstance(second, Pair)


def test_fields_of_one_name_in_parquet_are_damage(tmp_path):
    image = pyarrow.StructArray.from_arrays(2 * [pyarrow.array([b"x"])], names=2 * ["bytes"])
    write_parquet(tmp_path / "x.parquet", image=image, text=["x"])
    (bad,) = open_source(f"parquet:{tmp_path}")
    assert bad.kind == "damaged row" and "duplicate field names" in bad.detail


def test_the_captions_of_a_record_are_limited(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    for captions, kind in (
        (1001 * ["a"], "too many captions"),
        (["a" * 60_000, "b" * 60_000], "too much text"),
    ):
        (tmp_path / "a.txt").write_text("\n".join(captions))
        (bad,) = open_source(f"folder:{tmp_path}")
        assert bad.kind == kind


def test_the_records_of_a_prepared_set_are_limited(tmp_path, monkeypatch):
    """They may lie compressed in its files."""
    out = str(tmp_path / "out")
    prepare(open_source("digit_scenes:train?pairs=1"), out)
    found = Records(out)
    for module, name, most, message in (
        (array_record_chunks, "MAX_BYTES", 100, "bytes, of which 100 may be read"),
        (base, "MAX_TEXT", 5, "characters, of which 5 may be read"),
        (base, "MAX_CAPTIONS", 0, "1, of which 0 may be read"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, most)
            with pytest.raises(ValueError, match=f"record 0 of {out} cannot be read .*{message}"):
                found[0]
    assert found[0]["captions"]


def test_tokens_of_other_captions_are_told(tmp_path, monkeypatch):
    prepare(open_source("digit_scenes:train?pairs=1"), str(tmp_path / "out"), pixels=16)
    found = Records(str(tmp_path / "out"))
    assert len(found[0]["tokens"]) == 1
    monkeypatch.setattr(records, "CAPTION_END", 0)
    with pytest.raises(ValueError, match="it has 1 captions and the tokens of 0"):
        found[0]


def test_captions_of_any_source_are_limited_as_they_are_prepared(tmp_path):
    (pair,) = open_source("digit_scenes:train?pairs=1")
    source = [pair, pair._replace(id="b", captions=("long " * 20_001,))]
    report = prepare(source, str(tmp_path / "out"), max_bad_fraction=0.5)
    assert report["bad_by_kind"] == {"too much text": 1}


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_a_large_record_of_tfds_is_a_bad_record(tmp_path, monkeypatch, form):
    _, (spec, _, _) = prepared_by_tfds(tmp_path, form)
    for module in (array_record_chunks, tfds):
        monkeypatch.setattr(module, "MAX_BYTES", 100)
    assert {record.detail.partition(" bytes, ")[2] for record in open_source(spec)} == {
        "of which 100 may be read"
    }


def entries_of_one_image(folder, kind):
    """Writes a source of five entries with the same image and one with another; returns its file."""
    names = ["a.png", "./a.png", ".//a.png", "linked.png", "a.png", "b.png"]
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"image")
    os.link(folder / "a.png", folder / "linked.png")
    file = folder / "entries"
    if kind == "csv":
        file.write_text("image,caption\n" + "".join(f"{name},text\n" for name in names))
    elif kind == "parquet":
        file = folder / "entries.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": names, "caption": 6 * ["text"]}), file)
    elif kind == "sharegpt4v":
        conversations = [{"from": "gpt", "value": "text"}]
        entries = [{"id": i, "image": name, "conversations": conversations} for i, name in enumerate(names)]
        file.write_text(json.dumps(entries))
    else:
        images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
        annotations = [{"image_id": i, "caption": "text"} for i in range(len(names))]
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return file


@pytest.mark.parametrize("kind", ["csv", "parquet", "sharegpt4v", "coco"])
def test_bytes_of_images_that_are_named_again_are_limited(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "REPEATED", 10)
    monkeypatch.setattr(base, "REPETITION", 1)
    source = open_source(f"{kind}:{entries_of_one_image(tmp_path, kind)}?images={tmp_path}")
    for _ in range(2):  # each iteration counts anew
        *pairs, fourth, fifth, other = source
        assert {bad.kind for bad in (fourth, fifth)} == {"one image too often"}
        assert not any(getattr(record, "kind", "") == "one image too often" for record in pairs)
        assert isinstance(other, Pair)


@pytest.mark.parametrize("kind", ["csv", "sharegpt4v", "coco"])
def test_a_file_of_captions_has_a_limited_size(kind, tmp_path, monkeypatch):
    file = entries_of_one_image(tmp_path, kind)
    line = f"{kind}:{file}?images={tmp_path}"
    monkeypatch.setenv(files.MAX_ANNOTATION_BYTES, str(file.stat().st_size))
    assert len(open_source(line))
    monkeypatch.setenv(files.MAX_ANNOTATION_BYTES, str(file.stat().st_size - 1))
    message = (
        f"bytes, of which {file.stat().st_size - 1:,} may be read: set the .* CLIPMOE_MAX_ANNOTATION_BYT"
    )
    with pytest.raises(ValueError, match=message):
        open_source(line)
    monkeypatch.undo()
    os.truncate(file, 2**31)
    with pytest.raises(ValueError, match="has 2,147,483,648 bytes and only 4,096 of them on the disk"):
        open_source(line)


def test_json_of_data_sets_has_a_limited_size(tmp_path):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "theirs", "array_record")
    prepare(open_source("digit_scenes:train?pairs=1"), out := str(tmp_path / "ours"))
    for open_set, folder in ((lambda: open_source(spec), "theirs"), (lambda: Records(out), "ours")):
        (features,) = (tmp_path / folder).rglob("features.json")
        os.truncate(features, checks.MAX_BYTES + 1)
        with pytest.raises(ValueError, match="features.json has 67,108,865 bytes, of which 67,108,864 may"):
            open_set()


def test_pixels_of_images_that_are_named_again_are_limited(tmp_path):
    """67 million pixels of 8 kB take half a second each time; a photograph's take no more than its bytes."""
    Image.new("1", (8192, 8192)).save(tmp_path / "flat.png")
    Image.effect_noise((400, 400), 50).save(tmp_path / "photograph.png")
    entries = [base.Entry(str(i), name, "t") for i in range(50) for name in ("flat.png", "photograph.png")]
    records = list(base.Images(str(tmp_path)).pairs(entries))
    bad = [record.id for record in records if isinstance(record, BadRecord)]
    assert bad == [str(i) for i in range(16, 50)]  # 15 times 67 million and the bytes are not quite 2**30


def test_a_sparse_image_file_is_a_bad_record(tmp_path):
    for name in ("a", "b"):
        with (tmp_path / f"{name}.png").open("wb") as file:
            file.write(4096 * b"x")
            file.truncate(2**26 if name == "a" else 2**15)
        (tmp_path / f"{name}.txt").write_text("text")
    sparse, other = open_source(f"folder:{tmp_path}")
    assert sparse.kind == "a sparse file" and "67,108,864 bytes and only 4,096 of them on" in sparse.detail
    assert isinstance(other, Pair) and len(other.image) == 2**15  # holes alone do no harm


def header(name, kind=tarfile.REGTYPE, contents=b"", **fields):
    """A tar header and what follows it; fields: bytes to put in its place, by where it begins."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, len(contents)
    block = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    for place, value in fields.items():
        start = {"size": 124, "sparse": 386}[place]
        block[start : start + len(value)] = value
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    return bytes(block) + contents + bytes(-len(contents) % 512)


def pax(key, value):
    record = f" {key}={value}\n"
    length = len(record) + 2
    length += len(str(length)) - 2 if len(str(length)) > 2 else 0
    return header("pax", tarfile.XHDTYPE, f"{length}{record}".encode())


PIECE = header("1.jpg", contents=b"x")
HEADERS = {
    "a long name of any size": header(
        "L", tarfile.GNUTYPE_LONGNAME, size=b"\x80" + bytes(3) + b"\x10" + bytes(7)
    ),
    "a size below zero": header("1.jpg", size=b"\xff" * 11 + b"\0"),
    "pax size below zero": pax("size", "-1024") + PIECE,
    "pax size of many digits": pax("size", "9" * 5000) + PIECE,
    "pax size past the end": pax("size", "9" * 18) + PIECE,
    "pax size of another script": pax("size", "٣") + PIECE,
    "pax record of no length": header("pax", tarfile.XHDTYPE, b"0 path=x\n") + PIECE,
    "pax record without a space": header("pax", tarfile.XHDTYPE, b"9" * 100_000) + PIECE,
    "pax record of spaces": header("pax", tarfile.XHDTYPE, b" " * 100_000) + PIECE,
    "sparse pax without a map": pax("GNU.sparse.major", "1") + PIECE,
    "sparse pax with odd numbers": pax("GNU.sparse.map", "1,b,3") + PIECE,
    "a sparse map that goes on": header("1.jpg", tarfile.GNUTYPE_SPARSE, sparse=b"7" * 109) + b"\1" * 512,
    "names of names": 3000 * header("L", tarfile.GNUTYPE_LONGNAME, b"1.jpg") + PIECE,
    "headers of headers": 3000 * pax("comment", "x") + PIECE,
    "a hard link to itself": header("1.jpg", tarfile.LNKTYPE),
    "nothing after a long name": header("L", tarfile.GNUTYPE_LONGNAME, b"1.jpg"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_a_shard_costs_nobody_else_a_sample(name, tmp_path):
    sample = header("0.jpg", contents=b"image") + header("0.txt", contents=b"text")
    (tmp_path / "a.tar").write_bytes(sample + HEADERS[name] + bytes(1024))
    (tmp_path / "b.tar").write_bytes(sample + bytes(1024))
    began = time.perf_counter()
    source = open_source(f"webdataset:{tmp_path}")
    records = list(source)
    first, *bad, last = records
    assert len(source) == len(records) and time.perf_counter() - began < 5
    assert (first, last) == (Pair("a/0", b"image", ("text",)), Pair("b/0", b"image", ("text",)))
    assert [record.kind for record in bad] in (["damaged shard"], ["missing caption"])


def test_a_sample_of_very_many_members_has_short_bad_records(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for i in range(300):
            shard.addfile(tarfile.TarInfo(f"0.{i:0100}.jpg"))
    with pytest.raises(ValueError, match="no usable pair in 300 records"):
        prepare(open_source(f"webdataset:{tmp_path}"), str(tmp_path / "out"), max_bad_fraction=1)
    told = (tmp_path / "out.unfinished" / "bad_records.jsonl").read_text().splitlines()
    assert len(told) == 300 and max(map(len, told)) < 1200


def test_large_members_of_a_shard_are_not_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, size in (("0.jpg", 1), ("0.txt", 2**23 + 1), ("0.npy", 1), ("1.jpg", 1), ("1.txt", 2)):
            member = tarfile.TarInfo(name)
            member.size = size
            shard.addfile(member, io.BytesIO(b"x" * size))
    large, good = open_source(f"webdataset:{tmp_path}")
    assert large.kind == "too large a file" and good.captions == ("xx",)


def pair_beside(folder):
    folder.mkdir(exist_ok=True)
    (folder / "0.png").write_bytes(b"image")
    (folder / "0.txt").write_text("text")
    return folder


def link(path, target):
    path.symlink_to(target)


def secret(folder):
    (folder.parent / "secret").write_text("secret")
    return "../secret"


def sparse(path):
    path.touch()
    os.truncate(path, 2**40)


ODD_FILES = {
    "captions are a link": ("1.txt", lambda path: link(path, secret(path.parent)), "a link"),
    "captions are a device": ("1.txt", lambda path: link(path, "/dev/zero"), "a link"),
    "captions are a pipe": ("1.txt", os.mkfifo, "not a file"),
    "captions are a folder": ("1.txt", os.mkdir, "missing caption"),
    "captions are sparse": ("1.txt", sparse, "too large a file"),
    "the image is a link": ("1.png", lambda path: link(path, secret(path.parent)), "a link"),
    "the image is a pipe": ("1.png", os.mkfifo, "not a file"),
    "the image is sparse": ("1.png", sparse, "too large a file"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_what_is_no_plain_file_is_a_bad_record(name, tmp_path):
    file, make, kind = ODD_FILES[name]
    folder = pair_beside(tmp_path / "pairs")
    make(folder / file)
    for other in {"1.png", "1.txt"} - {file}:
        (folder / other).write_text("text")
    good, bad = open_source(f"folder:{folder}")
    assert good == Pair("0.png", b"image", ("text",)) and (bad.id, bad.kind) == ("1.png", kind)


def test_links_are_read_where_they_are_meant_but_devices_are_not(tmp_path):
    folder = pair_beside(tmp_path / "pairs")
    pair_beside(tmp_path / "other")
    link(folder / "linked", "../other")
    link(folder / "again", "../pairs")
    link(folder / "1.png", "0.png")
    link(folder / "1.txt", "/dev/zero")
    records = list(open_source(f"folder:{folder}?follow_links=true"))
    assert [record.id for record in records] == ["0.png", "1.png", "linked/0.png"]
    assert records[1].kind == "not a file"
    assert list(open_source(f"folder:{folder}", follow_links=True)) == records
    with pytest.raises(ValueError, match=r"has a linked folder, .*: remove it, or add .follow_links=true"):
        open_source(f"folder:{folder}?follow_links=false", follow_links=True)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/*/0.tar"])
def test_linked_shards_are_told(pattern, tmp_path):
    pair_beside(tmp_path / "elsewhere")
    with tarfile.open(tmp_path / "elsewhere" / "0.tar", "w") as shard:
        shard.add(tmp_path / "elsewhere" / "0.png", "0.png")
        shard.add(tmp_path / "elsewhere" / "0.txt", "0.txt")
    (tmp_path / "shards").mkdir()
    if pattern == "/*/0.tar":
        link(tmp_path / "shards" / "a", "../elsewhere")
    else:
        link(tmp_path / "shards" / "0.tar", "../elsewhere/0.tar")
    spec = f"webdataset:{tmp_path}/shards{pattern}"
    with pytest.raises(ValueError, match=r"has a link, .*0.tar: remove it, or add .follow_links=true"):
        open_source(spec)
    assert len(open_source(spec, follow_links=True)) == 1
    if not pattern:  # a file that is itself named may be a link
        assert len(open_source(f"{spec}/0.tar")) == 1


@pytest.mark.parametrize("kind", ["webdataset:{}", "parquet:{}"])
def test_a_pipe_among_shards_is_told(kind, tmp_path):
    os.mkfifo(tmp_path / f"0.{'tar' if kind.startswith('web') else 'parquet'}")
    with pytest.raises(ValueError, match="is no plain file: remove it"):
        open_source(kind.format(tmp_path))


def test_what_is_no_plain_file_in_a_data_set_of_tfds_is_told(tmp_path):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "data", "array_record")
    (features,) = (tmp_path / "data").rglob("features.json")
    features.rename(tmp_path / "features.json")
    link(features, tmp_path / "features.json")
    with pytest.raises(ValueError, match="tfds:my_captions has a link, .*features.json: remove it, or add"):
        open_source(spec)
    assert len(open_source(f"{spec}&follow_links=true"))
    features.unlink()
    os.mkfifo(features)
    with pytest.raises(ValueError, match="features.json is no plain file: remove it"):
        open_source(spec)


def test_a_pipe_in_a_prepared_set_is_told(tmp_path):
    (tmp_path / "set" / "pairs" / "1.0.0").mkdir(parents=True)
    os.mkfifo(tmp_path / "set" / "pairs" / "1.0.0" / "features.json")
    with pytest.raises(ValueError, match="features.json is no plain file"):
        Records(str(tmp_path / "set"), "val")


def test_a_stamp_does_not_go_where_links_lead(tmp_path):
    folder = pair_beside(tmp_path / "pairs")
    before = source_stamp(f"folder:{folder}")
    link(folder / "root", "/")  # would take minutes
    assert source_stamp(f"folder:{folder}") == before
    with pytest.raises(ValueError, match="has a linked folder"):
        open_source(f"folder:{folder}")


TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "filepathTemplate",
            f"../../../secret/{TEMPLATE}",
            "outside of its folder",
        ),
        (
            "filepathTemplate",
            f"/secret/{TEMPLATE}",
            "outside of its folder",
        ),
        ("filepathTemplate", "{SPLIT:>99999999999}", "outside of its folder, or none"),
        ("filepathTemplate", "{NOTHING}-{SPLIT}", "does not say where its files are"),
        ("shardLengths", ["999999999999999999"], "999,999,999,999,999,999 records in files of"),
        ("shardLengths", ["-5"], "tfds:my_captions: its dataset_info.json has a file of -5 records"),
    ],
)
def test_a_data_set_of_tfds_names_its_own_files_and_counts_them(tmp_path, field, value, message):
    _, (spec, _, _) = prepared_by_tfds(tmp_path / "data", "array_record")
    (file,) = (tmp_path / "data").rglob("dataset_info.json")
    info = json.loads(file.read_text())
    info["splits"][0][field] = value
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=message):
        open_source(spec)
