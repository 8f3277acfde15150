"""Folders that a run makes: built once, from known inputs, whole or absent."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys

import pytest

from clipmoe_jax.core import artifacts

INPUTS = {"mcl.seed": 0, "mcl.sizes": (1, 2), "data": {"train": "pairs"}}


def counted(calls, measured=None, fail_after=None):
    """Writes part_0 to part_2, those that are not there yet; may raise after some parts."""

    def build(folder):
        for i in range(3):
            if i == fail_after:
                raise InterruptedError("killed")
            part = folder / f"part_{i}"
            if not part.exists():
                calls.append(i)
                part.write_text(str(i))
        return measured or {}

    return build


def never(folder):
    raise AssertionError("built again")


def test_artifact_is_built_once(tmp_path):
    calls = []
    assert artifacts.make(tmp_path / "base", INPUTS, counted(calls)) is True
    assert artifacts.make(tmp_path / "base", INPUTS, never) is False
    assert calls == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_done_json_records_inputs_measurements_and_versions(tmp_path):
    artifacts.make(tmp_path / "base", INPUTS, counted([], {"loss": 0.5}))
    done = json.loads((tmp_path / "base" / "done.json").read_text())
    assert done["inputs"] == {"mcl.seed": 0, "mcl.sizes": [1, 2], "data": {"train": "pairs"}}
    assert artifacts.measured(tmp_path / "base") == {"loss": 0.5}
    assert "jax" in done["versions"]
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert files == {"checksums.json", "done.json", "part_0", "part_1", "part_2"}


def test_hash_depends_on_inputs_and_not_on_their_order(tmp_path):
    hashes = []
    for i, inputs in enumerate([{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3}]):
        artifacts.make(tmp_path / str(i), inputs, counted([]))
        hashes.append(json.loads((tmp_path / str(i) / "done.json").read_text())["inputs_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


OTHER_INPUTS = {
    "another value": (INPUTS | {"mcl.seed": 7}, "mcl.seed=0, the config says 7"),
    "a new field": (INPUTS | {"mcl.new": True}, "mcl.new='nothing', the config says True"),
    "a field that is gone": (
        {"mcl.seed": 0, "mcl.sizes": (1, 2)},
        "data={'train': 'pairs'}, the config says 'nothing'",
    ),
    "inside a field": (
        INPUTS | {"mcl.sizes": (1, 3)},
        r"mcl.sizes=\[1, 2\], the config says \[1, 3\]",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), OTHER_INPUTS.values(), ids=OTHER_INPUTS)
def test_artifact_of_other_inputs_is_refused_with_field_values_and_fix(tmp_path, inputs, message):
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    fix = "set it back, choose another workdir, or delete .*base and what was made from it"
    with pytest.raises(ValueError, match=f"base was made with {message}: {fix}"):
        artifacts.make(tmp_path / "base", inputs, never)


def test_unfinished_folder_of_other_inputs_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "base", INPUTS, counted([], fail_after=1))
    with pytest.raises(ValueError, match="base.unfinished was made with mcl.seed=0, the config says 7"):
        artifacts.make(tmp_path / "base", INPUTS | {"mcl.seed": 7}, never)


def test_failed_build_that_left_nothing_is_no_obstacle(tmp_path):
    """A config that `build` refused is corrected; folders alone, as of checkpoints to come, are nothing."""

    def refuse(folder):
        (folder / "checkpoints" / "tmp").mkdir(parents=True)
        raise ValueError("a number is not finite")

    others = make_two(tmp_path)
    for name in ("base", "copied"):
        with pytest.raises(ValueError, match="not finite"):
            artifacts.make(tmp_path / name, INPUTS | {"mcl.seed": 8}, refuse)
        assert (tmp_path / f"{name}.unfinished" / "inputs.json").exists()
    assert artifacts.make(tmp_path / "base", INPUTS, counted([])) is True
    assert json.loads((tmp_path / "base" / "done.json").read_text())["inputs"]["mcl.seed"] == 0
    assert not (tmp_path / "base" / "checkpoints").exists()
    assert artifacts.copy(tmp_path / "copied", INPUTS, others) == tmp_path / "b" / "base"


def test_killed_build_continues_with_what_it_left(tmp_path):
    first, second = [], []
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "base", INPUTS, counted(first, fail_after=2))
    assert [path.name for path in tmp_path.iterdir()] == ["base.unfinished"]
    assert artifacts.make(tmp_path / "base", INPUTS, counted(second)) is True
    assert (first, second) == ([0, 1], [2])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_artifact_killed_between_done_and_rename_is_not_built_again(tmp_path):
    """It is whole: nothing is built again, and what served until then is taken away."""

    def build(folder):
        (folder / "checkpoints").mkdir()
        return counted([])(folder)

    artifacts.make(tmp_path / "base", INPUTS, build)
    assert not (tmp_path / "base" / "checkpoints").exists()
    (tmp_path / "base").rename(tmp_path / "base.unfinished")
    (tmp_path / "base.unfinished" / "checkpoints").mkdir()
    assert artifacts.make(tmp_path / "base", INPUTS, never) is False
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert not (tmp_path / "base" / "checkpoints").exists()


def test_unfinished_folder_without_recorded_inputs_starts_over(tmp_path):
    (tmp_path / "base.unfinished").mkdir()
    (tmp_path / "base.unfinished" / "part_0").write_text("from other inputs")
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    assert (tmp_path / "base" / "part_0").read_text() == "0"


def test_is_done_only_when_whole(tmp_path):
    path = tmp_path / "base"
    assert not artifacts.is_done(path)
    with pytest.raises(InterruptedError):
        artifacts.make(path, INPUTS, counted([], fail_after=2))
    assert not artifacts.is_done(path)

    def build(folder):
        assert not artifacts.is_done(path)
        return {}

    artifacts.make(path, INPUTS, build)
    assert artifacts.is_done(path)


def test_missing_artifact_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(
        artifacts.MissingArtifactError, match="base does not exist yet: stage mcl_2 makes it"
    ) as e:
        artifacts.require(tmp_path / "base", "mcl_2")
    assert e.value.stage == "mcl_2"
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    assert artifacts.require(tmp_path / "base", "mcl_2") == tmp_path / "base"


DAMAGED = {
    "cut off": ('{"inputs": {', "is not valid JSON at line 1 column 13: .*"),
    "a list": ("[]", "holds a list, not an object"),
    "empty": ("{}", ": no field 'inputs'"),
    "inputs gone": ('{"inputs": null}', ": inputs is None, not an object"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_done_json_is_named(tmp_path, content, message):
    path = tmp_path / "base"
    artifacts.make(path, INPUTS, counted([]))
    (path / "done.json").write_text(content)
    (path / "checksums.json").unlink()  # as in folders of earlier versions
    advice = f"put it back, or delete {path} and what was made from it"
    with pytest.raises(ValueError, match=f"^{path}/done.json ?{message}: {advice}$"):
        artifacts.make(path, INPUTS, never)
    with pytest.raises(ValueError, match=f"^{path}/done.json ?{message}$"):
        artifacts.done_field(path, "inputs")


def test_failed_write_leaves_the_json_that_was_there(tmp_path):
    path = tmp_path / "numbers.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    artifacts.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["numbers.json"]


def make_two(tmp_path):
    """Artifacts of two variants, made from other inputs and from INPUTS, with a folder inside."""

    def build(folder):
        (folder / "params").mkdir()
        (folder / "params" / "leaf").write_text("0.5")
        return {"loss": 0.5}

    artifacts.make(tmp_path / "a" / "base", INPUTS | {"mcl.seed": 7}, build)
    artifacts.make(tmp_path / "b" / "base", INPUTS, build)
    return [tmp_path / name / "base" for name in "abc"]


def test_artifact_of_the_same_inputs_is_copied(tmp_path):
    others = make_two(tmp_path)
    assert artifacts.copy(tmp_path / "base", INPUTS, others) == tmp_path / "b" / "base"
    assert artifacts.make(tmp_path / "base", INPUTS, never) is False
    assert (tmp_path / "base" / "params" / "leaf").read_text() == "0.5"
    assert artifacts.measured(tmp_path / "base") == {"loss": 0.5}
    assert not (tmp_path / "base.unfinished").exists()
    assert artifacts.copy(tmp_path / "base", INPUTS, others) is None  # it is there


def test_artifact_of_other_inputs_is_not_copied(tmp_path):
    others = make_two(tmp_path)
    assert artifacts.copy(tmp_path / "base", INPUTS | {"mcl.seed": 8}, others) is None
    assert not (tmp_path / "base").exists() and not (tmp_path / "base.unfinished").exists()


def test_killed_copy_is_not_whole(tmp_path, monkeypatch):
    others = make_two(tmp_path)

    def killed(*_):
        raise InterruptedError("killed")

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(artifacts, "write_json", killed)
        artifacts.copy(tmp_path / "base", INPUTS, others)
    assert not (tmp_path / "base").exists()
    # The other is gone meanwhile: it is built anew, without what the copy left.
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    assert {path.name for path in (tmp_path / "base").iterdir()} == {
        "checksums.json",
        "done.json",
        "part_0",
        "part_1",
        "part_2",
    }


def test_copy_replaces_an_unfinished_artifact_of_the_same_inputs_only(tmp_path):
    others = make_two(tmp_path)
    for inputs, path in ((INPUTS, tmp_path / "same"), (INPUTS | {"mcl.seed": 7}, tmp_path / "other")):
        with pytest.raises(InterruptedError):
            artifacts.make(path, inputs, counted([], fail_after=1))
    assert artifacts.copy(tmp_path / "same", INPUTS, others) == tmp_path / "b" / "base"
    with pytest.raises(ValueError, match="other.unfinished was made with mcl.seed=7, the config says 0"):
        artifacts.copy(tmp_path / "other", INPUTS, others)


def test_second_builder_of_a_folder_is_refused_and_touches_nothing(tmp_path):

    def twice(folder):
        with pytest.raises(artifacts.BusyError, match="another process is making .*base.unfinished: wait"):
            artifacts.make(tmp_path / "base", INPUTS, never)
        return {}

    artifacts.make(tmp_path / "base", INPUTS, twice)
    for keep_failed in (True, False):
        with artifacts.new_folder(tmp_path / f"out_{keep_failed}", keep_failed=keep_failed) as folder:
            (folder / "part").touch()
            with pytest.raises(artifacts.BusyError):
                with artifacts.new_folder(tmp_path / f"out_{keep_failed}", keep_failed=keep_failed):
                    raise AssertionError("two at once")
        assert [path.name for path in (tmp_path / f"out_{keep_failed}").iterdir()] == ["part"]


def renamed(inputs):
    """This version calls `mcl.seed` what an earlier one called `stage.seed`."""
    return {"mcl.seed" if name == "stage.seed" else name: value for name, value in inputs.items()}


def test_inputs_that_were_renamed_since_are_the_same_inputs(tmp_path):
    """For a whole artifact, an unfinished one and a copy; another value is still refused, by its new name."""
    before = {"stage.seed": 0, "mcl.sizes": (1, 2), "data": {"train": "pairs"}}
    artifacts.make(tmp_path / "base", before, counted([]))
    with pytest.raises(ValueError, match="base was made with mcl.seed='nothing', the config says 0"):
        artifacts.make(tmp_path / "base", INPUTS, never)
    assert artifacts.make(tmp_path / "base", INPUTS, never, upgrade=renamed) is False
    with pytest.raises(ValueError, match="base was made with mcl.seed=0, the config says 7"):
        artifacts.make(tmp_path / "base", INPUTS | {"mcl.seed": 7}, never, upgrade=renamed)

    assert artifacts.copy(tmp_path / "copied", INPUTS, [tmp_path / "base"]) is None
    assert artifacts.copy(tmp_path / "copied", INPUTS, [tmp_path / "base"], renamed) == tmp_path / "base"
    assert artifacts.make(tmp_path / "copied", INPUTS, never, upgrade=renamed) is False

    first, second = [], []
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "killed", before, counted(first, fail_after=2))
    assert artifacts.make(tmp_path / "killed", INPUTS, counted(second), upgrade=renamed) is True
    assert (first, second) == ([0, 1], [2])


def with_contents(path, contents=None):
    """Inputs of an artifact that was made from the files at a path."""
    named = {"seed": 0, "data.train": path}
    return named if contents is None else named | {"contents of data.train": contents}


AGREEING = {
    "the same": (("a", "1"), ("a", "1")),
    "another path of the same contents": (("a", "1"), ("elsewhere/b", "1")),
    "contents that were not recorded": (("a", None), ("a", "1")),
    "the path by another spelling": (("a", None), ("b/.././a/", "1")),
}


@pytest.mark.parametrize(("before", "now"), AGREEING.values(), ids=AGREEING)
def test_artifact_made_from_the_same_contents_is_used(tmp_path, before, now):
    artifacts.make(tmp_path / "base", with_contents(*before), counted([]))
    assert artifacts.make(tmp_path / "base", with_contents(*now), never) is False
    assert artifacts.copy(tmp_path / "copied", with_contents(*now), [tmp_path / "base"]) == tmp_path / "base"
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "killed", with_contents(*before), counted([], fail_after=1))
    assert artifacts.make(tmp_path / "killed", with_contents(*now), counted([])) is True


DIFFERING = {
    "other contents at one path": (
        ("a", "1"),
        ("a", "2"),
        "from other contents of data.train than are there now: put those back, choose another workdir, or",
    ),
    "other contents at another path": (("a", "1"), ("b", "2"), "with data.train='a', the config says 'b'"),
    "another path": (("a", None), ("b", "1"), "with data.train='a', the config says 'b'"),
    "contents that are not known now": (("a", "1"), ("a", None), "from other contents of data.train"),
}


@pytest.mark.parametrize(("before", "now", "message"), DIFFERING.values(), ids=DIFFERING)
def test_artifact_made_from_other_contents_is_refused(tmp_path, before, now, message):
    artifacts.make(tmp_path / "base", with_contents(*before), counted([]))
    with pytest.raises(ValueError, match=f"base was made {message}"):
        artifacts.make(tmp_path / "base", with_contents(*now), never)
    assert artifacts.copy(tmp_path / "copied", with_contents(*now), [tmp_path / "base"]) is None


def test_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    """As some network file systems are."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    assert artifacts.is_done(tmp_path / "base")


HOLDER = """
import sys, time
from clipmoe_jax.core import artifacts
def build(folder):
    print("building", flush=True)
    time.sleep(60)
artifacts.make(sys.argv[1], {}, build)
"""


def test_lock_ends_with_the_process_that_held_it(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "base")]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "building\n"
        with pytest.raises(artifacts.BusyError):
            artifacts.make(tmp_path / "base", {}, never)
        process.kill()
    assert artifacts.make(tmp_path / "base", {}, counted([])) is True
    assert {path.name for path in (tmp_path / "base").iterdir()} == {
        "checksums.json",
        "done.json",
        "part_0",
        "part_1",
        "part_2",
    }


@pytest.mark.parametrize("place", ["", "inside"])
def test_links_where_a_folder_is_made_are_refused_and_nothing_is_deleted(tmp_path, place):
    """A stranger's folder may bring one: what it leads to would be cleared and written."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    unfinished = tmp_path / "set.unfinished"
    if place:
        unfinished.mkdir()
    (unfinished / place if place else unfinished).symlink_to(mine)
    for begin in (
        lambda: artifacts.new_folder(tmp_path / "set").__enter__(),
        lambda: artifacts.make(tmp_path / "set", {}, lambda folder: {}),
    ):
        with pytest.raises(ValueError, match="set.unfinished.* is a link"):
            begin()
    assert (mine / "thesis.tex").read_text() == "years"


def test_link_to_nothing_takes_a_folders_name(tmp_path):
    (tmp_path / "set").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(ValueError, match="set exists already"),
        artifacts.new_folder(tmp_path / "set"),
    ):
        pass
    assert not (tmp_path / "set.unfinished").exists()
