"""CLIP, dense or mixture-of-experts: two towers into one embedding space.

Letters: B batch, R rows of packed captions, L length, H and W height and width of images, G patches along a
side.
"""

import dataclasses
import functools
import reprlib
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from clipmoe_jax.core import trees
from clipmoe_jax.core.checks import fields_of, number, whole_number
from clipmoe_jax.core.errors import Errors
from clipmoe_jax.core.sharding import devices_in_use
from clipmoe_jax.models.feed_forward import ACTIVATIONS
from clipmoe_jax.models.inputs import END_ID, MEAN, STD, PackedText
from clipmoe_jax.models.linear import einsum
from clipmoe_jax.models.transformer import ComputeConfig, MoeConfig, apply_blocks, layer_norm

Array = jax.Array
Images = UInt8[Array | np.ndarray, "B H W 3"] | Float[Array | np.ndarray, "B H W 3"]
Tokens = Int[Array | np.ndarray, "B L"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    image_size: pixels a side. patch_size: pixels a side of a patch. width: of the tokens. num_layers: blocks.
    head_width: of an attention head. mlp_width: of the feed-forward layers; None is four times the width.
    """

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    num_layers: int = 12
    head_width: int = 64
    mlp_width: int | None = None

    @property
    def grid(self) -> int:
        """Returns the patches along a side."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower.

    vocab_size: token ids. context_length: positions. width: of the tokens. num_layers: blocks. head_width: of
    an attention head. mlp_width: of the feed-forward layers; None is four times the width.
    eos_token_id: the end token, at whose first position the text feature is read out; None is the highest id
    of a row, as in OpenAI's CLIP, whose end token has the highest id of all.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    num_layers: int = 12
    head_width: int = 64
    mlp_width: int | None = None
    eos_token_id: int | None = None

    @property
    def has_clips_tokens(self) -> bool:
        """Returns whether its token ids are those of CLIP's tokenizer."""
        return self.vocab_size == END_ID + 1 and self.eos_token_id in (None, END_ID)


# The largest sizes, by how their names end, in other formats too: a file that says more is damaged, and would
# be traced for minutes. A small file may name large inputs, and attention takes memory by their square: 4,096
# patches are 1,024 pixels a side in patches of 16.
MOST = {
    "layers": 256,
    "image_size": 1024,
    "patch_size": 1024,
    "context_length": 4096,
    "max_position_embeddings": 4096,  # transformers' name for it
}
MOST_PATCHES = 4096
MOST_OF_ANY = 10_000_000


def check_size(name: str, value: object) -> int:
    """Returns a size of an architecture. name: its field. Raises ValueError if it cannot be one."""
    most = next((most for end, most in MOST.items() if name.endswith(end)), MOST_OF_ANY)
    return whole_number(name, value, most)


OPTIONAL_SIZES = ("mlp_width", "eos_token_id")


def _check_tower(name: str, tower: VisionConfig | TextConfig) -> None:
    errors = Errors()
    for field, value in dataclasses.asdict(tower).items():
        if field in OPTIONAL_SIZES and value is None:
            continue
        with errors.of():
            if field == "eos_token_id":
                whole_number(f"{name}.{field}", value, MOST_OF_ANY, least=0)
            else:
                check_size(f"{name}.{field}", value)
    errors.raise_all()  # what follows divides by them
    if tower.width % tower.head_width:
        errors.add(f"{name}.width={tower.width} is not a multiple of {name}.head_width={tower.head_width}")
    if isinstance(tower, VisionConfig) and tower.image_size % tower.patch_size:
        errors.add(
            f"{name}.image_size={tower.image_size} is not a multiple of {name}.patch_size={tower.patch_size}"
        )
    elif isinstance(tower, VisionConfig) and tower.grid**2 > MOST_PATCHES:
        errors.add(
            f"{name}.patch_size={tower.patch_size} makes more than {MOST_PATCHES:,} patches of "
            f"{name}.image_size={tower.image_size}"
        )
    errors.raise_all()


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The architecture: everything on which the shapes and the meaning of the parameters depend.

    embed_dim: of the features. vision: the vision tower. text: the text tower; None is a vision tower alone,
    without `logit_scale`. activation: quick_gelu, as OpenAI's models, or gelu. layer_norm_eps: of every norm.
    moe: the mixture; None is a dense model.
    """

    embed_dim: int = 512
    vision: VisionConfig = VisionConfig()
    text: TextConfig | None = TextConfig()
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    moe: MoeConfig | None = None

    def __post_init__(self):
        errors = Errors()
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            shown = reprlib.repr(self.activation)
            errors.add(f"activation={shown}: choose one of {sorted(ACTIVATIONS)}")
        with errors.of():
            check_size("embed_dim", self.embed_dim)
        with errors.of():
            number("layer_norm_eps", self.layer_norm_eps, 1.0)
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if tower is not None:
                with errors.of():
                    _check_tower(name, tower)
        errors.raise_all()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts and numbers, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ClipConfig":
        """Returns the architecture that `to_dict` made the fields of. Raises ValueError for others."""
        fields = dict(fields_of(cls, "the architecture", fields))
        for name, part in (("vision", VisionConfig), ("text", TextConfig), ("moe", MoeConfig)):
            if name not in fields and name != "moe":
                raise ValueError(f"the architecture has no field {name}")
            if fields.get(name) is not None or name == "vision":
                fields[name] = part(**fields_of(part, name, fields[name]))
        return cls(**fields)


def _variant(image_size, patch_size, vision_width, vision_layers, text_width, embed_dim):
    return ClipConfig(
        embed_dim=embed_dim,
        vision=VisionConfig(image_size, patch_size, vision_width, vision_layers),
        text=TextConfig(width=text_width),
    )


VARIANTS: dict[str, ClipConfig] = {
    "ViT-B/32": _variant(224, 32, 768, 12, 512, 512),
    "ViT-B/16": _variant(224, 16, 768, 12, 512, 512),
    "ViT-L/14": _variant(224, 14, 1024, 24, 768, 768),
    "ViT-L/14@336": _variant(336, 14, 1024, 24, 768, 768),
}


def normalize(images: Images) -> Float[Array | np.ndarray, "B H W 3"]:
    """Returns CLIP's float32 input for uint8 pixels (B, H, W, 3), and float images as they are: normalised.

    Raises TypeError for any other dtype.
    """
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    if images.dtype != jnp.uint8:
        raise TypeError(f"images are {images.dtype}: give uint8 pixels or normalised floats")
    return (images.astype(jnp.float32) / 255 - MEAN) / STD


def normalize_features(features: Float[Array | np.ndarray, "B embed"]) -> Float[Array, "B embed"]:
    """Scales rows to unit length, in float32. (B, embed) -> (B, embed)."""
    features = jnp.asarray(features, jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def text_mask(tokens: Tokens | PackedText, eos_token_id: int | None = None) -> Bool[Array, "rows L"]:
    """Returns True up to and including the end token. (B, L) int32 -> (B, L) bool, packed -> (R, L)."""
    if isinstance(tokens, PackedText):
        return tokens.segments > 0
    return jnp.arange(tokens.shape[1]) <= end_position(tokens, eos_token_id)[:, None]


def end_position(tokens: Tokens, eos_token_id: int | None = None) -> Int[Array, " B"]:
    """Returns the position of the first end token, (B, L) int32 -> (B,) int32; None as in `TextConfig`."""
    return jnp.argmax(tokens if eos_token_id is None else tokens == eos_token_id, axis=-1)


def positions_in_segments(segments: Int[Array | np.ndarray, "R L"]) -> Int[Array, "R L"]:
    """Returns each token's distance from the first of its segment. (R, L) int32 -> (R, L) int32."""
    column = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = segments != jnp.roll(segments, 1, axis=1)
    return column - jax.lax.cummax(jnp.where(begins, column, 0), axis=1)


# The methods of Clip by the input that they take.
METHODS = {"image": "encode_image", "text": "encode_text"}
OUTPUTS = ("pooled", "patches")  # of the vision tower


class VisionTower(nn.Module):
    """Encodes images (B, H, W, 3), uint8 or normalised float: features (B, embed) float32 and aux.

    output "patches": features of the patches in their places, (B, G, G, embed) float32, each token through
    ln_post and the projection as the class token is. value_attention: of the last block, as of
    `transformer.Attention`.
    """

    config: ClipConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self,
        images: Images,
        deterministic: bool = True,
        output: str = "pooled",
        value_attention: bool = False,
    ) -> tuple[Float[Array, "B ... embed"], dict[str, Array]]:
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r}: choose one of {', '.join(OUTPUTS)}")
        config, vision = self.config, self.config.vision
        size, patch, width = vision.image_size, vision.patch_size, vision.width
        if images.shape[1:] != (size, size, 3):
            raise ValueError(f"images have shape {images.shape}; this model takes (B, {size}, {size}, 3)")
        dtype = jnp.dtype(self.compute.dtype)
        normal = nn.initializers.normal(width**-0.5)
        grid = vision.grid

        # The stride of the patch convolution is its kernel's size, so it is one product over patches.
        kernel_init = nn.initializers.normal((3 * patch * patch) ** -0.5)
        kernel = _Kernel((patch, patch, 3, width), kernel_init, name="conv1")()
        patches = normalize(images).astype(dtype).reshape(-1, grid, patch, grid, patch, 3)
        x = einsum("bhpwqc,pqcd->bhwd", patches, kernel.astype(dtype))
        x = x.reshape(-1, grid * grid, width)

        class_embedding = self.param("class_embedding", normal, (width,))
        positions = self.param("positional_embedding", normal, (grid * grid + 1, width))
        class_token = jnp.broadcast_to(class_embedding.astype(dtype), (x.shape[0], 1, width))
        x = jnp.concatenate([class_token, x], axis=1) + positions.astype(dtype)
        x = layer_norm(config.layer_norm_eps, dtype, "ln_pre")(x)
        places = (grid, grid) if output == "patches" else ()
        wanted = jnp.arange(1, grid * grid + 1) if places else jnp.zeros(1, jnp.int32)  # 0: the class token
        x, aux = _apply_blocks(
            x,
            jnp.broadcast_to(wanted, (x.shape[0], *wanted.shape)),
            config,
            vision,
            self.compute,
            causal=False,
            deterministic=deterministic,
            value_attention=value_attention,
        )
        x = layer_norm(config.layer_norm_eps, dtype, "ln_post")(x)
        projection = self.param("proj", normal, (width, config.embed_dim))
        features = einsum("nd,de->ne", x, projection.astype(dtype)).astype(jnp.float32)
        return features.reshape(-1, *places, config.embed_dim), aux


class TextTower(nn.Module):
    """Encodes token ids (B, L) int32, L at most the context length: features (B, embed) float32 and aux.

    The features of PackedText are the same: a token attends to its own caption alone, and positions count
    from the caption's start. Each device of the mesh in use has one shard of it; aux is that of the R rows.
    """

    config: ClipConfig
    compute: ComputeConfig

    @nn.compact
    def __call__(
        self, tokens: Tokens | PackedText, deterministic: bool = True
    ) -> tuple[Float[Array, "captions embed"], dict[str, Array]]:
        config, text = self.config, self.config.text
        assert text is not None, "Clip has a text tower only with a TextConfig"
        if isinstance(tokens, PackedText):
            (ids, segments, ends), num_shards = tokens, devices_in_use()
        else:
            ids, segments, num_shards = tokens, None, tokens.shape[0]
            ends = end_position(tokens, text.eos_token_id)
        length, width = ids.shape[1], text.width
        if length > text.context_length:
            raise ValueError(f"tokens have length {length}; this model takes at most {text.context_length}")
        dtype = jnp.dtype(self.compute.dtype)
        normal = nn.initializers.normal

        embedding = nn.Embed(text.vocab_size, width, embedding_init=normal(0.02), name="token_embedding")
        positions = self.param("positional_embedding", normal(0.01), (text.context_length, width))
        added = positions[:length] if segments is None else positions[positions_in_segments(segments)]
        x = (embedding(ids) + added).astype(dtype)
        ends, sequences = ends.reshape(num_shards, -1), segments
        if segments is None and config.moe is not None and config.moe.sequence_share:
            sequences = text_mask(tokens, text.eos_token_id).astype(jnp.int32)
        x, aux = _apply_blocks(
            x, ends, config, text, self.compute, segments, sequences, causal=True, deterministic=deterministic
        )
        x = layer_norm(config.layer_norm_eps, dtype, "ln_final")(x)
        projection = self.param("text_projection", normal(width**-0.5), (width, config.embed_dim))
        return einsum("nd,de->ne", x, projection.astype(dtype)).astype(jnp.float32), aux


class Clip(nn.Module):
    """Both towers and `logit_scale` (a logarithm). Features are not normalised to unit length.

    The methods return `(features, aux)`; aux is empty for a dense tower, else as in `apply_blocks`. A model
    without a text tower has `encode_image` alone.
    """

    config: ClipConfig
    compute: ComputeConfig = ComputeConfig()

    if TYPE_CHECKING:  # Flax gives modules the hash of their fields, which type checkers do not see

        def __hash__(self) -> int: ...

    def setup(self):
        self.visual = VisionTower(self.config, self.compute)
        if self.config.text is not None:
            self.text = TextTower(self.config, self.compute)
            self.logit_scale = self.param("logit_scale", nn.initializers.constant(jnp.log(1 / 0.07)), ())

    def encode_image(
        self,
        images: Images,
        deterministic: bool = True,
        output: str = "pooled",
        value_attention: bool = False,
    ) -> tuple[Float[Array, "B ... embed"], dict[str, Array]]:
        """Encodes images (B, H, W, 3), uint8 or normalised float -> (B, embed) float32, aux.

        output, value_attention: as of `VisionTower`.
        """
        return self.visual(images, deterministic, output, value_attention)

    def encode_text(
        self, tokens: Tokens | PackedText, deterministic: bool = True
    ) -> tuple[Float[Array, "captions embed"], dict[str, Array]]:
        """Encodes captions, (B, L) int32 or packed -> (B, embed) float32, aux."""
        return self.text(tokens, deterministic)

    def __call__(
        self, images: Images, tokens: Tokens | PackedText, deterministic: bool = True
    ) -> dict[str, Any]:
        """Returns image_features and text_features (B, embed) float32, image_aux and text_aux."""
        image_features, image_aux = self.visual(images, deterministic)
        text_features, text_aux = self.text(tokens, deterministic)
        return {
            "image_features": image_features,
            "text_features": text_features,
            "image_aux": image_aux,
            "text_aux": text_aux,
        }


@functools.lru_cache(maxsize=16)
def abstract_params(config: ClipConfig) -> dict:
    """Returns the model's param tree as ShapeDtypeStructs, cached: do not change it. Allocates nothing."""
    model, size = Clip(config), config.vision.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    if config.text is None:
        init = functools.partial(model.init, method="encode_image")
        return jax.eval_shape(init, jax.random.key(0), images)["params"]
    tokens = jax.ShapeDtypeStruct((1, config.text.context_length), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), images, tokens)["params"]


def check_params(config: ClipConfig, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises ValueError naming the leaves in which {name: shape} differs from the architecture."""
    expected = {name: leaf.shape for name, leaf in trees.flatten(abstract_params(config)).items()}
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "differing": [
            f"{name} is {tuple(shapes[name])}, not {shape}"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:10])}" for kind, names in problems.items() if names
        )
        raise ValueError(f"{source} does not fit the architecture: {lists}")


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", self.kernel_init, self.shape)


def _apply_blocks(
    x: Array,
    pooled_positions: Array,
    config: ClipConfig,
    tower: VisionConfig | TextConfig,
    compute: ComputeConfig,
    segments: Array | None = None,
    sequences: Array | None = None,
    *,
    causal: bool,
    deterministic: bool,
    value_attention: bool = False,
) -> tuple[Array, dict[str, Array]]:
    return apply_blocks(
        x,
        pooled_positions,
        segments,
        sequences,
        num_layers=tower.num_layers,
        num_heads=tower.width // tower.head_width,
        mlp_width=tower.mlp_width or 4 * tower.width,
        activation=config.activation,
        layer_norm_eps=config.layer_norm_eps,
        causal=causal,
        moe=config.moe,
        compute=compute,
        deterministic=deterministic,
        value_attention=value_attention,
    )
