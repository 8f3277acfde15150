"""Disks and buckets. What only buckets do runs here on a disk that is taken for one."""

import json
import os
import subprocess
from types import SimpleNamespace

import pytest
from etils import epath

from clipmoe_jax.core import artifacts, metrics, paths, stamps
from clipmoe_jax.core.paths import absolute, in_bucket, written_whole


def test_bucket_paths_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert in_bucket("gs://bucket/run") and not in_bucket(tmp_path)
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"
    assert absolute("run") == epath.Path(tmp_path) / "run"


def test_folder_with_brackets_is_no_pattern(tmp_path):
    folder = epath.Path(tmp_path) / "lr[1e-3]"
    folder.mkdir()
    for name in ("image-1.npy", "image-0.npy", "text-0.npy", "image-0.npy.tmp"):
        (folder / name).touch()
    found = sorted(folder.glob("image-*.npy"))
    assert found == [folder / "image-0.npy", folder / "image-1.npy"]
    assert [path.name for path in epath.Path(tmp_path).glob("lr*")] == ["lr[1e-3]"]


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        ("~", "HOME"),
        ("~/x", "HOME/x"),
        ("--out=~/x", "--out=HOME/x"),
        ("--config=~/my.py:seeds=3", "--config=HOME/my.py:seeds=3"),
        (
            "coco:~/a.json?images=~/a,folder:~/b",
            "coco:HOME/a.json?images=HOME/a,folder:HOME/b",
        ),
        ("~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        ("a~/x", "a~/x"),
        ("x/~/y", "x/~/y"),
        ("gs://bucket/~", "gs://bucket/~"),
    ],
)
def test_home_is_expanded_where_a_path_begins(monkeypatch, given, expanded):
    monkeypatch.setenv("HOME", "/home/of mine")
    assert paths.with_home(given) == expanded.replace("HOME", "/home/of mine")


def test_home_that_is_not_known_is_told(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry for the user
    with pytest.raises(ValueError, match="--out=~/x: the home folder is not known: set HOME"):
        paths.with_home("--out=~/x")


def test_failed_write_leaves_the_file_that_was_there(tmp_path):
    path = epath.Path(tmp_path) / "file"
    path.write_text("before")
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    with written_whole(path) as file:
        file.write_text("after")
    assert path.read_text() == "after" and len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_no_half_object_in_a_bucket(tmp_path, monkeypatch):
    """Where a file that is closed is uploaded."""
    monkeypatch.setattr(paths, "in_bucket", lambda path: True)
    path = epath.Path(tmp_path) / "file"
    with pytest.raises(KeyError), paths.written_whole(path) as file, file.open("w") as opened:
        opened.write("half")
        raise KeyError
    assert not path.exists()


def build(folder):
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "params" / "deep").mkdir(parents=True)
    (folder / "params" / "deep" / "leaf").write_text("1.5")
    return {"loss": 0.5}


def never(folder):
    raise AssertionError("it is there")


def test_artifact_in_a_bucket_is_done_when_its_last_object_is_copied(tmp_path, monkeypatch):
    """Killed before done.json was copied it is not done; the next start copies again, building nothing."""
    monkeypatch.setattr(artifacts, "in_bucket", lambda path: True)
    path, copy_folder = epath.Path(tmp_path) / "base", artifacts._copy_folder

    def killed(*args, **kwargs):
        copy_folder(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "_copy_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        artifacts.make(path, {"seed": 0}, build)
    assert (path / "params" / "deep" / "leaf").exists() and not artifacts.is_done(path)
    monkeypatch.setattr(artifacts, "_copy_folder", copy_folder)
    assert not artifacts.make(path, {"seed": 0}, never)
    assert artifacts.measured(path) == {"loss": 0.5}
    assert (path / "params" / "deep" / "leaf").read_text() == "1.5"
    assert {found.name for found in path.iterdir()} == {"params", "checksums.json", "done.json"}
    assert {found.name for found in tmp_path.iterdir()} == {"base"}


def test_rest_of_a_copied_artifact_in_a_bucket_is_deleted(tmp_path, monkeypatch):
    """Killed while it was deleted: the next start deletes the rest."""
    monkeypatch.setattr(artifacts, "in_bucket", lambda path: True)
    path, unfinished = epath.Path(tmp_path) / "base", epath.Path(tmp_path) / "base.unfinished"
    delete = artifacts._delete

    def killed(folder):
        if folder == unfinished and (folder / "params").exists():
            raise KeyboardInterrupt
        delete(folder)

    monkeypatch.setattr(artifacts, "_delete", killed)
    with pytest.raises(KeyboardInterrupt):
        artifacts.make(path, {"seed": 0}, build)
    assert artifacts.is_done(path) and unfinished.exists() and not artifacts.is_done(unfinished)
    monkeypatch.setattr(artifacts, "_delete", delete)
    assert not artifacts.make(path, {"seed": 0}, never)
    assert {found.name for found in tmp_path.iterdir()} == {"base"}


def test_metrics_of_an_earlier_start_stay_in_a_bucket(tmp_path, monkeypatch):
    """Whose objects cannot be added to."""
    monkeypatch.setattr(metrics, "in_bucket", lambda path: True)
    file, seen = tmp_path / "metrics.jsonl", []
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(metrics, "UPLOAD_SECONDS", seconds)
        run = metrics.Metrics(epath.Path(tmp_path))
        for step in (1, 2):
            run.log("base", step, {"loss": 0.5})
            seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        run.close()
    assert seen == [0, 0, 3, 4]  # written when closed; at once
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 1, 2]


def test_links_pipes_and_devices_below_a_folder_are_named(tmp_path):
    (tmp_path / "run" / "a").mkdir(parents=True)
    (tmp_path / "run" / "a" / "file").write_text("")
    (tmp_path / "link").symlink_to("run")
    paths.check_plain_folder(tmp_path / "link")  # itself may be one
    paths.check_plain_folder(tmp_path / "nowhere")
    (tmp_path / "run" / "a" / "there").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="run/a/there is a link: delete it"):
        paths.check_plain_folder(tmp_path / "run")
    (tmp_path / "run" / "a" / "there").unlink()
    os.mkfifo(tmp_path / "run" / "pipe")
    with pytest.raises(ValueError, match="run/pipe is a pipe or a device"):
        paths.check_plain_folder(epath.Path(tmp_path / "run"))


def test_folder_that_a_running_job_deletes_is_no_obstacle(tmp_path, monkeypatch):
    """As the checkpoints of a stage that is done."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    scandir = os.scandir

    def scandir_too_late(folder):
        if os.path.basename(folder) == "checkpoints":
            os.rmdir(folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scandir_too_late)
    paths.check_plain_folder(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_file_that_a_running_job_deletes_is_no_obstacle(tmp_path, monkeypatch):
    """On a disk that does not list what entries are, each is asked for."""

    class Entries(list):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def no(**options):
        return False

    gone = SimpleNamespace(path=f"{tmp_path}/gone", is_dir=no, is_file=no, is_symlink=lambda: False)
    monkeypatch.setattr(os, "scandir", lambda folder: Entries([gone]))
    paths.check_plain_folder(tmp_path)


def test_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "n.json.tmp").symlink_to(victim)
    with paths.written_whole(epath.Path(tmp_path / "n.json")) as file:
        file.write_text("{}")
    assert victim.read_text() == "mine"
    assert (tmp_path / "n.json").read_text() == "{}" and not (tmp_path / "n.json").is_symlink()


def test_folders_may_lie_a_thousand_deep(tmp_path):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1100):
            os.mkdir("a")
            os.chdir("a")
        open("x", "w").close()
        os.chdir(here)
        paths.check_plain_folder(tmp_path)
        assert [entry.name for entry in stamps.files_under(tmp_path, follow_links=False)] == ["x"]
    finally:
        os.chdir(here)
        subprocess.run(["rm", "-r", tmp_path / "a"], check=True)  # Python's own way is a recursion
