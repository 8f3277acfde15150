"""TorchScript archives: the tensors that torch.jit.load gives, and none of their code runs."""

import pathlib
import shutil
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from etils import epath

from clipmoe_jax.interop.tensor_files import open_tensors


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        whole = torch.arange(24.0).reshape(4, 6)
        self.weight = torch.nn.Parameter(whole)
        self.register_buffer("transposed", whole.half().t())
        self.register_buffer("part", whole.to(torch.bfloat16)[1:3, 2:5])
        self.register_buffer("number", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.sizes = [1, 2, 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.sizes[0]


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.blocks = torch.nn.Sequential(Inner(), Inner())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("archive") / "model.pt"
    torch.jit.script(Outer()).save(str(path))
    return path


def test_tensors_are_those_of_torch(archive):
    found = open_tensors(epath.Path(archive))
    expected = torch.jit.load(str(archive)).state_dict()
    assert found.keys() == expected.keys() and "blocks.1.part" in found
    for name, tensor in expected.items():
        array = found[name].read()
        assert array.shape == found[name].shape == tuple(tensor.shape), name
        assert (array.dtype == ml_dtypes.bfloat16) == (tensor.dtype == torch.bfloat16), name
        np.testing.assert_array_equal(np.float64(array), tensor.detach().double().numpy(), err_msg=name)


def test_code_of_the_archive_does_not_run(tmp_path):
    trace = str(tmp_path / "it_ran")

    class Hostile(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.path = trace

        @torch.jit.export
        def __getstate__(self):
            return self.weight, self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
            self.weight, self.path, self.training = state
            torch.save(self.weight, self.path)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Hostile()).save(str(tmp_path / "hostile.pt"))
    torch.jit.load(str(tmp_path / "hostile.pt"))  # runs it
    pathlib.Path(trace).unlink()
    with pytest.raises(ValueError, match="hostile.pt is a TorchScript archive .*: it holds no tensors"):
        open_tensors(epath.Path(tmp_path / "hostile.pt"))
    assert not pathlib.Path(trace).exists()


def changed(archive, path, name, contents, compress=zipfile.ZIP_STORED):
    """Copies an archive with other contents of one of its files."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            is_it = entry.filename == f"model/{name}"
            kind = compress if is_it else zipfile.ZIP_STORED
            new.writestr(entry.filename, contents(old.read(entry)) if is_it else old.read(entry), kind)
    return epath.Path(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (
            lambda old: b"cos\nsystem\n(S'touch it_ran'\ntR.",
            "it wants os.system, which no model's state needs",
        ),
        (lambda old: b"cbuiltins\neval\n(S'1'\ntR.", "it wants builtins.eval"),
        (lambda old: b"ctorch\nload\n(S'1'\ntR.", "it wants torch.load"),
        (lambda old: old[: len(old) // 2], "cannot be read"),
        (lambda old: b"", "cannot be read"),
        (lambda old: b"\x80\x02}.", "it holds no tensors"),
        # A module that holds itself: NEWOBJ, its state {"a": it}.
        (
            lambda old: b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
            "nested without end",
        ),
        (
            lambda old: old.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor_x"),
            "it wants torch._utils._rebuild_q",
        ),
    ],
    ids=["system", "eval", "load", "cut", "empty", "a dict", "no end", "another tensor"],
)
def test_damaged_and_hostile_pickles_are_refused_in_one_line(archive, tmp_path, contents, message):
    path = changed(archive, tmp_path / "other.pt", "data.pkl", contents)
    with pytest.raises(ValueError, match=message):
        open_tensors(path)
    assert not (tmp_path / "it_ran").exists()


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


FLOATS, ZERO = b"ctorch\nFloatStorage\n", text(b"0")
# 45 tuples, each twice in the next.
SHARED = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(45))


def storage(kind=FLOATS, name=ZERO):
    return b"(" + text(b"storage") + kind + name + text(b"cpu") + b"K\1tQ"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"}" + SHARED + b"K\1s.", "a tuple holds more than 10,000 tuples"),
        (storage(name=SHARED) + b".", "a tuple holds more than 10,000 tuples"),
        (storage(kind=SHARED) + b".", "a tuple holds more than 10,000 tuples"),
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"K\0" + SHARED + b")\x89NtR.",
            "a tuple holds more than 10,000 tuples",
        ),
        (FLOATS + b"(](K\1etR.", "not callable"),  # NumPy would make an array of the list
    ],
    ids=["key of a dict", "name of a storage", "type of a storage", "shape", "call of a type"],
)
def test_a_pickle_that_takes_for_ever_is_refused(archive, tmp_path, contents, message):
    path = changed(archive, tmp_path / "other.pt", "data.pkl", lambda _: b"\x80\x02" + contents)
    with pytest.raises(
        ValueError, match=f"other.pt is a TorchScript archive that cannot be read: .*{message}"
    ):
        open_tensors(path)


def test_a_pickle_takes_no_room_for_values_that_it_lacks(archive, tmp_path):
    contents = b"\x80\x02K\1r" + struct.pack("<I", 2**24) + b"."  # remembers a number as the 2**24th value
    path = changed(archive, tmp_path / "other.pt", "data.pkl", lambda _: contents)
    tracemalloc.start()
    with pytest.raises(ValueError, match="it holds no tensors"):
        open_tensors(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_a_compressed_storage_is_refused(archive, tmp_path):
    path = changed(archive, tmp_path / "bomb.pt", "data/0", lambda old: bytes(10**8), zipfile.ZIP_DEFLATED)
    assert path.stat().length < 10**6
    tensors = open_tensors(path)
    with pytest.raises(ValueError, match="data/0 is compressed"):
        for tensor in tensors.values():
            tensor.read()


def test_a_tensor_outside_its_storage_is_refused(archive, tmp_path):
    path = changed(archive, tmp_path / "short.pt", "data/0", lambda old: old[:8])
    with pytest.raises(ValueError, match="data/0 holds 2 numbers, too few for shape"):
        for tensor in open_tensors(path).values():
            tensor.read()


@pytest.mark.parametrize("damage", ["a flipped bit", "no storage"])
def test_a_damaged_storage_is_told_in_one_line(archive, tmp_path, damage):
    path = tmp_path / "damaged.pt"
    if damage == "no storage":
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                if entry.filename != "model/data/0":
                    new.writestr(entry.filename, old.read(entry))
    else:
        contents = archive.read_bytes()
        with zipfile.ZipFile(archive) as old:
            storage = old.read("model/data/0")
        start = contents.index(storage)
        path.write_bytes(contents[:start] + bytes([storage[0] ^ 1]) + contents[start + 1 :])
    with pytest.raises(ValueError, match="damaged.pt is a TorchScript archive that cannot be read: .*data/0"):
        for tensor in open_tensors(epath.Path(path)).values():
            tensor.read()


def test_pytorch_is_not_needed(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    shutil.copy(archive, tmp_path / "model.pt")
    assert len(open_tensors(epath.Path(tmp_path / "model.pt"))) == 24
