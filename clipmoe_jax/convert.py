"""Converts a model of any format that `clipmoe_jax.load` reads to one that another program reads.

    python -m clipmoe_jax.convert --from=runs/demo/moe/params --to=huggingface --out=exported

Formats: huggingface (transformers), sentence-transformers, openclip (dense models), clipmoe (the released
PyTorch code), onnx and onnx-int8, stablehlo (JAX alone). The README.md written into each folder, and
docs/interop.md, say what it holds and how to use it.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

from absl import flags, logging
from etils import epath

from clipmoe_jax.core import accelerators, artifacts, cli, trees
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.core.paths import in_bucket
from clipmoe_jax.core.terminal import printable_line
from clipmoe_jax.data import preprocess, tokenizer
from clipmoe_jax.interop import export
from clipmoe_jax.interop.load import Loaded, read_model
from clipmoe_jax.interop.tensor_files import finite
from clipmoe_jax.models.clip import ClipConfig
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.reporting.model_card import model_card

Writer = Callable[[epath.Path, ClipConfig, trees.Params], None]


def _with_processor(write: Callable[..., None], **options: Any) -> Writer:
    """Returns a writer that has what prepares images and texts."""
    modules = pathlib.Path(preprocess.__file__).parent
    return lambda folder, config, params: write(
        folder, config, params, tokenizer.backend(), modules, **options
    )


WRITERS: dict[str, Writer] = {
    "huggingface": _with_processor(export.write_huggingface),
    "sentence-transformers": _with_processor(export.write_sentence_transformers),
    "openclip": export.write_openclip,
    "clipmoe": export.write_clipmoe,
    "onnx": _with_processor(export.write_onnx),
    "onnx-int8": _with_processor(export.write_onnx, int8=True),
    "stablehlo": _with_processor(export.write_stablehlo),
}
PROGRAMS = ("onnx", "onnx-int8", "stablehlo")  # which compute in float32


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
    expert: int | None = None,
    interpolate: float | None = None,
    base: str | None = None,
) -> Loaded:
    """Reads a model and writes it to the new folder `out`, whole or not at all. Returns the model.

    to: a key of WRITERS. dtype: of the written tensors; None keeps each tensor's own, and is float32 for an
    average. expert: of a CLIP-MoE, as a dense model. interpolate: the share of the model, from 0 to 1, in its
    average with the model of the path `base`; None is expert 0. The other arguments are those of
    `clipmoe_jax.load`. Raises FileNotFoundError or ValueError naming what does not fit.
    """
    if to not in WRITERS:
        raise ValueError(f"{to!r} is not a format: choose one of {', '.join(WRITERS)}")
    if in_bucket(out):
        raise ValueError(f"{out} is in a bucket: write to a local folder, then copy it there")
    if interpolate is not None and not 0 <= interpolate <= 1:
        raise ValueError(f"interpolate={interpolate} must lie between 0, the base, and 1, the model")
    if base is not None and interpolate is None:
        raise ValueError(f"base={base} has no share: give interpolate, such as 0.5")
    if to in PROGRAMS:
        if dtype not in (None, "float32"):
            raise ValueError(f"dtype={dtype}: {to} computes in float32: leave it out")
        dtype = "float32"
    read = functools.partial(
        read_model,
        num_selected_experts=num_selected_experts,
        activation=activation,
        vision_head_width=vision_head_width,
        text_head_width=text_head_width,
        context_length=context_length,
        image_size=image_size,
        dtype=dtype if interpolate is None else "float32",
    )
    with artifacts.new_folder(epath.Path(out)) as folder:
        whole = read(source)
        model = whole if expert is None else _expert(whole, expert)
        if interpolate is not None:
            if base is None and expert is None:
                raise ValueError(
                    f"{source} is to be averaged with nothing: give base, the dense model it came from"
                )
            model = _between(_expert(whole, 0) if base is None else read(base), model, interpolate, dtype)
        card = model_card(
            *(source, model.config, model.params, model.source, to, epath.Path(out).name),
            expert=expert,
            is_blend=interpolate is not None,
        )
        (folder / "README.md").write_text(card)
        WRITERS[to](folder, model.config, model.params)
    return model


def _expert(model: Loaded, e: int) -> Loaded:
    """Returns an expert as a dense model. Raises ValueError as `expert_as_dense`."""
    return Loaded(
        *expert_as_dense(model.params, model.config, e), f"dense CLIP, expert {e} of a {model.source}"
    )


def _between(base: Loaded, model: Loaded, share: float, dtype: str | None) -> Loaded:
    """Returns the average of two dense models of one architecture, cast to `dtype`; share: of `model`."""
    for one in (base, model):
        if one.config.moe:
            raise ValueError(f"a {one.source} has no single weights to average: choose an expert")
    if base.config != model.config:
        ours, theirs = (trees.flatten(one.config.to_dict()) for one in (model, base))
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise ValueError(
            f"the model has {name}={ours.get(name)!r} and the base {theirs.get(name)!r}: only models of one "
            "architecture have averages"
        )
    source = f"blend of {share:g} {model.source} and {1 - share:g} {base.source}"
    leaves = trees.flatten(trees.blend(base.params, model.params, share))
    params = trees.unflatten({name: finite(leaf, name, dtype, source) for name, leaf in leaves.items()})
    return Loaded(model.config, params, source)


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
        expert=options.expert,
        interpolate=options.interpolate,
        base=options.base,
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
    flags.DEFINE_integer("expert", None, "An expert of a CLIP-MoE alone, as the dense model it came from.")
    flags.DEFINE_float("interpolate", None, "The model's share in its average with --base, weight by weight.")
    flags.DEFINE_string(
        "base", None, "The other model of the average; of an expert it is expert 0 if not given."
    )
    cli.define_model_flags()
    flags.mark_flags_as_required(["from", "to", "out"])


if __name__ == "__main__":
    _define_flags()
    cli.run(main)
