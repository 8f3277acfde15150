"""Folders that a run makes: made once, from known inputs, and whole or not there."""

import json

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


def test_an_artifact_is_built_once(tmp_path):
    calls = []
    assert artifacts.make(tmp_path / "base", INPUTS, counted(calls)) is True
    assert artifacts.make(tmp_path / "base", INPUTS, never) is False
    assert calls == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_done_json_says_what_it_was_made_from(tmp_path):
    artifacts.make(tmp_path / "base", INPUTS, counted([], {"loss": 0.5}))
    done = json.loads((tmp_path / "base" / "done.json").read_text())
    assert done["inputs"] == {"mcl.seed": 0, "mcl.sizes": [1, 2], "data": {"train": "pairs"}}
    assert artifacts.measured(tmp_path / "base") == {"loss": 0.5}
    assert "jax" in done["versions"]
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert files == {"done.json", "part_0", "part_1", "part_2"}


def test_the_hash_depends_on_the_inputs_and_not_on_their_order(tmp_path):
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
def test_other_inputs_are_refused_with_field_values_and_fix(tmp_path, inputs, message):
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    fix = "give another --workdir, set it back, or delete .*base and what was made from it"
    with pytest.raises(ValueError, match=f"base was made with {message}: {fix}"):
        artifacts.make(tmp_path / "base", inputs, never)


def test_other_inputs_are_refused_for_an_unfinished_folder_too(tmp_path):
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "base", INPUTS, counted([], fail_after=1))
    with pytest.raises(ValueError, match="base.unfinished was made with mcl.seed=0, the config says 7"):
        artifacts.make(tmp_path / "base", INPUTS | {"mcl.seed": 7}, never)


def test_a_build_that_was_killed_goes_on_with_what_it_left(tmp_path):
    first, second = [], []
    with pytest.raises(InterruptedError):
        artifacts.make(tmp_path / "base", INPUTS, counted(first, fail_after=2))
    assert [path.name for path in tmp_path.iterdir()] == ["base.unfinished"]
    assert artifacts.make(tmp_path / "base", INPUTS, counted(second)) is True
    assert (first, second) == ([0, 1], [2])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_killed_between_done_and_renamed(tmp_path):
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


def test_a_folder_that_does_not_say_what_it_was_made_from_is_started_anew(tmp_path):
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


def test_require_names_the_stage_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="base is not there yet: .*--stage=mcl_2 first"):
        artifacts.require(tmp_path / "base", "mcl_2")
    artifacts.make(tmp_path / "base", INPUTS, counted([]))
    assert artifacts.require(tmp_path / "base", "mcl_2") == tmp_path / "base"


def test_json_is_replaced_whole(tmp_path):
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


def test_another_variants_artifact_of_the_same_inputs_is_copied(tmp_path):
    others = make_two(tmp_path)
    assert artifacts.copy(tmp_path / "base", INPUTS, others) == tmp_path / "b" / "base"
    assert artifacts.make(tmp_path / "base", INPUTS, never) is False
    assert (tmp_path / "base" / "params" / "leaf").read_text() == "0.5"
    assert artifacts.measured(tmp_path / "base") == {"loss": 0.5}
    assert not (tmp_path / "base.unfinished").exists()
    assert artifacts.copy(tmp_path / "base", INPUTS, others) is None  # it is there


def test_no_artifact_of_other_inputs_is_copied(tmp_path):
    others = make_two(tmp_path)
    assert artifacts.copy(tmp_path / "base", INPUTS | {"mcl.seed": 8}, others) is None
    assert not (tmp_path / "base").exists() and not (tmp_path / "base.unfinished").exists()


def test_a_copy_that_was_killed_is_not_taken_for_whole(tmp_path, monkeypatch):
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
        "done.json",
        "part_0",
        "part_1",
        "part_2",
    }


def test_an_unfinished_artifact_gives_way_to_a_copy_of_the_same_inputs_alone(tmp_path):
    others = make_two(tmp_path)
    for inputs, path in ((INPUTS, tmp_path / "same"), (INPUTS | {"mcl.seed": 7}, tmp_path / "other")):
        with pytest.raises(InterruptedError):
            artifacts.make(path, inputs, counted([], fail_after=1))
    assert artifacts.copy(tmp_path / "same", INPUTS, others) == tmp_path / "b" / "base"
    with pytest.raises(ValueError, match="other.unfinished was made with mcl.seed=7, the config says 0"):
        artifacts.copy(tmp_path / "other", INPUTS, others)


def test_what_another_process_makes_is_left_to_it(tmp_path):
    """A command that was started twice; the second says so and touches nothing."""

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
        assert (tmp_path / f"out_{keep_failed}" / "part").exists()
