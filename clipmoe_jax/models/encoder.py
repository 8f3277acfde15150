"""Features of images and captions from a model, as unit vectors.

Letters: N inputs, d embedding.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from clipmoe_jax import sharding, trees
from clipmoe_jax.models.clip import Clip, normalize_features

METHODS = {"image": "encode_image", "text": "encode_text"}


@functools.cache
def make_encode(model: Clip, method: str) -> Callable[[trees.Params, jax.Array], jax.Array]:
    """Jitted `(params, inputs (N, …)) -> (N, d)` features; method "encode_image" or "encode_text"."""
    return jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, method=method)[0])


class Encoder:
    """A model with its params on a mesh; encodes in batches of one size, so that each tower compiles once."""

    def __init__(self, model: Clip, params: trees.Params, mesh: Mesh, batch_size: int):
        self._model, self._params, self._mesh = model, params, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def batches(
        self, batches: Iterable[Mapping[str, np.ndarray]], towers: Sequence[str] = ("image", "text")
    ) -> dict[str, np.ndarray]:
        """{tower: (N, d) float32 unit features} of a loader's batches, rows that are not "valid" left out.

        A batch is read back when the next one is under way: the device neither waits nor piles up inputs.
        """
        features, pending = {tower: [] for tower in towers}, None
        for batch in batches:
            started = {tower: self._start(METHODS[tower], batch[tower]) for tower in towers}
            self._finish(pending, features)
            pending = started, batch["valid"]
        self._finish(pending, features)
        return {tower: np.concatenate(parts) for tower, parts in features.items()}

    def texts(self, tokens: np.ndarray) -> np.ndarray:
        """(N, L) int32 -> (N, d) float32, unit length."""
        chunks = (tokens[i : i + self.batch_size] for i in range(0, len(tokens), self.batch_size))
        valid = ({"text": chunk, "valid": np.ones(len(chunk), bool)} for chunk in chunks)
        return self.batches(valid, ["text"])["text"]

    def _start(self, method: str, inputs: np.ndarray) -> jax.Array:
        """At most one batch -> (batch_size, d) unit features on the device, not waited for."""
        padding = [(0, self.batch_size - len(inputs))] + [(0, 0)] * (inputs.ndim - 1)
        with jax.set_mesh(self._mesh):
            arrays = sharding.put_batch(self._mesh, {"inputs": np.pad(inputs, padding)})
            return normalize_features(make_encode(self._model, method)(self._params, arrays["inputs"]))

    @staticmethod
    def _finish(pending: tuple | None, features: dict[str, list[np.ndarray]]) -> None:
        if pending is None:
            return
        started, valid = pending
        for tower, array in started.items():
            features[tower].append(np.asarray(array)[: len(valid)][valid])
