"""Converts a model of any format that `clipmoe_jax.load` reads to one that another program reads.

    python -m clipmoe_jax.convert --from=runs/demo/moe/params --to=huggingface --out=exported

Formats: huggingface (transformers), openclip (dense models), clipmoe (the released PyTorch code). The
README.md written into each folder, and docs/interop.md, say what it holds and how to use it.
"""

import pathlib

from absl import flags, logging
from etils import epath

from clipmoe_jax.core import accelerators, artifacts, cli, trees
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data import preprocess, tokenizer
from clipmoe_jax.interop import export
from clipmoe_jax.interop.load import Loaded, read_model
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.reporting.model_card import model_card


def write_huggingface(folder: epath.Path, config: ClipConfig, params: trees.Params) -> None:
    """Writes a folder for transformers, with CLIP's tokenizer if the model has CLIP's vocabulary."""
    modules = pathlib.Path(preprocess.__file__).parent
    export.write_huggingface(folder, config, params, tokenizer.backend(), modules)


WRITERS = {
    "huggingface": write_huggingface,
    "openclip": export.write_openclip,
    "clipmoe": export.write_clipmoe,
}


@printable_errors()
def convert(
    source: str,
    to: str,
    out: str,
    *,
    dtype: str | None = None,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
) -> Loaded:
    """Reads a model and writes it to the new folder `out`, whole or not at all. Returns the model.

    to: a key of WRITERS. dtype: of the written tensors; None keeps each tensor's own. The other arguments are
    those of `clipmoe_jax.load`. Raises FileNotFoundError or ValueError naming what does not fit.
    """
    if to not in WRITERS:
        raise ValueError(f"{to!r} is not a format: choose one of {', '.join(WRITERS)}")
    if in_bucket(out):
        raise ValueError(f"{out} is in a bucket: write to a local folder, then copy it there")
    with artifacts.new_folder(epath.Path(out)) as folder:
        model = read_model(
            source,
            num_selected_experts=num_selected_experts,
            activation=activation,
            vision_head_width=vision_head_width,
            text_head_width=text_head_width,
            context_length=context_length,
            image_size=image_size,
            dtype=dtype,
        )
        (folder / "README.md").write_text(
            model_card(source, model.config, model.params, model.source, to, epath.Path(out).name)
        )
        WRITERS[to](folder, model.config, model.params)
    return model


def main(argv: list[str]) -> str:
    """Runs the command; returns a message that names what it read and wrote."""
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax logs every file it opens
    accelerators.take_none()
    options = flags.FLAGS
    source = str(options["from"].value)  # `from` is a keyword of Python
    model = convert(
        source,
        options.to,
        options.out,
        dtype=options.dtype,
        **cli.model_options(),
    )
    out = printable_line(options.out)
    return f"{printable_line(source)}: {model.source}\n{out}: {options.to}; its README.md says how to use it."


def _define_flags() -> None:
    """Defines the flags. Not at import: a program that imports this module has flags of its own."""
    flags.DEFINE_string("from", None, "The model: any file or folder that clipmoe_jax.load takes.")
    flags.DEFINE_enum("to", None, list(WRITERS), "The format to write.")
    flags.DEFINE_string("out", None, "The folder to write.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16", "bfloat16"],
        "Of the written tensors; by default each keeps its own.",
    )
    cli.define_model_flags()
    flags.mark_flags_as_required(["from", "to", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
