"""`clipmoe_jax.load` and the model that it returns, which encodes images and captions."""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from clipmoe_jax import config as configs
from clipmoe_jax.core import sharding
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, normalize_features
from clipmoe_jax.models.inputs import END_ID
from clipmoe_jax.models.transformer import ComputeConfig


class LoadedClip:
    """A dense CLIP or a CLIP-MoE that encodes images and captions.

    config: the architecture. params: the param tree. source: the kind of model and its format, in words; the
    model's repr shows it.
    """

    def __init__(self, config: ClipConfig, params: dict, source: str, compute: ComputeConfig):
        self.config, self.params, self.source = config, params, source
        self.model = Clip(config, compute)

    def encode_image(
        self, images: Sequence[Image.Image] | Image.Image | np.ndarray | jax.Array, *, normalize: bool = False
    ) -> jax.Array:
        """Returns image features (B, embed) float32.

        images: PIL images or a single one, or an array (B, H, W, 3), uint8 or preprocessed floats.
        normalize: scales each row to unit length. Raises TypeError for other inputs.
        """
        if not hasattr(images, "shape"):
            images = [images] if isinstance(images, Image.Image) else list(images)
            if odd := [type(i).__name__ for i in images if not isinstance(i, Image.Image)]:
                raise TypeError(f"encode_image takes PIL images or one NHWC array, not a list with {odd[0]}")
            size = self.config.vision.image_size
            images = np.stack([preprocess_image(image, size) for image in images])
        return self._encode("encode_image", jnp.asarray(images), normalize)

    def encode_text(
        self, texts: str | Sequence[str] | np.ndarray | jax.Array, *, normalize: bool = False
    ) -> jax.Array:
        """Returns text features (B, embed) float32.

        texts: strings or a single one, or token ids (B, L) int32. normalize: scales each row to unit length.
        Raises ValueError if the model has no text tower, and for strings if its vocabulary is not CLIP's.
        """
        text = self.config.text
        if text is None:
            raise ValueError(f"{self!r} cannot encode text")
        if hasattr(texts, "shape"):
            tokens = texts
        elif text.vocab_size == END_ID + 1 and text.eos_token_id in (None, END_ID):
            tokens = Tokenizer(text.context_length)(cast("str | Sequence[str]", texts))
        else:
            raise ValueError(
                f"{self!r} has {text.vocab_size:,} tokens of its own, not CLIP's 49,408: give token ids"
            )
        return self._encode("encode_text", jnp.asarray(tokens, jnp.int32), normalize)

    def __repr__(self) -> str:
        return f"<{self.source}, embed_dim {self.config.embed_dim}>"

    def _encode(self, method: str, inputs: jax.Array, normalize: bool) -> jax.Array:
        # Flax modules are hashable, though their dataclasses do not declare it.
        encode = make_encode(self.model, method)  # pyright: ignore[reportArgumentType]
        features = encode(self.params, inputs)
        return normalize_features(features) if normalize else features


def load(
    path: str,
    *,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
) -> LoadedClip:
    """Returns a CLIP or CLIP-MoE read from any of the formats in docs/interop.md.

    num_selected_experts: K of an MoE; None takes what the file says, or 2 if it does not. activation: of a
    bare state dict; None means quick_gelu. context_length: 248 stretches a text tower of 77 positions.
    image_size: resizes the vision tower's grid of positions. dtype: of the computation.
    Raises FileNotFoundError or ValueError naming what is wrong.
    """
    model = read_model(
        path,
        num_selected_experts=num_selected_experts,
        activation=activation,
        context_length=context_length,
        image_size=image_size,
        place=lambda _, leaf: jnp.asarray(leaf),
    )
    config = configs.default_config()
    config.update({"compute": {"dtype": dtype}})
    compute = configs.compute_config(config, sharding.platform())
    return LoadedClip(model.config, model.params, model.source, compute)
