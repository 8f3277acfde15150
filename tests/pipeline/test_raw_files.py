"""A run on a user's own files: sources that it prepares, and a base trained from scratch."""

import io
import json
import pathlib
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


def config_of(files):
    config = tiny_config()
    config.data.train = f"sharegpt4v:{files}/captions.json?images={files}/images"
    config.data.test = f"folder:{files}/images"
    config.data.base = f"webdataset:{files}/shard.tar"
    return config


def run_variants(config, workdir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmu_results, "_diagnose", lambda run, folder: {})
        return runner.run_variants(config, workdir)


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """(workdir, results)."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs")) / "run"
    [results] = run_variants(config_of(files), workdir)[""]
    return workdir, results


def test_run_on_raw_files_prepares_trains_and_evaluates(run):
    workdir, results = run
    assert list(results) == ["base", "stage 1 alone", "CLIP-MoE"]
    folder = pathlib.Path(workdir)
    prepared = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("report.json")}
    assert prepared == {"data/train", "data/test", "data/base"}
    report = json.loads((workdir / "data" / "train" / "report.json").read_text())
    assert report["pairs"] == 48 and report["bad"] == 0


def test_run_starts_from_the_base_of_another_run(run, tmp_path):
    """As from any checkpoint: the base is imported, nothing of it trains again."""
    workdir, _ = run
    config = tiny_config()
    config.base.checkpoint, config.base.logit_scale = str(workdir / "base"), 0.0
    config.data.train, config.data.base, config.data.test = str(workdir / "data" / "train"), "", ""
    assert runner.run_variants(config, epath.Path(tmp_path)) == {"": []}
    folders = tmp_path / "base", workdir / "base"
    imported, own = (trees.flatten(load_model(folder)[1]) for folder in folders)
    for name, leaf in own.items():
        np.testing.assert_array_equal(imported[name], leaf)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["phase"] for line in lines} == {"mcl_1", "router"}


@exhaustive
def test_what_comes_from_another_base_is_not_shared(files, tmp_path):
    """The base's data is an input of all that is made from it."""
    config, workdir = config_of(files), epath.Path(tmp_path)
    configs.set_variants(config, {"shard": {}, "scenes": {"data.base": "digit_scenes:train?pairs=64"}})
    run_variants(config, workdir)
    assert {path.parent for path in workdir.glob("*/data/base/report.json")} == {workdir / "scenes/data/base"}
    for name in ("base", "stage_1/features", "stage_1/params", "moe/params"):
        done = json.loads((workdir / "scenes" / name / "done.json").read_text())
        assert "copied_from" not in done and "contents of data.base" in done["inputs"], name
