"""Features of images and captions from a model, as unit vectors.

Letters: N inputs, d embedding.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.sharding import Mesh

from clipmoe_jax.core import sharding, trees
from clipmoe_jax.data import loader
from clipmoe_jax.data.samplers import SequentialSampler
from clipmoe_jax.models.clip import METHODS, Clip, normalize_features


@functools.cache
def make_encode(model: Clip, method: str) -> Callable[[trees.Params, jax.Array], jax.Array]:
    """Jitted `(params, inputs (N, …)) -> (N, d)` features; method "encode_image" or "encode_text"."""
    return jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, method=method)[0])


class Encoder:
    """A model with its params on a mesh; encodes in batches of one size, so that each tower compiles once, or
    for packed captions once for each number of rows."""

    def __init__(self, model: Clip, params: trees.Params, mesh: Mesh, batch_size: int):
        self._model, self._params, self._mesh = model, params, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def batches(
        self, batches: Iterable[Mapping[str, np.ndarray]], towers: Sequence[str] = ("image", "text")
    ) -> dict[str, np.ndarray]:
        """{tower: (N, d) float32 unit features} of a loader's batches, rows that are not "valid" left out.

        Each process gives its rows of a batch, and gets the features of all.
        A batch is read back when the next one is under way: the device neither waits nor piles up inputs.
        """
        features, pending = {tower: [] for tower in towers}, None
        for batch in batches:
            inputs = {tower: batch[tower] for tower in towers}
            started = self._start(inputs, batch["valid"])
            self._finish(pending, features)
            pending = started
        self._finish(pending, features)
        return {tower: np.concatenate(parts) for tower, parts in features.items()}

    def pairs(
        self,
        pairs: loader.StreamedPairs | loader.DecodedPairs,
        first: int = 0,
        stop: int | None = None,
        towers: Sequence[str] = ("image", "text"),
        num_workers: int = 0,
    ) -> dict[str, np.ndarray]:
        """{tower: (N, d) float32 unit features} of records `first` to `stop` of a data set, in order."""
        num_units = self._mesh.size if "text" in towers else 0
        with self.open(pairs, first, stop, num_workers, num_units) as batches:
            return self.batches(batches, towers)

    def open(
        self,
        pairs: loader.StreamedPairs | loader.DecodedPairs,
        first: int = 0,
        stop: int | None = None,
        num_workers: int = 0,
        num_units: int = 0,
    ) -> AbstractContextManager[Iterator[loader.Batch]]:
        """This process's rows of the batches that records `first` to `stop` make, in order. num_units: as of
        `loader.batches`."""
        sampler = SequentialSampler(len(pairs) if stop is None else stop, self.batch_size, first)
        return loader.batches(
            pairs,
            sampler,
            start_step=0,
            num_steps=sampler.num_steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=num_workers,
            num_units=num_units,
        )

    def texts(self, tokens: np.ndarray) -> np.ndarray:
        """(N, L) int32, the same in every process -> (N, d) float32, unit length."""
        return self._array("text", tokens)

    def images(self, images: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8, the same in every process -> (N, d) float32, unit length."""
        return self._array("image", images)

    def _array(self, tower: str, inputs: np.ndarray) -> np.ndarray:
        num_batches = -(-len(inputs) // self.batch_size)
        padding = [(0, num_batches * self.batch_size - len(inputs))] + [(0, 0)] * (inputs.ndim - 1)
        valid = np.arange(num_batches * self.batch_size) < len(inputs)
        rows = self.batch_size // jax.process_count()
        starts = [i * self.batch_size + jax.process_index() * rows for i in range(num_batches)]
        inputs = np.pad(inputs, padding)
        local = ({tower: inputs[i : i + rows], "valid": valid[i : i + rows]} for i in starts)
        return self.batches(local, [tower])[tower]

    def _start(self, inputs: Mapping[str, np.ndarray], valid: np.ndarray) -> dict[str, jax.Array]:
        """This process's rows of at most one batch -> features of the whole batch, not waited for."""
        missing, local = self.batch_size // jax.process_count() - len(valid), {**inputs, "valid": valid}
        if missing:  # never where captions are packed: `pairs` gives whole batches
            local = {n: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for n, a in local.items()}
        with jax.set_mesh(self._mesh):
            arrays = sharding.put_batch(self._mesh, local)
            started = {"valid": arrays.pop("valid")}
            for tower, array in arrays.items():
                encode = make_encode(self._model, METHODS[tower])
                started[tower] = normalize_features(encode(self._params, array))
            return sharding.replicate(self._mesh, started)

    @staticmethod
    def _finish(pending: dict[str, jax.Array] | None, features: dict[str, list[np.ndarray]]) -> None:
        if pending is None:
            return
        valid = np.asarray(pending.pop("valid"))
        for tower, array in pending.items():
            features[tower].append(np.asarray(array)[valid])
