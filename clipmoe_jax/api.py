"""`clipmoe_jax.load` and the model that it returns, which encodes images and captions and classifies images.

Letters: B images or texts, C labels, L length, H and W height and width of images, G patches along a side,
M MoE blocks, E experts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from PIL import Image

from clipmoe_jax import config as configs
from clipmoe_jax.analysis.routing import make_patch_gates
from clipmoe_jax.core import artifacts, distributed, paths, sharding, trees
from clipmoe_jax.core.errors import printable_errors
from clipmoe_jax.data.decoding import map_decoding, preprocess_file
from clipmoe_jax.data.preprocess import preprocess_image
from clipmoe_jax.data.tokenizer import Tokenizer
from clipmoe_jax.evaluation.classes import GENERIC_TEMPLATES, chosen_templates, make_prompts
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.evaluation.zero_shot import class_embeddings
from clipmoe_jax.interop.hub import OPEN_CLIP
from clipmoe_jax.interop.load import read_model
from clipmoe_jax.models.clip import Clip, ClipConfig, TextConfig, normalize_features
from clipmoe_jax.models.expert_params import expert_as_dense
from clipmoe_jax.models.model_folder import save_model
from clipmoe_jax.models.transformer import ComputeConfig

LARGEST_BATCH = 256  # rows of one call of a compiled program
DTYPES = "float32", "bfloat16", "float16"

FILE = (str, os.PathLike)
ImageLike = str | os.PathLike | Image.Image | np.ndarray
Images = ImageLike | Sequence[ImageLike] | jax.Array
Texts = str | Sequence[str] | np.ndarray | jax.Array
IMAGES = "image files, PIL images or uint8 arrays (H, W, 3)"


class LoadedClip:
    """A dense CLIP or a CLIP-MoE that encodes images and captions.

    A batch may have any size: 256 rows at most are computed by one program, fewer padded to a power of two,
    so that few programs are compiled.

    Images are image files, PIL images and uint8 arrays (H, W, 3), a single one or several: they are resized,
    cropped and converted as by OpenAI's code. EXIF orientation is ignored, as there: turn photographs upright
    first, with PIL.ImageOps.exif_transpose. Texts are strings, in a list, an array or a column of a table, or
    a single one.

    config: the architecture. params: the param tree. source: the kind of model and its format, in words; the
    model's repr shows it. transposed: params are given as `trees.transpose_kernels` returns them, and held
    like that, because few rows are multiplied faster by them on a CPU (benchmarks/LOG.md).
    """

    def __init__(
        self,
        config: ClipConfig,
        params: dict,
        source: str,
        compute: ComputeConfig,
        *,
        transposed: bool = False,
    ):
        self.config, self.source = config, source
        self.model = Clip(config, compute)
        self._held, self._transposed = params, transposed

    @property
    def params(self) -> dict:
        """Returns the param tree."""
        return trees.transpose_kernels(self._held) if self._transposed else self._held

    @printable_errors()
    def encode_image(
        self,
        images: Images,
        *,
        normalize: bool = False,
        output: str = "pooled",
        value_attention: bool = False,
    ) -> jax.Array:
        """Returns features of images (B, embed) or patches (B, G, G, embed), float32; B is 1 for one image.

        images: as of this class, or one array (B, H, W, 3), uint8 that `preprocess` returned or normalised
        floats. normalize: scales each feature to unit length. output: "patches" for the feature of each patch
        in its place: its token through the last LayerNorm and the projection, as CLIP does it with the class
        token, whose feature is the "pooled" one. value_attention: in the last block values stand for queries
        and keys too, softmax(v vᵀ / √head width) v, so that patches are more like what they show (CLIP
        Surgery, arXiv 2304.05653).
        Raises TypeError for other inputs, FileNotFoundError, and ValueError for an image that does not decode
        and an array of another shape.
        """
        places = (self.config.vision.grid,) * 2 if output == "patches" else ()

        def encode(pixels: np.ndarray | jax.Array) -> jax.Array:
            options = {"output": output, "value_attention": value_attention}
            return self._encode("encode_image", pixels, normalize, places, **options)

        takes = f"encode_image takes {IMAGES}, or one array (B, H, W, 3)"
        found = _array_or_list(images, (*FILE, Image.Image), takes)
        if isinstance(found, np.ndarray) and found.ndim == 3 and found.dtype == np.uint8:
            found = [found]
        if not isinstance(found, list):
            return encode(found)
        starts = range(0, max(1, len(found)), LARGEST_BATCH)
        return _joined([encode(self.preprocess(found[i : i + LARGEST_BATCH])) for i in starts])

    @printable_errors()
    def encode_text(self, texts: Texts, *, normalize: bool = False) -> jax.Array:
        """Returns text features (B, embed) float32; B is 1 for a single string.

        texts: as of this class, or token ids (B, L) of any integer type. normalize: scales each row to unit
        length. Raises ValueError if the model has no text tower, for strings if its vocabulary is not CLIP's,
        and for ids that are not in its vocabulary; TypeError for other inputs.
        """
        text = self._text_tower()
        found = _array_or_list(texts, str, "encode_text takes strings or one array of token ids (B, L)")
        if not isinstance(found, list):
            _check_token_ids(found, text.vocab_size)
        elif found:
            found = self.tokenize(found)
        return self._encode("encode_text", jnp.asarray(found, jnp.int32), normalize)

    @printable_errors()
    def preprocess(self, images: Images) -> np.ndarray:
        """Returns the pixels that the model takes, uint8 (B, H, W, 3); B is 1 for a single image.

        images, errors: as of `encode_image`, but arrays of any size are resized too, and must be uint8.
        """
        found = _array_or_list(images, (*FILE, Image.Image), f"preprocess takes {IMAGES}")
        if not isinstance(found, list):
            found = [found] if found.ndim == 3 else list(found)
        size = self.config.vision.image_size

        def preprocess(image: ImageLike | jax.Array) -> np.ndarray:
            if isinstance(image, FILE):
                return preprocess_file(image, size)
            return preprocess_image(_pil_image(image), size)

        # Threads must not load one PIL image twice, nor several from one open file.
        by_path = {id(image): image for image in found if isinstance(image, FILE) or _has_path(image)}
        of_paths = dict(zip(by_path, map_decoding(preprocess, by_path.values()), strict=True))
        pixels = [of_paths[id(image)] if id(image) in of_paths else preprocess(image) for image in found]
        return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)

    @printable_errors()
    def tokenize(self, texts: Texts) -> np.ndarray:
        """Returns token ids, int32 (B, L); B is 1 for a single string. Errors as of `encode_text`."""
        text = self._text_tower()
        if not text.has_clips_tokens:
            raise ValueError(
                f"{self!r} has {text.vocab_size:,} tokens of its own, not CLIP's 49,408: give token ids"
            )
        return Tokenizer(text.context_length)(list(_array_or_list(texts, str, "tokenize takes strings")))

    @property
    def logit_scale(self) -> jax.Array:
        """Returns the logarithm of what similarities are multiplied by before a softmax, () float32."""
        self._text_tower()
        return self._held["logit_scale"]

    def similarity(self, images: Images, texts: Texts) -> jax.Array:
        """Returns cosines of images and texts, (B images, B texts) float32; both as of `encode_image` and
        `encode_text`."""
        return _cosines(self.encode_image(images, normalize=True), self.encode_text(texts, normalize=True))

    @printable_errors()
    def classify(
        self, images: Images, labels: Sequence[str], templates: str | Sequence[str] = GENERIC_TEMPLATES
    ) -> jax.Array:
        """Returns the probability of each label for each image, (B, C) float32.

        images: as of `encode_image`. templates: sentences with {} in place of a label, whose features are
        averaged as in OpenAI's notebook, or the name of a table of them, such as "imagenet" for OpenAI's 80.
        Raises TypeError or ValueError for labels and templates that are none, and errors of `encode_text`.
        """
        names = list(_array_or_list(labels, str, "classify takes labels as strings"))
        if odd := [type(name).__name__ for name in names if not isinstance(name, str)]:
            raise TypeError(f"classify takes labels as strings, not a list with {odd[0]}")
        if not names:
            raise ValueError("labels are empty: give one or more")
        prompts, class_of_prompt = make_prompts(names, chosen_templates(templates))
        classes = class_embeddings(np.asarray(self.encode_text(prompts)), class_of_prompt)
        cosines = _cosines(self.encode_image(images, normalize=True), classes)
        return jax.nn.softmax(jnp.exp(self.logit_scale) * cosines)

    @printable_errors()
    def image_gates(self, images: Images) -> jax.Array:
        """Returns how much each patch uses each expert, its gates (B, M, G, G, E) float32.

        They add up to 1, over the K experts that a patch uses; the others have 0. Blocks that are dense are
        left out. images, errors: as of `preprocess`. Raises ValueError for a dense model.
        """
        gates = make_patch_gates(self.model)  # pyright: ignore[reportArgumentType]
        pixels, params = jnp.asarray(self.preprocess(images)), self.params
        parts = list(_parts(pixels)) or [(jnp.zeros((1, *pixels.shape[1:]), jnp.uint8), 0)]
        return _joined([gates(params, part)[:n] for part, n in parts])

    @printable_errors()
    def expert(self, e: int) -> "LoadedClip":
        """Returns expert e of a CLIP-MoE as the dense model that it came from, all else being the base's.

        Raises ValueError for a dense model, and for an expert number out of range.
        """
        config, params = expert_as_dense(self.params, self.config, e)
        return LoadedClip(config, params, f"dense CLIP, expert {e} of a {self.source}", self.model.compute)

    @printable_errors()
    def save(self, path: str | os.PathLike) -> None:
        """Writes a new model folder, whole or not at all, which `load` and every command read.

        Raises ValueError if the path exists.
        """
        with artifacts.new_folder(paths.absolute(path), with_checksums=True) as folder:
            save_model(folder, self.config, self.params)

    def __repr__(self) -> str:
        return f"<{self.source}, embed_dim {self.config.embed_dim}>"

    def _text_tower(self) -> TextConfig:
        if self.config.text is None:
            raise ValueError(f"{self!r} cannot encode text")
        return self.config.text

    def _encode(
        self,
        method: str,
        inputs: np.ndarray | jax.Array,
        normalize: bool,
        places: tuple[int, ...] = (),
        **options: Any,
    ) -> jax.Array:
        """Encodes a batch of arrays. places: the axes of what is encoded of a row, between B and embed."""
        if not len(inputs):
            return jnp.zeros((0, *places, self.config.embed_dim), jnp.float32)
        # Of any type: flax modules are hashable, though their dataclasses do not declare it.
        model: Any = self.model
        encode = make_encode(model, method, self._transposed, **options)
        inputs, size = jnp.asarray(inputs), self.config.vision.image_size
        fits = inputs.ndim == 2 if method == "encode_text" else inputs.shape[1:] == (size, size, 3)
        if isinstance(inputs, Tracer) or not fits:  # which raises an error that tells the shape
            features = encode(self._held, inputs)
        else:
            features = _joined([encode(self._held, part, n)[:n] for part, n in _parts(inputs)])
        if not normalize:
            return features
        return normalize_features(features.reshape(-1, features.shape[-1])).reshape(features.shape)


def _parts(inputs: jax.Array) -> Iterator[tuple[jax.Array, int]]:
    """Yields parts of a batch, padded to a power of two, and how many rows of each are the batch's.

    Nine sizes at most, each of which compiles once.
    """
    for start in range(0, len(inputs), LARGEST_BATCH):
        part = inputs[start : start + LARGEST_BATCH]
        padding = (1 << (len(part) - 1).bit_length()) - len(part)
        yield jnp.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1)), len(part)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _cosines(images: jax.Array, texts: jax.Array | np.ndarray) -> jax.Array:
    """Returns inner products of unit features, (B images, B texts)."""
    return jnp.einsum("id,td->it", images, texts, precision=jax.lax.Precision.HIGHEST)


def _has_path(image: Any) -> bool:
    """Whether it is an image that PIL opened by its path."""
    return isinstance(image, Image.Image) and bool(getattr(image, "filename", ""))


def _pil_image(image: Any) -> Image.Image:
    """Returns a PIL image as it is, and uint8 (H, W, 3) as one. Raises TypeError or ValueError for others."""
    if isinstance(image, Image.Image):
        return image
    if not hasattr(image, "__array__"):
        raise TypeError(f"an image is a {type(image).__name__}: give {IMAGES}")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.shape[2:] != (3,):
        raise ValueError(
            f"an image is {array.dtype} of shape {array.shape}: give uint8 (H, W, 3), or several that are "
            "preprocessed as one array (B, H, W, 3)"
        )
    return Image.fromarray(array)


def _array_or_list(
    inputs: Any, one: type | tuple[type, ...], takes: str
) -> np.ndarray | jax.Array | list[Any]:
    """Returns numbers as an array (not a copy of JAX's) and objects as a list, which has a single one alone.

    one: the types of a single object. takes: begins the message of the TypeError for anything else.
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
    pretrained: str | None = None,
    num_selected_experts: int | None = None,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    context_length: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
) -> LoadedClip:
    """Returns a CLIP or CLIP-MoE read from any of the formats in docs/interop.md.

    path: a file or folder, or a model on the Hugging Face hub, "hf-hub:OWNER/NAME". pretrained: open_clip's
    tag of weights, where path is its name of a model: load("ViT-B-32", pretrained="laion2b_s34b_b79k").
    num_selected_experts: K of an MoE; None takes what the file says, or 2 if it does not. activation: of a
    bare state dict; None means quick_gelu. vision_head_width, text_head_width: of a bare state dict too; None
    means 64, or what open_clip's vision towers of that width have. context_length: 248 stretches a text tower
    of 77 positions. image_size: resizes the vision tower's grid of positions. dtype: of the computation, and
    of the kernels, as they are held and saved.
    Raises FileNotFoundError or ValueError naming what is wrong.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    distributed.keep_compiled_programs()
    platform = sharding.platform()
    transposed = platform == "cpu" and dtype != "bfloat16"

    def place(name: str, leaf: np.ndarray) -> jax.Array:
        leaf = trees.transpose_kernel(name, leaf) if transposed else leaf
        return trees.cast_kernel(name, jnp.asarray(leaf), dtype)

    model = read_model(
        path if pretrained is None else f"{OPEN_CLIP}{path}/{pretrained}",
        num_selected_experts=num_selected_experts,
        activation=activation,
        vision_head_width=vision_head_width,
        text_head_width=text_head_width,
        context_length=context_length,
        image_size=image_size,
        place=place,
    )
    config = configs.config_of_model(model.config)
    config.compute.dtype = dtype
    compute = configs.compute_config(config, platform)
    return LoadedClip(model.config, model.params, model.source, compute, transposed=transposed)
