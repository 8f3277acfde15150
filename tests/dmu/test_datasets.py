"""A run's data sets: which folder each lies in, that it is prepared once, and what is refused."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from etils import epath
from PIL import Image

from clipmoe_jax.config import default_config, set_variants, variant_configs
from clipmoe_jax.core import distributed
from clipmoe_jax.data import preparation, sources
from clipmoe_jax.data.records import Records
from clipmoe_jax.dmu.datasets import Dataset, check_disjoint, datasets_of
from clipmoe_jax.dmu.runner import check_sources, run_variants

SCENES = "digit_scenes:train?pairs=8"


def config_of(train: str, **data: str):
    config = default_config()
    config.data.update(data, train=train)
    return config


def folders(config, seed=0, variant=""):
    """{name: folder under the workdir} of a variant's data sets."""
    own = variant_configs(config)[variant]
    datasets = datasets_of(own, config, epath.Path("w"), variant, seed)
    return {name: dataset.path for name, dataset in datasets.items()}


def test_prepared_folder_is_used_where_it_is():
    config = config_of("data/train", test="data/test")
    assert folders(config) == {"train": "data/train", "test": "data/test"}


def test_prepared_folder_may_lie_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = config_of("~/train", test="~/test[1]")
    assert folders(config) == {"train": "/home/me/train", "test": "/home/me/test[1]"}


def test_source_is_prepared_into_the_workdir():
    config = config_of("folder:photos", test="coco:val.json?images=val", base=SCENES)
    assert folders(config) == {"train": "w/data/train", "test": "w/data/test", "base": "w/data/base"}


def test_base_from_a_checkpoint_needs_no_data():
    config = config_of("folder:photos", base=SCENES)
    config.base.checkpoint = "clip.pt"
    assert folders(config) == {"train": "w/data/train"}


def test_seeds_share_files_and_have_generated_pairs_of_their_own():
    config = config_of(SCENES, test="folder:photos", base=f"{SCENES}&seed=7")
    config.seeds = (1, 2)
    for seed in (1, 2):
        own = folders(config, seed)
        assert own == {"train": f"w/data/seed_{seed}/train", "test": "w/data/test", "base": "w/data/base"}
    datasets = datasets_of(config, config, epath.Path("w"), "", 2)
    assert datasets["train"].source == f"{SCENES}&seed=2" and datasets["base"].source == f"{SCENES}&seed=7"


def test_variants_share_a_data_set_unless_they_name_another():
    config = config_of("folder:photos", test=SCENES)
    set_variants(config, {"a": {}, "b": {"data.train": "folder:others"}})
    assert folders(config, variant="a") == {"train": "w/data/train", "test": "w/data/test"}
    assert folders(config, variant="b") == {"train": "w/b/data/train", "test": "w/data/test"}


def test_source_with_a_workdir_in_a_bucket_is_refused():
    config = config_of(SCENES)
    with pytest.raises(
        ValueError, match=r"data\.train=digit_scenes:.* lies in a bucket: prepare it on a disk"
    ):
        datasets_of(config, config, epath.Path("gs://bucket/run"), "", 0)


def write_photos(folder, count: int = 4) -> None:
    """Images with a caption each: a folder, a tar shard, and ShareGPT4V's JSON of the same."""
    (folder / "photos").mkdir()
    entries = []
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for i in range(count):
            out, caption = io.BytesIO(), f"a square of brightness {i}"
            Image.fromarray(np.full((40, 50, 3), 20 * i, np.uint8)).save(out, "PNG")
            (folder / "photos" / f"{i}.png").write_bytes(out.getvalue())
            (folder / "photos" / f"{i}.txt").write_text(caption)
            for suffix, contents in (("png", out.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": caption}]
            entries.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(entries))


RAW = {
    "a folder": "folder:{0}/photos",
    "tar shards": "webdataset:{0}/photos.tar",
    "ShareGPT4V": "sharegpt4v:{0}/captions.json?images={0}/photos",
    "two of them": "folder:{0}/photos,webdataset:{0}/photos.tar",
}


@pytest.mark.parametrize("source", RAW.values(), ids=RAW)
def test_raw_files_are_prepared_once_and_opened(tmp_path, monkeypatch, source):
    write_photos(tmp_path)
    dataset = Dataset(str(tmp_path / "run" / "data" / "train"), "train[:3]", source.format(tmp_path))
    assert dataset.prepare(1e-3)
    monkeypatch.setattr(preparation, "write_pairs", lambda *args, **kwargs: pytest.fail("prepared again"))
    assert not dataset.prepare(1e-3)
    records = dataset.open()
    assert len(records) == 3 and records[1]["captions"] == ["a square of brightness 1"]


def test_a_source_that_changed_is_refused_and_one_that_has_gone_is_not_missed(tmp_path):
    write_photos(tmp_path)
    captions, images = tmp_path / "captions.json", tmp_path / "photos"
    # Of two files, one that has gone does not hide that the other has changed.
    source = f"sharegpt4v:{captions}?images={images},webdataset:{tmp_path}/photos.tar"
    dataset = Dataset(str(tmp_path / "train"), "train", source)
    dataset.prepare(1e-3)
    (tmp_path / "photos.tar").unlink()
    dataset.check()
    assert not dataset.prepare(1e-3)
    captions.write_text(captions.read_text().replace("square", "circle"))
    with pytest.raises(ValueError, match="^sharegpt4v:.* has changed since .*train was prepared"):
        dataset.check()


CHANGES = {
    "a caption": ("folder:{0}/photos", "photos/1.txt"),
    "an image": ("folder:{0}/photos", "photos/1.png"),
    "a file more": ("folder:{0}/photos", "photos/new.png"),
    "one of two sources": ("webdataset:{0}/photos.tar,folder:{0}/photos", "photos/1.txt"),
    "a shard more": ("webdataset:{0}", "new.tar"),
    "a shard of a pattern": ("webdataset:{0}/*.tar", "photos.tar"),
}


@pytest.mark.parametrize(("source", "changed"), CHANGES.values(), ids=CHANGES)
def test_folder_that_changed_is_refused(tmp_path, source, changed):
    write_photos(tmp_path)
    dataset = Dataset(str(tmp_path / "photos" / "train"), "train", source.format(tmp_path))
    dataset.prepare(1e-3)
    dataset.check()
    with (tmp_path / changed).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="has changed since .*train was prepared from it .names, sizes"):
        dataset.check()


def test_folder_whose_files_an_earlier_version_did_not_look_at_is_used(tmp_path):
    write_photos(tmp_path)
    dataset = Dataset(str(tmp_path / "train"), "train", f"folder:{tmp_path}/photos")
    dataset.prepare(1e-3)
    done = json.loads((tmp_path / "train" / "done.json").read_text())
    done["inputs"]["source files"] = ""
    (tmp_path / "train" / "done.json").write_text(json.dumps(done))
    (tmp_path / "train" / "checksums.json").unlink()
    dataset.check()
    (tmp_path / "photos" / "1.txt").write_text("new")
    dataset.check()


def test_images_are_as_they_were_when_they_were_prepared(tmp_path):
    """Their folder may have others, too: of a prepared data set it is not looked at again."""
    write_photos(tmp_path)
    source = f"sharegpt4v:{tmp_path}/captions.json?images={tmp_path}/photos"
    dataset = Dataset(str(tmp_path / "train"), "train", source)
    dataset.prepare(1e-3)
    (tmp_path / "photos" / "new.png").touch()
    dataset.check()


def test_source_by_another_spelling_is_the_same(tmp_path, monkeypatch):
    write_photos(tmp_path)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, path = str(tmp_path / "train"), f"{tmp_path}/photos"
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preempted", lambda: True)
        patch.setattr(preparation, "ENTRIES_PER_SHARD", 2)
        with pytest.raises(distributed.Preempted):
            Dataset(folder, "train", f"folder:{path}").prepare(1e-3)
    monkeypatch.setattr(preparation, "ENTRIES_PER_SHARD", 2)
    assert Dataset(folder, "train", "folder:photos").prepare(1e-3)
    for spelled in ("photos/", "./photos", "link/../photos", "link", "~/photos", path):
        dataset = Dataset(folder, "train", f"folder:{spelled}")
        dataset.check()
        assert not dataset.prepare(1e-3)


def test_split_that_a_data_set_lacks_is_told_with_its_field(tmp_path):
    preparation.prepare(sources.open_source(SCENES), str(tmp_path / "set"))
    config = config_of(str(tmp_path / "set"), test=str(tmp_path / "set"), base=SCENES)
    with pytest.raises(
        ValueError, match="^data.test_split: .*set has no split 'test': choose train .8 records."
    ):
        run_variants(config, epath.Path(tmp_path / "run"))
    prepared = Dataset(str(tmp_path / "run" / "test"), "test", SCENES)
    prepared.prepare(1e-3)
    num_pairs = {}
    check_sources(config, {"test": prepared}, num_pairs)
    assert num_pairs == {prepared: 8}
    with pytest.raises(
        ValueError, match="^data.test_split: .*run/test has no split 'val': choose test .8 records."
    ):
        check_sources(config, {"test": dataclasses.replace(prepared, split="val")}, {})


def test_another_source_for_the_same_folder_is_refused(tmp_path):
    write_photos(tmp_path)
    folder = str(tmp_path / "train")
    Dataset(folder, "train", f"folder:{tmp_path}/photos").prepare(1e-3)
    with pytest.raises(ValueError, match="train was prepared from folder:.*, the config says webdataset:"):
        Dataset(folder, "train", f"webdataset:{tmp_path}/photos.tar").check()


def test_a_folder_that_no_run_prepared_is_left_alone(tmp_path):
    """As in a workdir of the demo by version 0.1."""
    write_photos(tmp_path)
    with pytest.raises(
        ValueError, match="photos is there and is no data set that a run prepared from folder:"
    ):
        Dataset(str(tmp_path / "photos"), "train", f"folder:{tmp_path}/photos").check()


def test_a_source_that_is_not_there_is_told_before_anything_is_prepared(tmp_path):
    write_photos(tmp_path)
    config = config_of(f"folder:{tmp_path}/photos", test=f"folder:{tmp_path}/nowhere", base=SCENES)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run_variants(config, epath.Path(tmp_path / "run"))
    config.data.test = f"sharegpt4v:{tmp_path}/captions.json"
    with pytest.raises(ValueError, match="data.test: source sharegpt4v:.* needs the folder"):
        run_variants(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_few_pairs_are_told_before_anything_is_prepared(tmp_path):
    write_photos(tmp_path)
    config = config_of(f"folder:{tmp_path}/photos", test=f"folder:{tmp_path}/photos", base=SCENES)
    config.mcl.batch_size = 64
    with pytest.raises(ValueError, match="mcl.batch_size=64 is more than the 4 training pairs"):
        run_variants(config, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_pixels_of_another_size_are_told_with_their_fields_before_training(tmp_path):
    preparation.prepare(sources.open_source(SCENES), str(tmp_path / "files"))
    preparation.prepare(sources.open_source(SCENES), str(tmp_path / "same"), pixels=28)
    preparation.prepare(sources.open_source(SCENES), str(tmp_path / "old48"), pixels=48)
    files, same, other = (str(tmp_path / name) for name in ("files", "same", "old48"))
    config = config_of(files, test=same, test_split="train", base=other, rehearsal=other)
    config.base.architecture.vision.image_size = 28
    with pytest.raises(ValueError) as raised:
        run_variants(config, epath.Path(tmp_path / "run"))
    message = "the data set holds pixels of size 48 and the model takes 28: prepare it with pixels=28"
    assert f"data.base, data.rehearsal: {message}" in str(raised.value)
    assert str(raised.value).count("holds pixels") == 1 and not (tmp_path / "run").exists()


def test_a_preparation_stops_between_entries_and_goes_on_with_the_file(tmp_path, monkeypatch):
    write_photos(tmp_path)
    monkeypatch.setattr(preparation, "ENTRIES_PER_SHARD", 2)
    dataset, asked = Dataset(str(tmp_path / "train"), "train", f"folder:{tmp_path}/photos"), []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "preempted", lambda: asked.append(1) or len(asked) == 3)
        with pytest.raises(distributed.Preempted, match="^data: stopped"):
            dataset.prepare(1e-3)
    assert len(asked) == 3
    assert len(list((tmp_path / "train.unfinished").rglob("*.done.json"))) == 1
    assert dataset.prepare(1e-3) and len(dataset.open()) == 4


def test_more_bad_records_than_the_config_allows_stop_the_run(tmp_path):
    write_photos(tmp_path)
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    dataset = Dataset(str(tmp_path / "train"), "train", f"folder:{tmp_path}/photos")
    with pytest.raises(ValueError, match="max_bad_fraction"):
        dataset.prepare(1e-3)
    assert dataset.prepare(0.5) and len(dataset.open()) == 3


@pytest.mark.parametrize("name", ["test", "retention"])
@pytest.mark.parametrize("pixels", [None, 32], ids=["files", "pixels"])
def test_rehearsed_image_that_is_tested_too_is_named(tmp_path, name, pixels):
    datasets, workdir = [], epath.Path(tmp_path / "run")
    for seed in (0, 1):
        source = sources.open_source(f"glyphs:train?pairs=3&seed={seed}")
        preparation.prepare(source, str(tmp_path / str(seed)), pixels=pixels)
        datasets.append(Records(str(tmp_path / str(seed)), ""))
    check_disjoint({"rehearsal": datasets[0], name: datasets[1]}, workdir)
    with pytest.raises(ValueError, match=rf"data.rehearsal: the image of '\d+' .* in data.{name}: leave"):
        check_disjoint({"rehearsal": datasets[0], name: datasets[0]}, workdir)


def test_images_are_compared_once(tmp_path, monkeypatch):
    """By other seeds and a run that goes on not again, but when a data set has changed."""
    datasets, read, workdir = {}, [], epath.Path(tmp_path / "run")
    for seed, name in enumerate(("test", "rehearsal", "retention")):
        preparation.prepare(sources.open_source(f"glyphs:train?pairs=3&seed={seed}"), str(tmp_path / name))
        datasets[name] = Records(str(tmp_path / name), "")
    read_record = Records.__getitem__
    monkeypatch.setattr(Records, "__getitem__", lambda *args: read.append(1) or read_record(*args))

    def num_read():
        read.clear()
        check_disjoint(datasets, workdir)
        return len(read)

    assert [num_read() for _ in range(2)] == [9, 0]
    datasets["test"] = datasets.pop("retention")
    assert [num_read() for _ in range(2)] == [6, 0]
    (workdir / "compared.json").write_text("{")
    assert num_read() == 6


def test_comparing_images_stops_when_it_is_asked_to(tmp_path, monkeypatch):
    preparation.prepare(sources.open_source("glyphs:train?pairs=3"), str(tmp_path / "set"))
    dataset = Records(str(tmp_path / "set"), "")
    monkeypatch.setattr(distributed, "preempted", lambda: True)
    with pytest.raises(distributed.Preempted, match="^data: stopped"):
        check_disjoint({"rehearsal": dataset, "test": dataset}, epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
