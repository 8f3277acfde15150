"""Turns a source of image-caption pairs into a data set that can be read by index.

    python -m clipmoe_jax.prepare --source='sharegpt4v:captions.json?images=DIR' --out=DIR
    python -m clipmoe_jax.prepare --source=folder:DIR --out=DIR --pixels=224

docs/data.md has every kind of source; several become one data set. The result is a TFDS data set in
ArrayRecord files (`clipmoe_jax.data.records.Records` reads it, and so does `tfds.data_source("pairs",
data_dir=OUT)`), with the images as they came or, by --pixels, as a model takes them. Beside it lie
`report.json` (counts), `bad_records.jsonl` (every entry that was left out, and why) and the captions'
lengths. A run that was killed goes on with the file it was writing when the same command starts again.
"""

from absl import flags, logging

from clipmoe_jax.core import accelerators, cli
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data import preparation, sources


def main(argv: list[str]) -> str:
    """Prepares the data set that the flags name; returns a line that says what was made."""
    del argv
    logging.set_verbosity(logging.WARNING)  # TFDS logs each thing it does
    accelerators.take_none()
    options = flags.FLAGS
    spec = ",".join(options.source)
    try:
        report = preparation.prepare(
            sources.open_source(spec, options.images, follow_links=options.follow_links),
            options.out,
            split=options.split,
            max_bad_fraction=options.max_bad_fraction,
            num_shards=options.num_shards,
            pixels=options.pixels,
            name=sources.canonical(spec, options.images),
        )
    except preparation.TooManyBadRecordsError as error:
        raise ValueError(f"{error} (the flag is --max_bad_fraction)") from error
    return (
        f"{printable_line(options.out)}: {report['pairs']:,} pairs with {report['captions']:,} captions, "
        f"{report['image_bytes'] / 1e6:,.1f} MB of images; {report['bad']:,} bad records left out."
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
    flags.mark_flags_as_required(["source", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
