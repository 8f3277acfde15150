"""Files are told from other files: by sizes and times, by contents, by the place that a path names."""

import os
import pathlib
import shutil

import pytest

from clipmoe_jax.core.stamps import canonical, digest, files_under, stamp


@pytest.fixture
def folder(tmp_path):
    """folder/a, folder/sub/b, and hidden files and folders."""
    for name in ("a", "sub/b", ".hidden", ".trash/c", "sub/._b"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"contents of {name}")
        os.utime(path, ns=(10**18, 10**18))
    return tmp_path / "folder"


def edit(path):
    """Same size, another time."""
    path.write_text(path.read_text().upper())
    os.utime(path, ns=(10**18, 10**18 + 1))


CHANGES = {
    "an edit": lambda folder: edit(folder / "a"),
    "an edit below": lambda folder: edit(folder / "sub" / "b"),
    "a file more": lambda folder: (folder / "new").touch(),
    "a file less": lambda folder: (folder / "a").unlink(),
    "another name": lambda folder: (folder / "a").rename(folder / "c"),
    "another folder": lambda folder: (folder / "sub").rename(folder / "other"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_in_a_folder_changes_stamp_and_digest(folder, change):
    before = stamp(folder), digest(folder)
    assert (stamp(folder), digest(folder)) == before and all(before)
    change(folder)
    assert stamp(folder) != before[0] and digest(folder) != before[1]


def test_hidden_files_do_not_count(folder):
    before = stamp(folder), digest(folder)
    edit(folder / ".trash" / "c")
    (folder / "sub" / ".DS_Store").touch()
    assert (stamp(folder), digest(folder)) == before
    assert sorted(entry.name for entry in files_under(folder)) == ["a", "b"]


def test_stamp_of_one_file_is_its_size_and_time(folder):
    assert stamp(folder / "a") == f"13 {10**18}"
    before = digest(folder / "a")
    edit(folder / "a")
    assert stamp(folder / "a") == f"13 {10**18 + 1}" and digest(folder / "a") != before


def test_nothing_has_no_stamp(tmp_path):
    assert stamp(tmp_path / "nowhere") == stamp() == stamp(tmp_path) == ""
    assert digest(tmp_path / "nowhere") == digest() == digest(tmp_path) == ""


def test_several_files_have_one_stamp(folder):
    files = folder / "a", folder / "sub" / "b"
    before = stamp(*files), digest(*files)
    assert stamp(files[0]) != before[0] and digest(files[0]) != before[1]
    edit(files[1])
    assert stamp(*files) != before[0] and digest(*files) != before[1]


def test_stamp_and_digest_do_not_depend_on_the_spelling(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for of in (stamp, digest):
        assert of(folder) == of(f"{folder}/") == of("folder") == of("folder/../folder")
        assert of(folder / "a", folder / "sub" / "b") == of("folder/a", "folder/sub/b")


def test_copy_has_the_digest_of_its_original(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert digest(tmp_path / "copy") == digest(folder) and stamp(tmp_path / "copy") != stamp(folder)


def test_links_are_followed_but_not_in_circles(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c").write_text("c")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "gone").symlink_to("nowhere")
    (folder / "sub" / "back").symlink_to(folder)
    assert sorted(entry.name for entry in files_under(folder)) == ["a", "b", "c", "gone"]
    before = stamp(folder)
    edit(tmp_path / "elsewhere" / "c")
    assert stamp(folder) != before and digest(folder)


def test_one_place_has_one_spelling(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    place = os.path.realpath(tmp_path / "a")
    for spelling in ("a", "./a/", "a/../a", "link", "~/a", f"{tmp_path}/a", pathlib.Path("a")):
        assert canonical(spelling) == place
    assert canonical("b") != place
    assert canonical("gs://bucket/a/") == canonical("gs://bucket/a") == "gs://bucket/a"


def test_a_file_of_holes_is_not_hashed(tmp_path):
    (tmp_path / "holes").write_text("a")
    os.truncate(tmp_path / "holes", 2**22)
    with pytest.raises(ValueError, match=r"holes has 4,194,304 bytes and only [\d,]+ of them on the disk"):
        digest(tmp_path)
