"""A run on a user's own files: sources that it prepares, and a base trained from scratch."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from etils import epath
from grids import exhaustive
from PIL import Image
from tiny_config import get_config as tiny_config

from clipmoe_jax import config as configs
from clipmoe_jax.core import trees
from clipmoe_jax.data.sources import open_source
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu import runner
from clipmoe_jax.models.model_folder import load_model

SCRIPT = pathlib.Path(__file__).parent / "killed_run.py"


def write_files(folder) -> None:
    """48 PNGs with captions: in a folder, in ShareGPT4V's JSON, in a tar shard."""
    (folder / "images").mkdir()
    entries = []
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for pair in open_source("digit_scenes:train?pairs=48&seed=5"):
            out = io.BytesIO()
            Image.open(io.BytesIO(pair.image)).save(out, "PNG")
            (folder / "images" / f"{pair.id}.png").write_bytes(out.getvalue())
            (folder / "images" / f"{pair.id}.txt").write_text(pair.captions[0])
            turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": pair.captions[0]}]
            entries.append({"id": pair.id, "image": f"{pair.id}.png", "conversations": turns})
            for suffix, contents in (("png", out.getvalue()), ("txt", pair.captions[0].encode())):
                member = tarfile.TarInfo(f"{pair.id}.{suffix}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
    (folder / "captions.json").write_text(json.dumps(entries))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


def fields_of(files):
    return {
        "data.train": f"sharegpt4v:{files}/captions.json?images={files}/images",
        "data.test": f"folder:{files}/images",
        "data.base": f"webdataset:{files}/shard.tar",
    }


def run_tiny(workdir, fields) -> None:
    """Runs the tiny run with other fields on one device, for which other tests compile the same programs."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, str(SCRIPT), str(workdir), "nowhere", *(f"{k}={v}" for k, v in fields.items())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def workdir(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    run_tiny(workdir, fields_of(files))
    return workdir


def test_run_on_raw_files_prepares_trains_and_evaluates(workdir):
    results = json.loads((workdir / "eval" / "results.json").read_text())
    assert list(results) == ["base", "stage 1 alone", "dense curriculum", "CLIP-MoE"]
    prepared = {path.parent.relative_to(workdir).as_posix() for path in workdir.rglob("report.json")}
    assert prepared == {"data/train", "data/test", "data/base", "data/rehearsal"}
    report = json.loads((workdir / "data" / "train" / "report.json").read_text())
    assert report["pairs"] == 48 and report["bad"] == 0


@exhaustive
def test_run_starts_from_the_base_of_another_run(workdir, tmp_path):
    """As from any checkpoint: the base is imported, nothing of it trains again."""
    fields = {"base.checkpoint": workdir / "base", "base.logit_scale": 0.0, "data.base": "", "data.test": ""}
    run_tiny(tmp_path, fields | {"data.train": workdir / "data" / "train"})
    assert not (tmp_path / "eval").exists()
    folders = tmp_path / "base", workdir / "base"
    imported, own = (trees.flatten(load_model(folder)[1]) for folder in folders)
    for name, leaf in own.items():
        np.testing.assert_array_equal(imported[name], leaf)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["phase"] for line in lines} == {"mcl_1", "consolidation", "router"}


@exhaustive
def test_what_comes_from_another_base_is_not_shared(files, tmp_path):
    """The base's data is an input of all that is made from it."""
    config, workdir = tiny_config(), epath.Path(tmp_path)
    config.update_from_flattened_dict(fields_of(files))
    configs.set_variants(config, {"shard": {}, "scenes": {"data.base": "digit_scenes:train?pairs=64"}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmu_results, "_diagnose", lambda run, folder, progress: {})
        patch.setattr(dmu_results, "_nothing_changed", lambda run: [])
        runner.run_variants(config, workdir)
    assert {path.parent for path in workdir.glob("*/data/base/report.json")} == {workdir / "scenes/data/base"}
    for name in ("base", "stage_1/features", "stage_1/params", "moe/params"):
        done = json.loads((workdir / "scenes" / name / "done.json").read_text())
        assert "copied_from" not in done and "contents of data.base" in done["inputs"], name
