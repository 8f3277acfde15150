"""Arrays in files: what comes back, and what is said of damaged files."""

import io
import re
import struct
import zipfile

import numpy as np
import pytest
from etils import epath

from clipmoe_jax.core import checks
from clipmoe_jax.data import npy

ARRAY = np.arange(24, dtype=np.float16).reshape(4, 6)


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def npz_bytes(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


NPY, NPZ = npy_bytes(ARRAY), npz_bytes(known=ARRAY, other=np.zeros(3))
HUGE = NPY.replace(b"(4, 6)", b"(9999999999999, 6)").replace(b" " * 11 + b"\n", b"\n")
DAMAGED = {
    "empty": b"",
    "cut in its magic": NPY[:4],
    "cut in its header": NPY[:30],
    "cut in its data": NPY[:-5],
    "no literal": flipped(NPY, 10),
    "no dtype": flipped(NPY, NPY.index(b"f2")),
    "a huge shape": HUGE,
    "pickled": npy_bytes(np.array([{"a": 1}], object)),
    "text": b"hello",
}


@pytest.mark.parametrize("load", [npy.load_array, npy.map_array])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_npy_is_named_in_one_line(tmp_path, load, content):
    path = epath.Path(tmp_path / "labels.npy")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged or no file of NumPy's: ") as e:
        load(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("load", [npy.load_array, npy.map_array])
def test_array_comes_back(tmp_path, load):
    path = epath.Path(tmp_path / "labels.npy")
    path.write_bytes(NPY)
    np.testing.assert_array_equal(load(path), ARRAY)


DAMAGED_ARCHIVES = {
    "empty": b"",
    "cut off": NPZ[:-30],
    "damaged data": flipped(NPZ, 120),
    "an array alone": NPY,
    "text": b"hello",
    "zeros": bytes(300),
    "pickled": npz_bytes(known=np.array([{"a": 1}], object)),
}


@pytest.mark.parametrize("content", DAMAGED_ARCHIVES.values(), ids=DAMAGED_ARCHIVES)
def test_damaged_npz_is_named_in_one_line(tmp_path, content):
    path = epath.Path(tmp_path / "arrays.npz")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is damaged or no file of NumPy's: ") as e:
        npy.load_arrays(path)
    assert "\n" not in str(e.value)


def write_npz(path, **contents):
    """An archive of these .npy files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
    return epath.Path(path)


def claims(shape, descr="<f8"):
    """The header of an array that is not there."""
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (118 - len(text) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_arrays_that_nobody_asks_for_are_not_read(tmp_path):
    file = write_npz(tmp_path / "x.npz", known=NPY, huge=claims((2**40,)), broken=b"no array")
    found = npy.load_arrays(file, {"known": (4, 6)})
    assert list(found) == ["known"]
    np.testing.assert_array_equal(found["known"], ARRAY)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"b": NPY}, r"must have an array 'a' of shape \(2, 3\)"),
        ({"a": NPY}, r"array 'a' is float16 \(4, 6\), not real numbers \(2, 3\)"),
        ({"a": claims((2**40,))}, r"array 'a' is float64 \(1099511627776,\), not real"),
        ({"a": claims((2, 3), "S1000000000")}, r"array 'a' is \|S1000000000 \(2, 3\), not real"),
        ({"a": npy_bytes(np.array(2 * [3 * [{}]]))}, r"array 'a' is object \(2, 3\), not real"),
        ({"a": claims((2, 3))}, "x.npz is damaged"),
        ({"a": b"no array"}, "x.npz is damaged.*magic"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_their_header(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        npy.load_arrays(write_npz(tmp_path / "x.npz", **contents), {"a": (2, 3)})


@pytest.mark.parametrize("shapes", [None, {"a": (1 << 20,)}], ids=["all", "asked"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_archives_that_expand_without_bound_are_refused(tmp_path, monkeypatch, compression, shapes):
    monkeypatch.setattr(checks, "EXPANDED", 1 << 16)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("a.npy", npy_bytes(np.zeros(1 << 20, np.uint8)))
    with pytest.raises(ValueError, match="x.npz is damaged.* (compressed as|expand to 1,048,)"):
        npy.load_arrays(epath.Path(tmp_path / "x.npz"), shapes)


@pytest.mark.parametrize("shapes", [None, {"a": (4, 6)}], ids=["all", "asked"])
@pytest.mark.parametrize("beside", ["a", "a.npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_numpy_takes_for_another_are_refused(tmp_path, beside, shapes):
    file = write_npz(tmp_path / "x.npz", a=NPY)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(beside, npy_bytes(np.zeros(9)))
    with pytest.raises(ValueError, match="x.npz is damaged.* holds other than arrays, or two of one name"):
        npy.load_arrays(file, shapes)
