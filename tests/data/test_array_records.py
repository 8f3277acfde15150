"""Files of ArrayRecord: what a chunk expands to is known before the library expands it."""

import base64
import types
import zlib

import numpy as np
import pytest
from array_record.python import array_record_module

from clipmoe_jax.core import checks
from clipmoe_jax.data.array_records import ArrayRecords

# A whole file of two records, "hello" and "world". Its footer says that the second begins at byte
# 300 million, and the library takes as much memory for the first.
FAR = (
    "c-"
    "rmJJ!n&56b9hjhJ<V7LZB)c6ch|Dp;QD#@TV>!!L8unB>2+`SDM~H+$2RsDK2&hLI+!%bdfrWL$s43LMIiWw9pDx97II~jU"
    "u^s5Oj8Vp5=V+;XTuL`F?#dx?Ve+OAV*<=EElkrmwBs&Gsv|2RiTO7m`NqPlu{|j*mXuG!mxy+p7m_N9GUCBtb71vSLseI~"
    "&L2U(cUf-"
    "+6lNW!9hTeyE;njvf0;|KfNOpZUHz^JZ`3M7S+oZ|Urq8XCA$N%Fm1&ieVV*xz3agHm6)FB~ov%0bv_wc5e&*XYvz#pd%L6"
    "Q8=hZl`&5dBcU-FZCP%0000000000000000000000000000000000000000000000000000000000000000000000000000"
    "05~+lY`r*UY}gga-7cE^5z?lEB98bX}&dG`8c`pb0f+3@~-"
    "S4A4O3(8<dth@4HuCEIgg~ci4JqWUzg7t{wmEoeu4eYWrHnw{_nD0000000000000000000000000000000000000000000"
    "00000000000000000000000000000000008jc{Q|}1XHE"
)


def write(path, options, records):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return opened(path, len(records))


def opened(path, num_records):
    return ArrayRecords([types.SimpleNamespace(filename=str(path), skip=0, take=num_records)])


@pytest.mark.parametrize(
    "options",
    [
        "group_size:1",  # TFDS's
        "group_size:1,uncompressed",
        "group_size:1,brotli",
        "group_size:1,snappy",
        "group_size:7",
        "group_size:1,pad_to_block_boundary:true",
    ],
)
@pytest.mark.parametrize(("number", "most"), [(1, 10), (20, 100_000), (5000, 40)], ids=str)
def test_what_the_library_writes_is_read(tmp_path, options, number, most):
    if "pad" in options:
        number = min(number, 20)
    rng = np.random.default_rng(0)
    written = [rng.bytes(rng.integers(most)) for _ in range(number)]
    found = write(tmp_path / "file", options, written)
    places = {*range(0, number, 53), number - 1}
    assert [found[i] for i in places] == [written[i] for i in places]


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,brotli", "group_size:4"])
def test_a_chunk_that_expands_to_far_more_is_not_expanded(tmp_path, monkeypatch, options):
    monkeypatch.setattr(checks, "EXPANDED", 2**16)
    found = write(tmp_path / "file", options, [bytes(2**20)] * 4)
    with pytest.raises(ValueError, match="its [0-9,]+ bytes expand to [0-9,]+ bytes, more than 50 times"):
        found[3]


def test_a_transposed_chunk_is_refused(tmp_path):
    """The library does not hold it to what its header says."""
    found = write(tmp_path / "file", "group_size:1,transpose:true", [b"record"])
    with pytest.raises(ValueError, match="the chunk at byte 64 is not a simple one: write it without transp"):
        found[0]


def test_a_footer_that_leads_out_of_the_file_is_told(tmp_path):
    (tmp_path / "file").write_bytes(zlib.decompress(base64.b85decode(FAR)))
    with pytest.raises(ValueError, match="it does not say where its chunks are"):
        opened(tmp_path / "file", 2)[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\x18\x01", b"\x18\x00", "it does not say where its chunks are"),  # no records
        (b"a\x06\x06", b"a\x07\x05", "it does not say where its chunks are"),  # where records end
        (b"\x08\x01\x10\x02", b"\x08\x01\x10\x03", "its footer has other chunks than it says"),
        (b'\x18\x02"', b"\x18\x02*", "its footer is not that of an ArrayRecord file"),
        (b"\x08@\x10", b"\x10@\x10", "it does not say where its chunks are"),
    ],
)
def test_a_damaged_footer_is_told(tmp_path, old, new, message):
    write(path := tmp_path / "file", "group_size:1,uncompressed", [b"hello", b"world"])
    start, _, end = path.read_bytes().rpartition(old)
    path.write_bytes(start + new + end)
    with pytest.raises(ValueError, match=message):
        opened(path, 2)[0]


@pytest.mark.parametrize("length", [0, 100, 65536, 131071])
def test_a_file_that_is_cut_off_is_told(tmp_path, length):
    write(path := tmp_path / "file", "group_size:1", [b"hello"])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="file is damaged .it is cut off.: copy it again, or make it again"):
        opened(path, 1)[0]
