"""A natural second world: drawings of emoji by two vendors, with names written by people.

    npm install --prefix data/npm emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
    python -m benchmarks.drawings --packages=data/npm/node_modules --out=data/drawings
    python -m clipmoe_jax.main --config=configs/drawings.py:controls,seeds=41-50 --workdir=runs/drawings

writes tables for the source `csv:`, with paths below --packages: `train.csv`, every drawing of Twitter's and
those of Google's whose name is not held out; `test.csv`, Google's of every fourth name, with names alone, for
zero-shot classification; `rehearsal.csv`, every 13th line of the first; `train_full.csv` and `test_full.csv`,
the same drawings with longer captions. Drawings in several skin tones have one name. Nothing of the packages
is shipped here: the drawings are Twitter's (CC BY 4.0) and Google's (Apache 2.0), the data emoji-datasource's
(MIT).
"""

import argparse
import csv
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

VENDORS = ("twitter", "google")
HELD_OUT = "google"
EVERY = 4  # of so many names one is held out
REHEARSED = 13  # of so many drawings one is rehearsed, some 500


class Drawing(NamedTuple):
    """One image. name: as people write it; tags: short names and kind, joined."""

    path: str
    vendor: str
    name: str
    tags: str
    is_held_out: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packages", type=pathlib.Path, required=True, help="the folder node_modules")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a folder for the tables")
    flags = parser.parse_args()
    drawings = [drawing for vendor in VENDORS for drawing in read(flags.packages, vendor)]
    flags.out.mkdir(parents=True, exist_ok=True)
    for split, is_held_out in (("train", False), ("test", True)):
        part = [drawing for drawing in drawings if drawing.is_held_out == is_held_out]
        named = {drawing.path: drawing.name for drawing in part}
        if split == "train":
            named = {path: f"a photo of a {name}." for path, name in named.items()}
            write(flags.out / "rehearsal.csv", dict(list(named.items())[::REHEARSED]))
        write(flags.out / f"{split}.csv", named)
        full = {
            drawing.path: f"{drawing.vendor} drawing of {drawing.name}, {drawing.tags}" for drawing in part
        }
        write(flags.out / f"{split}_full.csv", full)
        print(f"{split}: {len(part)} drawings, {len({drawing.name for drawing in part})} names")


def read(packages: pathlib.Path, vendor: str) -> Iterator[Drawing]:
    """Yields the drawings of a vendor. Raises SystemExit naming the package if it is not there."""
    package = packages / f"emoji-datasource-{vendor}"
    if not (package / "emoji.json").exists():
        raise SystemExit(f"{package} is not there: npm install emoji-datasource-{vendor}@16.0.0")
    number_of: dict[str, int] = {}
    for entry in json.loads((package / "emoji.json").read_text()):
        name = entry["name"].lower()
        number = number_of.setdefault(name, len(number_of))
        is_held_out = vendor == HELD_OUT and number % EVERY == 0
        words = [*entry["short_names"], entry["subcategory"]]
        tags = ", ".join(word.replace("_", " ").replace("-", " ") for word in words)
        for variant in (entry, *entry.get("skin_variations", {}).values()):
            path = package / "img" / vendor / "64" / variant["image"]
            if variant[f"has_img_{vendor}"] and path.exists():
                yield Drawing(str(path.relative_to(packages)), vendor, name, tags, is_held_out)


def write(path: pathlib.Path, captions: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        writer.writerows(captions.items())


if __name__ == "__main__":
    main()
