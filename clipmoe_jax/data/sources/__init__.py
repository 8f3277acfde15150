"""Sources: image-caption data sets as people have them, read one pair at a time.

A source is written KIND:PATH or KIND:PATH?option=value&option=value, several with commas between them:

    sharegpt4v:captions.json?images=DIR
    coco:train.json?images=train2017,coco:val.json?images=val2017

Percent escapes in paths and values are decoded: a comma in a path is %2C. Paths may begin with `~`. What is
read is plain files under the paths that are named; `follow_links=true` reads links inside too. Each kind
is a class with `__len__` and `__iter__` (base.Source) and a row of KINDS; another kind is another such class
and row.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote

from etils import epath

from clipmoe_jax.core import stamps
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.data.sources.base import (
    AttributeSpec,
    BadRecord,
    Concatenated,
    Pair,
    Source,
    Unique,
)
from clipmoe_jax.data.sources.coco import Coco
from clipmoe_jax.data.sources.conversations import ShareGPT4V
from clipmoe_jax.data.sources.digit_scenes import DigitScenes
from clipmoe_jax.data.sources.files import matching
from clipmoe_jax.data.sources.folders import IMAGES, Classes, ImageFolder, Img2Dataset, NamedImages
from clipmoe_jax.data.sources.glyphs import Glyphs
from clipmoe_jax.data.sources.huggingface import HuggingFace
from clipmoe_jax.data.sources.options import parse_options
from clipmoe_jax.data.sources.parquet import Parquet
from clipmoe_jax.data.sources.shards import WebDataset
from clipmoe_jax.data.sources.tables import Csv, Flickr30k
from clipmoe_jax.data.sources.tfds import Tfds, tfds_folder

__all__ = [
    "KINDS",
    "AttributeSpec",
    "BadRecord",
    "ImageFolder",
    "Pair",
    "ShareGPT4V",
    "Source",
    "canonical",
    "is_captioned",
    "is_source",
    "num_sources",
    "open_source",
    "source_stamp",
    "with_seed",
]


class Kind(NamedTuple):
    """A row of KINDS.

    Attributes:
        opens: the class, called with the path and the options by name.
        example: a source of this kind, for error messages.
        images: whether the option `images`, the folder that image paths start from, is "needed", "optional"
            or of "no use".
        options: the others that `opens` takes; "data_dir" is a folder too.
        names: of the files that count in a folder of this kind (`core.stamps.stamp`).
        generated: whether the pairs are made up, from an option `seed`; nothing is read then.
        captioned: whether captions tell of the images; else they are names of files.
        in_bucket: whether its path may lie in a bucket.
    """

    opens: Callable[..., Source]
    example: str
    images: str = "no use"
    options: tuple[str, ...] = ()
    names: str = ""
    generated: bool = False
    captioned: bool = True
    in_bucket: bool = False

    @property
    def all_options(self) -> tuple[str, ...]:
        images = ["images"] if self.images != "no use" else []
        return (*self.options, *images, *([] if self.generated else [FOLLOW]))


KINDS = {
    "sharegpt4v": Kind(ShareGPT4V, "sharegpt4v:captions.json?images=DIR", images="needed"),
    "folder": Kind(ImageFolder, "folder:DIR", names=f"{IMAGES}|{ImageFolder.captions}"),
    "img2dataset": Kind(Img2Dataset, "img2dataset:DIR", names=f"{IMAGES}|{Img2Dataset.captions}"),
    "classes": Kind(Classes, "classes:DIR", names=IMAGES),
    "images": Kind(NamedImages, "images:DIR", names=IMAGES, captioned=False),
    "webdataset": Kind(WebDataset, "webdataset:DIR", names=r"\.tar$", in_bucket=True),
    "parquet": Kind(Parquet, "parquet:DIR", images="optional", names=r"\.parquet$", in_bucket=True),
    "huggingface": Kind(
        HuggingFace,
        "huggingface:DIR",
        images="optional",
        options=("image", "caption", "id"),
        names=r"\.(arrow|json)$",
    ),
    "coco": Kind(Coco, "coco:captions_val2017.json?images=DIR", images="needed"),
    "flickr30k": Kind(Flickr30k, "flickr30k:results_20130124.token?images=DIR", images="needed"),
    "csv": Kind(Csv, "csv:captions.tsv?images=DIR", images="needed"),
    "tfds": Kind(
        Tfds,
        "tfds:coco_captions?split=val",
        options=("data_dir", "split", "image", "caption", "id"),
        in_bucket=True,
    ),
    "glyphs": Kind(Glyphs, "glyphs:train?pairs=6000", options=("pairs", "alphabet", "seed"), generated=True),
    "digit_scenes": Kind(
        DigitScenes,
        "digit_scenes:train?pairs=8000",
        options=("pairs", "captions", "seed"),
        generated=True,
    ),
}
_KIND = f"(?:{'|'.join(KINDS)}):"
FOLLOW = "follow_links"  # the option of every kind that reads files
_FOLDERS = ("images", "data_dir")  # the options that are paths


class _Spec(NamedTuple):
    """One source, taken apart; path and options are unquoted."""

    text: str
    kind: str
    path: str
    options: dict[str, str]


def is_source(text: str) -> bool:
    """Returns whether a text is a source, not the path of a prepared data set: it begins with a kind and a
    colon."""
    return re.match(_KIND, text) is not None


def num_sources(spec: str) -> int:
    """Returns how many sources with commas between them a text is."""
    return len(_parse(spec))


def is_captioned(spec: str) -> bool:
    """Returns whether the captions of a source, of one at least of several, tell of the images."""
    return any(KINDS[one.kind].captioned for one in _parse(spec))


@printable_errors()
def open_source(spec: str, images: str | None = None, seed: int = 0, follow_links: bool = False) -> Source:
    """Opens a source, or several with commas between them as one; an id that came before is a bad record.

    The ids of several sources begin with the source's number ("0/", "1/", …); those of one are its own.

    Args:
        spec: such as "sharegpt4v:captions.json?images=DIR"; docs/data.md has every kind.
        images: the option `images` of every source that has none and a use for it.
        seed: of generated sources that have none.
        follow_links: the option `follow_links` of every source that has none.

    Raises:
        ValueError: an unknown kind or option, no path, image folders that are missing, of no use or two, or
            linked folders, shards or tables.
        FileNotFoundError: a path that does not exist.
    """
    specs = _parse(with_seed(spec, seed))
    images = images and os.path.expanduser(images)
    if images is not None and all(KINDS[one.kind].images == "no use" for one in specs):
        raise ValueError(f"source {spec} has no use for images={images}: leave it out")
    sources = [_open(one, images, follow_links) for one in specs]
    return Unique(sources[0] if len(sources) == 1 else Concatenated(sources), spec)


def with_seed(spec: str, seed: int) -> str:
    """Returns the source with `seed=` added wherever pairs are generated and none is given."""
    texts = []
    for one in _parse(spec):
        if KINDS[one.kind].generated and "seed" not in one.options:
            texts.append(f"{one.text}{'&' if one.options else '?'}seed={seed}")
        else:
            texts.append(one.text)
    return ",".join(texts)


def source_stamp(spec: str) -> str:
    """Returns a stamp (`core.stamps.stamp`) of the file, the folder or the files of each source, with commas
    between them; "" for one that is not there or is generated. Folders of `images` do not count."""
    found = []
    for one in _parse(spec):
        kind, follow = KINDS[one.kind], one.options.get(FOLLOW) == "true"
        files = [] if kind.generated else _files(one)
        found.append(stamps.stamp(*files, names=kind.names, follow_links=follow))
    return ",".join(found)


def canonical(spec: str, images: str | None = None) -> str:
    """Returns the one spelling of a source: paths absolute and without links, options sorted.

    images: as for `open_source`.
    """
    spelled = []
    for one in _parse(spec):
        path, options = one.path, dict(one.options)
        if images is not None and KINDS[one.kind].images != "no use":
            options.setdefault("images", images)
        if not KINDS[one.kind].generated and (one.kind != "tfds" or os.path.exists(path)):
            file, mark, split = (path, "", "") if os.path.exists(path) else path.partition("#")  # coco's
            path = stamps.canonical(file) + mark + split
        options |= {name: stamps.canonical(options[name]) for name in _FOLDERS if name in options}
        spelled.append(f"{one.kind}:{path}?{sorted(options.items())}")
    return ",".join(spelled)


def _files(spec: _Spec) -> list[str]:
    """Returns the file, the folder or the files of a source, those that are there."""
    if in_bucket(spec.path):
        with _readable_bucket(spec):
            return [spec.path] if epath.Path(spec.path).is_dir() else sorted(matching(spec.path))
    places = [spec.path, spec.path.partition("#")[0]]  # coco's #split
    if spec.kind == "tfds":
        places.append(tfds_folder(spec.path, spec.options.get("data_dir")) or "")
    return next(([place] for place in places if os.path.exists(place)), sorted(matching(spec.path)))


def _parse(spec: str) -> list[_Spec]:
    return list(map(_parse_one, re.split(f",(?={_KIND})", spec)))


def _parse_one(text: str) -> _Spec:
    kind, _, rest = text.partition(":")
    # The last question mark before a name and "=": others are of the path, a pattern of files.
    path, query = rest, ""
    if match := re.fullmatch(r"(.*)\?(\w+=.*)", rest, re.DOTALL):
        path, query = match.groups()
    if kind not in KINDS or not path:
        examples = ", ".join(known.example for known in KINDS.values())
        raise ValueError(f"source {text} is not KIND:PATH: use one such as {examples}")
    try:
        options = parse_options(query)
    except ValueError as error:
        raise ValueError(f"source {text}: {error}") from None
    if "images" in options and KINDS[kind].images == "no use":
        raise ValueError(f"source {text} has no use for images={options['images']}: leave it out")
    known = KINDS[kind].all_options
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(
            f"source {text}: no option {', '.join(unknown)}; {kind} has {', '.join(known) or 'none'}"
        )
    if options.get(FOLLOW, "true") not in ("true", "false"):
        raise ValueError(f"source {text}: {FOLLOW}={options[FOLLOW]} must be true or false")
    options |= {name: os.path.expanduser(options[name]) for name in _FOLDERS if name in options}
    return _Spec(text, kind, os.path.expanduser(unquote(path)), options)


def _open(spec: _Spec, images: str | None, follow_links: bool) -> Source:
    kind, options = KINDS[spec.kind], dict[str, Any](spec.options)
    if in_bucket(spec.path) and not kind.in_bucket:
        raise ValueError(
            f"source {spec.text} lies in a bucket: copy its files to a disk, or mount the bucket"
        )
    if not kind.generated:
        options[FOLLOW] = spec.options[FOLLOW] == "true" if FOLLOW in spec.options else follow_links
    if images is not None and kind.images != "no use":
        if options.setdefault("images", images) != images:
            raise ValueError(f"source {spec.text} is given another image folder, {images}: leave one out")
    if kind.images == "needed" and "images" not in options:
        raise ValueError(f"source {spec.text} needs the folder its image paths start from: add ?images=DIR")
    with _readable_bucket(spec):
        return kind.opens(spec.path, **options)


@contextlib.contextmanager
def _readable_bucket(spec: _Spec) -> Iterator[None]:
    """Raises ValueError for what the library of a bucket raises: it may miss, or a login, or a connection."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # the libraries' own classes have no common one
        if not in_bucket(spec.path):
            raise
        raise ValueError(f"source {spec.text}: its bucket cannot be read: {error}") from error
