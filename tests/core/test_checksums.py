"""Checksums of folders: damage is told where a file is read, and what has none is read as it is."""

import json

import pytest
from etils import epath

from clipmoe_jax.core import artifacts, checksums, stamps

INPUTS = {"seed": 0}


def build(folder):
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "0").write_bytes(b"weights")
    (folder / "params_of_another").write_text("1")
    (folder / "order.npy").write_bytes(bytes(range(256)))
    (folder / "train.array_record-00000-of-00001").write_bytes(b"records")
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "checkpoints" / "1" / "state").write_text("gone soon")
    return {"num_steps": 2048}


@pytest.fixture
def made(tmp_path):
    artifacts.make(tmp_path / "made", INPUTS, build)
    return tmp_path / "made"


def flip(path, byte, bit=0):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def recorded(folder):
    return json.loads((folder / "checksums.json").read_text())["crc32"]


def test_checksums_of_all_but_records_and_checkpoints_are_written(made):
    assert recorded(made) == {
        "done.json": checksums.of_text((made / "done.json").read_text()),
        "order.npy": "29058c73",  # of the bytes 0 to 255, as zlib and PNG have it
        "params/d/0": recorded(made)["params/d/0"],
        "params_of_another": "83dcefb7",
    }


def test_flipped_bits_are_told_with_file_and_fix(made):
    for byte in range(0, 256, 5):
        flip(made / "order.npy", byte, byte % 8)
        with pytest.raises(ValueError, match="order.npy is damaged .*: delete .*made and make it") as told:
            checksums.verify(made, "order.npy")
        assert "\n" not in str(told.value)
        flip(made / "order.npy", byte, byte % 8)
    checksums.verify(made, "order.npy")


def test_a_folder_is_verified_with_all_in_it_and_nothing_beside_it(made):
    flip(made / "params_of_another", 0)
    checksums.verify(made, "params", "order.npy", "no such file")
    flip(made / "params" / "d" / "0", 3)
    with pytest.raises(ValueError, match="params/d/0 is damaged"):
        checksums.verify(made, "params")
    (made / "params" / "d" / "0").unlink()
    with pytest.raises(ValueError, match="params/d/0 is damaged .it is gone."):
        checksums.verify(made, "params")


def test_a_number_in_done_json_that_has_changed_is_told(made):
    done = (made / "done.json").read_text()
    (made / "done.json").write_text(done.replace("2048", "2058"))
    with pytest.raises(ValueError, match="done.json is damaged"):
        artifacts.measured(made)
    with pytest.raises(ValueError, match="done.json is damaged"):
        artifacts.make(made, INPUTS, build)


@pytest.mark.parametrize("text", ["", "[]", '{"crc33": {}}', '{"crc32": []}', "[" * 100_000, "\xff"])
def test_damaged_checksums_are_told(made, text):
    (made / "checksums.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="checksums.json is damaged .it holds no checksums.: delete"):
        checksums.verify(made, "order.npy")


def test_files_without_checksums_are_read(made):
    """As folders of earlier versions are, and what is written beside an artifact later."""
    (made / "later.json").write_text("{}")
    checksums.verify(made, "later.json")
    (made / "checksums.json").unlink()
    flip(made / "order.npy", 0)
    checksums.verify(made, "order.npy")
    assert artifacts.measured(made) == {"num_steps": 2048}


def test_a_name_that_leads_out_is_not_opened(made, tmp_path):
    (made / "checksums.json").write_text(json.dumps({"crc32": {"params/../../secret": "00000000"}}))
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ValueError, match="secret is damaged .it is gone."):
        checksums.verify(made, "params")


def test_a_copy_keeps_checksums_and_damage_is_not_copied(made, tmp_path):
    assert artifacts.copy(tmp_path / "copy", INPUTS, [made]) == made
    assert {**recorded(tmp_path / "copy"), "done.json": ""} == {**recorded(made), "done.json": ""}
    assert artifacts.measured(tmp_path / "copy") == {"num_steps": 2048}
    flip(made / "order.npy", 7)
    with pytest.raises(ValueError, match="made/order.npy is damaged"):
        artifacts.copy(tmp_path / "another", INPUTS, [made])
    assert not (tmp_path / "another").exists()


def test_a_build_that_goes_on_does_not_meet_the_checksums_of_before(tmp_path, monkeypatch):
    """Killed between checksums.json and done.json."""

    def killed(*_):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(artifacts, "write_json", lambda path, content: path.name == "done.json" and killed())
        artifacts.make(tmp_path / "made", INPUTS, lambda folder: (folder / "part").write_text("one") and {})
    (tmp_path / "made.unfinished" / "inputs.json").write_text(json.dumps(INPUTS))

    def build(folder):
        (folder / "part").write_text("two")
        checksums.verify(folder, "part")
        return {}

    artifacts.make(tmp_path / "made", INPUTS, build)
    checksums.verify(tmp_path / "made", "part")


def test_names_in_a_bucket_are_those_on_a_disk(made, monkeypatch):
    monkeypatch.setattr(stamps, "in_bucket", lambda path: True)
    expected = {name: value for name, value in recorded(made).items() if name != "done.json"}
    assert checksums.of_folder(epath.Path(made), without=["done.json"]) == expected
    checksums.verify(made, *expected)
