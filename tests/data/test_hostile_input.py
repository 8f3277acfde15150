"""Files of strangers: nothing that they bring runs."""

import importlib
import json
import pathlib
import stat
import sys

import pytest
from test_formats import prepared_by_tfds

from clipmoe_jax.data.preprocess import UnreadableImageError, decode_image
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.sources import open_source

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
