"""Formats in: image-caption data sets as people have them, read one pair at a time.

A source is a class with `__len__` and `__iter__`; it yields a `Pair` for each usable entry and a `BadRecord`
for each other one, always in the same order, and raises only if there is nothing to read at all. Another
format is another such class and a row of FORMATS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from clipmoe_jax.data.sources.base import BadRecord, Pair, Unique
from clipmoe_jax.data.sources.coco import Coco
from clipmoe_jax.data.sources.conversations import ShareGPT4V
from clipmoe_jax.data.sources.folders import Classes, ImageFolder, Img2Dataset
from clipmoe_jax.data.sources.parquet import Parquet
from clipmoe_jax.data.sources.shards import WebDataset
from clipmoe_jax.data.sources.tables import Csv, Flickr30k
from clipmoe_jax.data.sources.tfds import Tfds

__all__ = ["FORMATS", "BadRecord", "ImageFolder", "Pair", "ShareGPT4V", "open_source"]


class _Format(NamedTuple):
    """opens: class, given the path and, unless `images` is "no", the image folder. images: whether --images
    must be given ("yes"), may be ("optional") or has no use ("no")."""

    opens: Callable[..., Any]
    images: str
    example: str


FORMATS = {
    "sharegpt4v": _Format(ShareGPT4V, "yes", "sharegpt4v:captions.json"),
    "folder": _Format(ImageFolder, "no", "folder:DIR"),
    "img2dataset": _Format(Img2Dataset, "no", "img2dataset:DIR"),
    "classes": _Format(Classes, "no", "classes:DIR"),
    "webdataset": _Format(WebDataset, "no", "webdataset:DIR"),
    "parquet": _Format(Parquet, "optional", "parquet:DIR"),
    "coco": _Format(Coco, "yes", "coco:captions_val2017.json"),
    "flickr30k": _Format(Flickr30k, "yes", "flickr30k:results_20130124.token"),
    "csv": _Format(Csv, "yes", "csv:captions.tsv"),
    "tfds": _Format(Tfds, "no", "tfds:coco_captions?split=val"),
}


def open_source(spec: str, images: str | None = None) -> Unique:
    """Opens the source that KIND:PATH names; an id that came before is a bad record.

    Args:
        spec: such as "sharegpt4v:captions.json"; docs/data.md has every kind.
        images: the image folder, for kinds that keep captions and images apart.

    Raises:
        ValueError: an unknown kind, no path, or `images` missing or given without need.
        FileNotFoundError: a path that does not exist.
    """
    kind, _, path = spec.partition(":")
    if kind not in FORMATS or not path:
        examples = ", ".join(found.example for found in FORMATS.values())
        raise ValueError(f"--source={spec} is not KIND:PATH: use one such as {examples}.")
    opens, needs, _ = FORMATS[kind]
    if needs == "no":
        if images is not None:
            raise ValueError(f"--images={images} has no use with --source={spec}: leave it out.")
        return Unique(opens(path))
    if needs == "yes" and images is None:
        raise ValueError(f"--source={spec} needs --images=DIR, the folder its image paths are in.")
    return Unique(opens(path, images))
