"""Turns a model of any format that `clipmoe_jax.load` reads into one that another program reads.

    python -m clipmoe_jax.convert --from=runs/demo/moe/params --to=huggingface --out=exported

Formats: huggingface (transformers), openclip (dense models), clipmoe (the released PyTorch code). What each
folder holds and how to use it stands in the README.md that is written into it, and in docs/interop.md.
"""

from absl import flags, logging
from etils import epath

from clipmoe_jax.core import artifacts, cli
from clipmoe_jax.data import tokenizer
from clipmoe_jax.interop import export
from clipmoe_jax.interop.load import Loaded, read_model
from clipmoe_jax.reporting.model_card import model_card

WRITERS = {
    "huggingface": lambda *model: export.write_huggingface(*model, tokenizer.backend()),
    "openclip": export.write_openclip,
    "clipmoe": export.write_clipmoe,
}


def convert(
    source: str,
    to: str,
    out: str,
    *,
    dtype: str | None = None,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
) -> Loaded:
    """Reads a model and writes it to the new folder `out`, whole or not at all; returns what was read.

    to: a name of WRITERS. dtype: of the written tensors; None keeps each one's own. The rest is
    `clipmoe_jax.load`'s. Raises FileNotFoundError or ValueError naming what does not fit.
    """
    if to not in WRITERS:
        raise ValueError(f"--to={to} is not a format: choose one of {', '.join(WRITERS)}")
    if "://" in out:
        raise ValueError(f"--out={out}: safetensors are written to local disks alone: copy the folder then")
    with artifacts.new_folder(epath.Path(out)) as folder:
        model = read_model(
            source,
            num_selected_experts=num_selected_experts,
            activation=activation,
            context_length=context_length,
            image_size=image_size,
            dtype=dtype,
        )
        (folder / "README.md").write_text(
            model_card(source, model.config, model.params, model.source, to, epath.Path(out).name)
        )
        WRITERS[to](folder, model.config, model.params)
    return model


def main(argv: list[str]) -> None:
    """The command: reads flags, converts, says what it read and made."""
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it opens
    options = flags.FLAGS
    source = options["from"].value
    model = convert(
        source,
        options.to,
        options.out,
        dtype=options.dtype,
        num_selected_experts=options.num_selected_experts,
        activation=options.activation,
        context_length=options.context_length,
        image_size=options.image_size,
    )
    print(f"{source}: {model.source}\n{options.out}: {options.to}; its README.md says how to use it.")


def _define_flags() -> None:
    """Called by the command alone: who imports this module has flags of their own."""
    flags.DEFINE_string("from", None, "The model: any file or folder that clipmoe_jax.load takes.")
    flags.DEFINE_enum("to", None, list(WRITERS), "The format to write.")
    flags.DEFINE_string("out", None, "The folder to make.")
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16", "bfloat16"],
        "Of the written tensors; each its own if not given.",
    )
    flags.DEFINE_integer("num_selected_experts", None, "K of a CLIP-MoE, where the file does not say it.")
    flags.DEFINE_enum("activation", None, ["quick_gelu", "gelu"], "Of a bare state dict, which does not say.")
    flags.DEFINE_integer("context_length", None, "248 stretches 77 text positions.")
    flags.DEFINE_integer("image_size", None, "Resizes the vision tower's grid of positions.")
    flags.mark_flags_as_required(["from", "to", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
