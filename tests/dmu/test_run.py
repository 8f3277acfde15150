"""What the stages of a run share: here the fields and contents that its artifacts depend on."""

import shutil

import pytest
from etils import epath
from ml_collections import ConfigDict

from clipmoe_jax.config import default_config, upgrade_inputs
from clipmoe_jax.core import artifacts, stamps
from clipmoe_jax.dmu import recipes, training
from clipmoe_jax.dmu.run import Run


def inputs(checkpoint, prefixes=recipes.BASE_FIELDS, **fields):
    """Those of what depends on these fields and starts from a checkpoint, in a new run."""
    config = default_config()
    config.base.checkpoint = str(checkpoint)
    config.update_from_flattened_dict(fields)
    run = Run(config, 0, epath.Path("w"), mesh=None, metrics=None, datasets={})
    return run.fields(*prefixes)


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "clip.pt").write_bytes(b"first")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "leaf").write_bytes(b"first")
    return tmp_path


@pytest.mark.parametrize(("name", "file"), [("clip.pt", "clip.pt"), ("folder", "folder/leaf")])
def test_checkpoint_that_was_overwritten_is_noticed(checkpoint, tmp_path, name, file):
    base = tmp_path / "w" / "base"
    artifacts.make(base, inputs(checkpoint / name), lambda folder: {})
    shutil.copy(checkpoint / file, tmp_path / "copy")
    (tmp_path / "copy").replace(checkpoint / file)  # of the same contents
    assert not artifacts.make(base, inputs(checkpoint / name), lambda folder: {}, upgrade_inputs)
    (checkpoint / file).write_bytes(b"other")
    with pytest.raises(
        ValueError, match="base was made from other contents of base.checkpoint than are there"
    ):
        artifacts.make(base, inputs(checkpoint / name), lambda folder: {}, upgrade_inputs)


def test_checkpoint_may_be_spelled_otherwise_and_move(checkpoint, tmp_path, monkeypatch):
    artifacts.make(tmp_path / "base", inputs(checkpoint / "clip.pt"), lambda folder: {})
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelled in ("~/clip.pt", f"{tmp_path}/folder/../clip.pt"):
        assert not artifacts.make(tmp_path / "base", inputs(spelled), lambda folder: {})
    (checkpoint / "clip.pt").rename(checkpoint / "moved.pt")
    assert not artifacts.make(tmp_path / "base", inputs(checkpoint / "moved.pt"), lambda folder: {})


def test_workdir_of_a_version_that_did_not_read_the_checkpoint_goes_on(checkpoint, tmp_path):
    recorded = {
        name: value for name, value in inputs(checkpoint / "clip.pt").items() if "contents" not in name
    }
    artifacts.make(tmp_path / "base", recorded, lambda folder: {})
    assert not artifacts.make(tmp_path / "base", inputs(checkpoint / "clip.pt"), lambda folder: {})
    with pytest.raises(
        ValueError, match="was made with base.checkpoint='.*clip.pt', the config says '.*folder'"
    ):
        artifacts.make(tmp_path / "base", inputs(checkpoint / "folder"), lambda folder: {})


def test_checkpoint_is_read_once_for_all_stages(checkpoint, monkeypatch):
    read = []
    monkeypatch.setattr(stamps, "digest", lambda path: read.append(path) or "1234")
    config = default_config()
    config.base.checkpoint = str(checkpoint / "clip.pt")
    run = Run(config, 0, epath.Path("w"), mesh=None, metrics=None, datasets={})
    assert run.fields(*recipes.BASE_FIELDS) == run.fields(*recipes.BASE_FIELDS)
    assert read == [str(checkpoint / "clip.pt")]


def test_fields_that_change_nothing_are_no_inputs(checkpoint):
    """So that artifacts made before these fields existed stay usable."""

    def names(**fields):
        return {*inputs(checkpoint / "clip.pt", recipes.MOE_FIELDS, **fields)}

    published = names()
    assert not [name for name in published if "rehearsal" in name or "sequence" in name]
    assert names(**{"moe.sequence_share": 3.0, "router.rehearsal": "distill"}) == published
    assert names(**{"moe.routing": "token_and_sequence"}) - published == {"moe.routing", "moe.sequence_share"}
    assert names(**{"moe.experts": ("base", "base")}) - published == {"moe.experts"}
    assert names(**{"validation.every_steps": 100, "data.validation": "held_out"}) == published
    assert not [name for name in published if "accumulation_steps" in name or "base.train" in name]
    of_blocks = {"moe.expert_layers": "attention_and_feed_forward"}
    assert names(**of_blocks) - published == {"moe.expert_layers"}


def test_workdir_goes_on_whose_artifacts_named_fields_without_effect(checkpoint, tmp_path):
    now = inputs(checkpoint / "clip.pt", recipes.MOE_FIELDS)
    before = now | {"base.train.learning_rate": 1.0, "mcl.accumulation_steps": 8}
    artifacts.make(tmp_path / "base", before, lambda folder: {})
    assert not artifacts.make(tmp_path / "base", now, lambda folder: {}, upgrade_inputs)


def test_model_depends_on_the_settings_of_those_that_it_is_made_from(checkpoint):
    """Else a variant would copy what another made from another model."""

    def inputs_with(learning_rate):
        config = default_config()
        config.base.checkpoint = str(checkpoint / "clip.pt")
        config.baselines = ("direct_ft", "base_ft_moe")
        config.baseline_settings = ConfigDict({"direct_ft": {"learning_rate": learning_rate}})
        run = Run(config, 0, epath.Path("w"), mesh=None, metrics=None, datasets={})
        return training.inputs_of(run, recipes.recipes(config)["base_ft_moe"])

    first, second = inputs_with(1e-3), inputs_with(2e-3)
    changed = {name for name in first if first[name] != second.get(name)}
    assert changed == {"baseline_settings.direct_ft.learning_rate"}
