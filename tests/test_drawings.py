"""The tables of benchmarks/drawings.py, from two small packages of the format that npm installs."""

import csv
import json
import sys

import pytest
from PIL import Image

from benchmarks import drawings
from clipmoe_jax.data.sources import open_source

NAMES = ["HASH KEY", "Jordan Flag", "SPIRAL SHELL", "OM", "GARLIC", "RAZOR"]


@pytest.fixture
def packages(tmp_path):
    """Both vendors' drawings of six names; the fifth has two skin tones, one of them only Twitter's."""
    for vendor in drawings.VENDORS:
        entries = []
        folder = tmp_path / "node_modules" / f"emoji-datasource-{vendor}" / "img" / vendor / "64"
        folder.mkdir(parents=True)
        for number, name in enumerate(NAMES):
            entry = {"name": name, "image": f"{number}.png", "subcategory": "a-kind", "short_names": ["x_y"]}
            entry |= {f"has_img_{v}": True for v in drawings.VENDORS}
            if name == "GARLIC":
                tone = {"image": "4-tone.png", "has_img_twitter": True, "has_img_google": False}
                entry["skin_variations"] = {"1F3FB": tone}
            entries.append(entry)
            Image.new("RGBA", (64, 64), (number, 0, 0, 255)).save(folder / f"{number}.png")
        Image.new("RGBA", (64, 64)).save(folder / "4-tone.png")
        (tmp_path / "node_modules" / f"emoji-datasource-{vendor}" / "emoji.json").write_text(
            json.dumps(entries)
        )
    return tmp_path / "node_modules"


def table(path):
    with path.open(newline="") as file:
        return [(row["filepath"], row["title"]) for row in csv.DictReader(file)]


def test_every_fourth_name_of_one_vendor_is_held_out(packages, tmp_path, monkeypatch, capsys):
    out = tmp_path / "drawings"
    monkeypatch.setattr(sys, "argv", ["drawings", f"--packages={packages}", f"--out={out}"])
    drawings.main()
    google = "emoji-datasource-google/img/google/64"
    assert table(out / "test.csv") == [(f"{google}/0.png", "hash key"), (f"{google}/4.png", "garlic")]
    train = table(out / "train.csv")
    assert (
        len(train) == 6 + 1 + 4
        and ("emoji-datasource-twitter/img/twitter/64/4-tone.png", "a photo of a garlic.") in train
    )
    assert not {path for path, _ in train} & {path for path, _ in table(out / "test.csv")}
    assert table(out / "rehearsal.csv") == train[:1]
    assert table(out / "test_full.csv")[0][1] == "google drawing of hash key, x y, a kind"
    assert "train: 11 drawings, 6 names" in capsys.readouterr().out
    pairs = list(open_source(f"csv:{out}/train.csv?images={packages}"))
    assert [pair.captions[0] for pair in pairs] == [title for _, title in train]


def test_missing_package_is_named(tmp_path):
    with pytest.raises(SystemExit, match="emoji-datasource-google is not there: npm install"):
        list(drawings.read(tmp_path, "google"))
