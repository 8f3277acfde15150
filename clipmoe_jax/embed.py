"""Encodes a folder, tar shards, Parquet or a prepared data set, and finds images in what it wrote.

    python -m clipmoe_jax.embed --model=runs/demo/moe/params --source=webdataset:shards --out=features
    python -m clipmoe_jax.embed --model=ViT-L-14.pt --source=images:photos --out=features --search='a red car'
    python -m clipmoe_jax.embed --model=ViT-L-14.pt --out=features --search_image=car.jpg

--source is KIND:PATH of docs/data.md, or the folder of a prepared data set. The features are unit vectors in
clip-retrieval's layout (docs/embed.md). A command that was killed goes on with the part it was writing when
the same command starts again.
"""

import hashlib
import json
import time

import jax
import numpy as np
from absl import flags, logging
from etils import epath

from clipmoe_jax import config as configs
from clipmoe_jax.core import cli, distributed, sharding, trees
from clipmoe_jax.core.checksums import read_verified
from clipmoe_jax.core.json_files import field
from clipmoe_jax.core.paths import written_whole
from clipmoe_jax.core.terminal import printable_line, shortened
from clipmoe_jax.data import preparation, sources
from clipmoe_jax.data.decoding import preprocess_file
from clipmoe_jax.data.records import Records
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluate import read
from clipmoe_jax.evaluation.embedding import REPORT, Embedder, PreparedPairs
from clipmoe_jax.evaluation.encoder import Encoder
from clipmoe_jax.evaluation.search import Hit, nearest, read_images
from clipmoe_jax.interop.load import Loaded
from clipmoe_jax.models.clip import Clip
from clipmoe_jax.reporting.pictures import contact_sheet

SHEET = "search.png"


def main(argv: list[str]) -> str:
    """Embeds, searches, or both, as the flags say; returns a line that says what was made, and what was
    found."""
    del argv
    logging.set_verbosity(logging.WARNING)  # tfds and orbax log every file they open
    options = flags.FLAGS
    distributed.keep_compiled_programs()
    folder, searches = epath.Path(options.out), _searches()
    embeds = not (searches and (folder / REPORT).exists())
    if embeds and not options.source:
        raise ValueError(f"{folder} holds no features: name what to encode, --source=KIND:PATH")
    model = read(options.model, **cli.model_options())
    query = _query(model) if searches else None  # before all is encoded: it may be one that cannot be
    told = []
    if embeds:
        cli.say(f"{options.model}: {model.source}")
        try:
            told.append(_embed(model))
        except preparation.TooManyBadRecordsError as error:
            raise error.of_flag() from error
    if query is not None:
        told.append(_search(model, folder, query))
    return "\n".join(told)


def _searches() -> bool:
    """Returns whether a query is given. Raises ValueError for two, an empty one or a missing file."""
    options = flags.FLAGS
    given = [name for name in ("search", "search_image") if options[name].present]
    if len(given) > 1:
        raise ValueError("--search and --search_image are two queries: give one")
    for name in given:
        if not str(options[name].value).strip():
            raise ValueError(f"--{name} is empty: say what to search for, or leave it out")
    if options.search_image and not epath.Path(options.search_image).exists():
        raise ValueError(f"--search_image={options.search_image} does not exist: give an image file")
    return bool(given)


def _embed(model: Loaded) -> str:
    """Writes the features that the flags name; returns a line that says so."""
    options = flags.FLAGS
    spec, image_size = ",".join(options.source), model.config.vision.image_size
    captioned = sources.is_captioned(spec) if sources.is_source(spec) else True
    tokenizer = _tokenizer(model) if captioned else None
    embedder = Embedder(
        _open(spec, options.split, image_size), _encoder(model, options.batch_size), image_size, tokenizer
    )
    began = time.perf_counter()
    report = embedder.write(
        options.out,
        inputs={"source": spec, "split": options.split, "model": _fingerprint(model)},
        num_parts=options.num_parts,
        max_bad_fraction=options.max_bad_fraction,
    )
    rate = ""
    if embedder.num_encoded:
        per_second = embedder.num_encoded / (time.perf_counter() - began)
        rate = f" {per_second:,.1f} images/s on {jax.device_count()} device(s)."
    of = "images and their captions" if tokenizer else "images"
    return (
        f"{printable_line(options.out)}: features of {report['images']:,} {of}; {report['bad']:,} bad "
        f"records left out.{rate}"
    )


def _query(model: Loaded) -> np.ndarray:
    """Returns the unit features (d,) of what the flags search for.

    Raises ValueError for a model that takes no text, and for a file that does not decode.
    """
    options, encoder = flags.FLAGS, _encoder(model, 1)
    if options.search_image:
        pixels = preprocess_file(options.search_image, model.config.vision.image_size)
        return encoder.images(pixels[None])[0]
    if tokenizer := _tokenizer(model):
        return encoder.texts(tokenizer(options.search))[0]
    raise ValueError(f"the model is a {model.source}, which takes no text: give --search_image=FILE")


def _search(model: Loaded, folder: epath.Path, query: np.ndarray) -> str:
    """Returns a line for each of the images nearest to a query (d,), and shows them on a sheet."""
    options = flags.FLAGS
    report = read_verified(folder / REPORT)
    if field(report, "model", str, str(folder / REPORT)) != _fingerprint(model):
        raise ValueError(f"{folder} has the features of another model than {options.model}: give that one")
    spec = ",".join(options.source) or field(report, "source", str, str(folder / REPORT))
    split = options.split or field(report, "split", str, str(folder / REPORT))
    hits = nearest(folder, query, options.num_results)
    lines = [*map(_line, hits)]
    try:
        images = read_images(_open(spec, split, model.config.vision.image_size), hits)
        sheet = contact_sheet(images, [f"{hit.similarity:.3f} {hit.id}" for hit in hits])
    except (OSError, ValueError) as error:
        (folder / SHEET).unlink(missing_ok=True)  # of another query
        why = f"{printable_line(error)}; --source= names where the images are now"
        return "\n".join([*lines, f"{printable_line(folder / SHEET)} is left out: {why}."])
    with written_whole(folder / SHEET) as path:
        sheet.save(path, "PNG")
    return "\n".join([*lines, f"{printable_line(folder / SHEET)} shows them."])


def _line(hit: Hit) -> str:
    parts = [f"{hit.similarity:.3f}", printable_line(hit.id)]
    if hit.caption != epath.Path(hit.id).stem:  # of images without captions
        parts.append(printable_line(shortened(hit.caption, 60)))
    return "  ".join(parts)


def _open(spec: str, split: str, image_size: int) -> sources.Source:
    """Opens a source or a prepared data set."""
    if not sources.is_source(spec):
        return PreparedPairs(Records(spec, split), image_size)
    if split:
        raise ValueError(f"--split={split} is of prepared data sets, and {spec} is a source: leave it out")
    return sources.open_source(spec)


def _tokenizer(model: Loaded) -> Tokenizer | None:
    """Returns CLIP's tokenizer if the model takes CLIP's tokens."""
    text = model.config.text
    return Tokenizer(text.context_length, False) if text and text.has_clips_tokens else None


def _encoder(model: Loaded, batch_size: int) -> Encoder:
    compute = configs.compute_config(configs.config_of_model(model.config), sharding.platform())
    return Encoder(Clip(model.config, compute), model.params, sharding.make_mesh(), batch_size)


def _fingerprint(model: Loaded) -> str:
    """Returns a hash of architecture and params, which no format changes."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, leaf in trees.flatten(model.params).items():
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _define_flags() -> None:
    """Defines the flags, for the command alone: who imports this module has flags of their own."""
    flags.DEFINE_string("model", None, "Any file or folder that clipmoe_jax.load takes.")
    flags.DEFINE_multi_string(
        "source",
        [],
        "KIND:PATH, several as one, or a prepared data set; of a search, where that is now.",
    )
    flags.DEFINE_string("split", "", "Of a prepared data set: a split, or a slice of one.")
    flags.DEFINE_string("out", None, "The folder of the features.")
    flags.DEFINE_string("search", "", "Shows the images nearest to a text.")
    flags.DEFINE_string("search_image", "", "Shows the images nearest to an image file.")
    flags.DEFINE_integer("num_results", 20, "Images to show.", lower_bound=1, upper_bound=1000)
    flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1)
    flags.DEFINE_integer("num_parts", None, "Files of each kind to write.", lower_bound=1)
    flags.DEFINE_float(
        "max_bad_fraction", 1e-3, "Stop if a larger part of the records is bad.", lower_bound=0, upper_bound=1
    )
    cli.define_model_flags()
    flags.mark_flags_as_required(["model", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
