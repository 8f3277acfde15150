"""Turns a source of image-caption pairs into a data set that can be read by index.

    python -m clipmoe_jax.prepare --source='sharegpt4v:captions.json?images=DIR' --out=DIR
    python -m clipmoe_jax.prepare --source=folder:DIR --out=DIR --pixels=224
    python -m clipmoe_jax.prepare --source=… --out=DIR --part=3/64    # and the others, on any machines; then
    python -m clipmoe_jax.prepare --merge --out=DIR

docs/data.md has every kind of source; several become one data set. The result is a TFDS data set in
ArrayRecord files (`clipmoe_jax.data.records.Records` reads it, and so does `tfds.data_source("pairs",
data_dir=OUT)`), with the images as they came or, by --pixels, as a model takes them. Beside it lie
`report.json` (counts), `bad_records.jsonl` (every entry that was left out, and why) and the captions'
lengths. A run that was killed goes on with the file it was writing when the same command starts again.
"""

import os
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from clipmoe_jax.core import accelerators, cli
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data import parts, preparation, sources

MERGES = ("out", "max_bad_fraction")  # the flags that --merge takes


def main(argv: list[str]) -> str:
    """Prepares or merges the data set that the flags name; returns a line that says what was made."""
    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS logs each thing it does
    accelerators.take_none()
    options = flags.FLAGS
    try:
        if options.merge:
            return _described(options.out, _merge())
        if not options.source:
            raise ValueError("--source is missing: KIND:PATH, or --merge where all parts are prepared")
        return _prepare_part(parts.Part.parse(options.part)) if options.part else _prepare()
    except preparation.TooManyBadRecordsError as error:
        raise error.of_flag() from error


def _prepare() -> str:
    source, arguments = _source_and_arguments()
    return _described(flags.FLAGS.out, preparation.prepare(source, flags.FLAGS.out, **arguments))


def _prepare_part(part: parts.Part) -> str:
    source, arguments = _source_and_arguments()
    out, files = flags.FLAGS.out, sources.source_stamp(",".join(flags.FLAGS.source))
    if flags.FLAGS.follow_links:
        arguments["name"] += " --follow_links"
    counts = parts.prepare_part(source, out, part, files=files, **arguments)
    then = f"When all {part.total:,} parts are there: python -m clipmoe_jax.prepare --merge --out={out}"
    return f"{_described(part.folder(out), counts)} {printable_line(then)}"


def _merge() -> dict[str, Any]:
    options = flags.FLAGS
    own = {flag.name for flag in options.get_flags_for_module(_define_flags.__module__)}
    if given := sorted(name for name in own - {"merge", *MERGES} if options[name].present):
        raise ValueError(f"--merge has no use for --{', --'.join(given)}: its parts say it; leave it out")
    return parts.merge(options.out, max_bad_fraction=options.max_bad_fraction)


def _source_and_arguments() -> tuple[sources.Source, dict[str, Any]]:
    """Returns the source that the flags name, and how to prepare it."""
    options = flags.FLAGS
    spec = ",".join(options.source)
    names = ("split", "max_bad_fraction", "num_shards", "pixels")
    arguments = {name: options[name].value for name in names}
    source = sources.open_source(spec, options.images, follow_links=options.follow_links)
    return source, arguments | {"name": sources.canonical(spec, options.images)}


def _described(folder: os.PathLike | str, counts: Mapping[str, Any]) -> str:
    return (
        f"{printable_line(folder)}: {counts['pairs']:,} pairs with {counts['captions']:,} captions, "
        f"{counts['image_bytes'] / 1e6:,.1f} MB of images; {counts['bad']:,} bad records left out."
    )


def _define_flags() -> None:
    """Defines the flags, for the command alone: who imports this module has flags of their own."""
    examples = ", ".join(kind.example for kind in sources.KINDS.values())
    flags.DEFINE_multi_string(
        "source", None, f"KIND:PATH, such as {examples}; given several times, one data set of all."
    )
    flags.DEFINE_string("images", None, "The folder that image paths start from, in place of ?images=DIR.")
    flags.DEFINE_bool(
        "follow_links", False, "Read links inside of sources too, as git-annex, DVC and caches have them."
    )
    flags.DEFINE_string("out", None, "The folder to make.")
    flags.DEFINE_string("split", "train", "The name of the split to write.")
    flags.DEFINE_float("max_bad_fraction", 1e-3, "Stop if a larger part of the records is bad.")
    flags.DEFINE_integer(
        "num_shards",
        None,
        f"Files to write; if not given, one for every {preparation.ENTRIES_PER_SHARD} entries, at most "
        f"{preparation.MOST_SHARDS}.",
    )
    flags.DEFINE_integer("pixels", None, "Store images preprocessed at this size, captions tokenised.")
    flags.DEFINE_string(
        "part", None, "K/N: prepares part K, 0 to N - 1, of N in OUT.parts, for --merge; each on any machine."
    )
    flags.DEFINE_bool("merge", False, "Makes OUT of the parts in OUT.parts, as one process would have.")
    flags.mark_flag_as_required("out")


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
