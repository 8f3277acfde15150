"""`clipmoe_jax.load` and the model that it returns, which encodes images and captions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from PIL import Image

from clipmoe_jax import config as configs
from clipmoe_jax.core import sharding
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, normalize_features
from clipmoe_jax.models.transformer import ComputeConfig

LARGEST_BATCH = 256  # rows that are computed at once


class LoadedClip:
    """A dense CLIP or a CLIP-MoE that encodes images and captions.

    A batch may have any size: it is computed in parts of 256 rows, the last one padded to a power of two, so
    that few programs are compiled.

    config: the architecture. params: the param tree. source: the kind of model and its format, in words; the
    model's repr shows it.
    """

    def __init__(self, config: ClipConfig, params: dict, source: str, compute: ComputeConfig):
        self.config, self.params, self.source = config, params, source
        self.model = Clip(config, compute)

    def encode_image(
        self, images: Sequence[Image.Image] | Image.Image | np.ndarray | jax.Array, *, normalize: bool = False
    ) -> jax.Array:
        """Returns image features (B, embed) float32; B is 1 for a single image.

        PIL images are resized, cropped and converted as by OpenAI's code. EXIF orientation is ignored, as
        there: turn photographs upright first, with PIL.ImageOps.exif_transpose.

        images: PIL images or a single one, or an array (B, H, W, 3), uint8 or preprocessed floats.
        normalize: scales each row to unit length. Raises TypeError for other inputs, and ValueError for an
        image that does not decode and an array of another shape.
        """
        found = _array_or_list(images, Image.Image, "encode_image takes PIL images or one array (B, H, W, 3)")
        if isinstance(found, list):
            if odd := [type(i).__name__ for i in found if not isinstance(i, Image.Image)]:
                raise TypeError(
                    f"encode_image takes PIL images or one array (B, H, W, 3), not a list with {odd[0]}: "
                    "open files with PIL.Image.open, make arrays images with PIL.Image.fromarray"
                )
            size = self.config.vision.image_size
            pixels = [preprocess_image(image, size) for image in found]
            found = np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)
        return self._encode("encode_image", found, normalize)

    def encode_text(
        self, texts: str | Sequence[str] | np.ndarray | jax.Array, *, normalize: bool = False
    ) -> jax.Array:
        """Returns text features (B, embed) float32; B is 1 for a single string.

        texts: strings, in a list, an array or a column of a table, or a single one; or token ids (B, L) of
        any integer type. normalize: scales each row to unit length. Raises ValueError if the model has no
        text tower, for strings if its vocabulary is not CLIP's, and for ids that are not in its vocabulary;
        TypeError for other inputs.
        """
        text = self.config.text
        if text is None:
            raise ValueError(f"{self!r} cannot encode text")
        found = _array_or_list(texts, str, "encode_text takes strings or one array of token ids (B, L)")
        if not isinstance(found, list):
            _check_token_ids(found, text.vocab_size)
        elif text.has_clips_tokens:
            found = Tokenizer(text.context_length)(found)
        elif found:
            raise ValueError(
                f"{self!r} has {text.vocab_size:,} tokens of its own, not CLIP's 49,408: give token ids"
            )
        return self._encode("encode_text", jnp.asarray(found, jnp.int32), normalize)

    def __repr__(self) -> str:
        return f"<{self.source}, embed_dim {self.config.embed_dim}>"

    def _encode(self, method: str, inputs: np.ndarray | jax.Array, normalize: bool) -> jax.Array:
        if not len(inputs):
            return jnp.zeros((0, self.config.embed_dim), jnp.float32)
        # Flax modules are hashable, though their dataclasses do not declare it.
        encode = make_encode(self.model, method)  # pyright: ignore[reportArgumentType]
        inputs, size = jnp.asarray(inputs), self.config.vision.image_size
        fits = inputs.ndim == 2 if method == "encode_text" else inputs.shape[1:] == (size, size, 3)
        if isinstance(inputs, Tracer) or not fits:  # which raises an error that tells the shape
            features = encode(self.params, inputs)
        else:
            parts = [encode(self.params, part)[:n] for part, n in _parts(inputs)]
            features = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return normalize_features(features) if normalize else features


def _parts(inputs: jax.Array) -> Iterator[tuple[jax.Array, int]]:
    """Yields parts of a batch, padded to a power of two, and how many rows of each are the batch's.

    Nine sizes at most, each of which compiles once.
    """
    for start in range(0, len(inputs), LARGEST_BATCH):
        part = inputs[start : start + LARGEST_BATCH]
        padding = (1 << (len(part) - 1).bit_length()) - len(part)
        yield jnp.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)), len(part)


def _array_or_list(inputs: Any, one: type, takes: str) -> np.ndarray | jax.Array | list[Any]:
    """Returns numbers as an array (not a copy of JAX's) and objects as a list, which has a single one alone.

    one: the type of a single object. takes: begins the message of the TypeError for anything else.
    """
    if isinstance(inputs, jax.Array):
        return inputs
    if isinstance(inputs, one):
        return [inputs]
    if hasattr(inputs, "__array__"):  # of numpy or PyTorch, a column of a table
        array = np.atleast_1d(np.asarray(inputs))
        if array.dtype.kind not in "OSTU" and array.shape != (0,):
            return array
        if array.ndim > 1:
            raise TypeError(f"{takes}, not an array of objects of shape {array.shape}: give one column")
        return array.tolist()
    if not isinstance(inputs, Iterable) or isinstance(inputs, (str, bytes, Mapping, Set)):
        raise TypeError(f"{takes}, not a {type(inputs).__name__}")
    return list(inputs)


def _check_token_ids(ids: np.ndarray | jax.Array, vocab_size: int) -> None:
    if isinstance(ids, Tracer):
        return
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids are {ids.dtype}: give integers")
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"token ids have shape {ids.shape}: give an array (B, L)")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"token ids lie between {ids.min()} and {ids.max()}, but this model's are 0 to {vocab_size - 1}: "
            "give those of its own tokenizer"
        )


@printable_errors()
def load(
    path: str,
    *,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
) -> LoadedClip:
    """Returns a CLIP or CLIP-MoE read from any of the formats in docs/interop.md.

    num_selected_experts: K of an MoE; None takes what the file says, or 2 if it does not. activation: of a
    bare state dict; None means quick_gelu. vision_head_width, text_head_width: of a bare state dict too; None
    means 64, or what open_clip's vision towers of that width have. context_length: 248 stretches a text tower
    of 77 positions. image_size: resizes the vision tower's grid of positions. dtype: of the computation.
    Raises FileNotFoundError or ValueError naming what is wrong.
    """
    model = read_model(
        path,
        num_selected_experts=num_selected_experts,
        activation=activation,
        vision_head_width=vision_head_width,
        text_head_width=text_head_width,
        context_length=context_length,
        image_size=image_size,
        place=lambda _, leaf: jnp.asarray(leaf),
    )
    config = configs.default_config()
    config.update({"compute": {"dtype": dtype}})
    compute = configs.compute_config(config, sharding.platform())
    return LoadedClip(model.config, model.params, model.source, compute)
