"""Features of images and captions from a model, as unit vectors.

Letters: N inputs, d embedding.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from clipmoe_jax import sharding, trees
from clipmoe_jax.models.clip import Clip, normalize_features


@functools.cache
def make_encode(model: Clip, method: str) -> Callable[[trees.Params, jax.Array], jax.Array]:
    """Jitted `(params, inputs (N, …)) -> (N, d)` features; method "encode_image" or "encode_text"."""
    return jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, method=method)[0])


class Encoder:
    """A model with its params on a mesh; encodes in batches of one size, so that each tower compiles once."""

    def __init__(self, model: Clip, params: trees.Params, mesh: Mesh, batch_size: int):
        self._model, self._params, self._mesh = model, params, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def images(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 or normalised float -> (N, d) float32, unit length."""
        return self._all("encode_image", images)

    def texts(self, tokens: np.ndarray) -> np.ndarray:
        """(N, L) int32 -> (N, d) float32, unit length."""
        return self._all("encode_text", tokens)

    def start(self, method: str, inputs: np.ndarray) -> jax.Array:
        """At most one batch -> (batch_size, d) raw features on the device, not waited for; padded rows
        last."""
        padding = [(0, self.batch_size - len(inputs))] + [(0, 0)] * (inputs.ndim - 1)
        with jax.set_mesh(self._mesh):
            arrays = sharding.put_batch(self._mesh, {"inputs": np.pad(inputs, padding)})
            return make_encode(self._model, method)(self._params, arrays["inputs"])

    def _all(self, method: str, inputs: np.ndarray) -> np.ndarray:
        size = self.batch_size
        parts = [self.start(method, inputs[i : i + size]) for i in range(0, len(inputs), size)]
        features = np.concatenate([np.asarray(part) for part in parts])[: len(inputs)]
        return np.asarray(normalize_features(features))
