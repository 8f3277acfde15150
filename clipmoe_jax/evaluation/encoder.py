"""Features of images and captions from a model, as unit vectors.

Letters: N inputs, d embedding.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clipmoe_jax.core import accelerators, distributed, sharding, trees
from clipmoe_jax.data import loader
from clipmoe_jax.data.samplers import SequentialSampler
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import METHODS, Clip, normalize_features
from clipmoe_jax.models.inputs import PackedText

Function = TypeVar("Function", bound=Callable[..., Any])


def cache_programs(function: Function) -> Function:
    """Caches what a function returns for a model, as functools.cache, whose types take no flax module."""
    return cast(Function, functools.cache(function))


@cache_programs
def make_encode(
    model: Clip, method: str, transposed: bool = False, **options: Any
) -> Callable[..., jax.Array]:
    """Returns a jitted `(params, inputs (N, …), num_rows=None) -> (N, d)` features; method "encode_image" or
    "encode_text".

    A large batch is encoded in parts on a CPU, without parts that begin at row `num_rows`, an integer, or
    later: their features are 1. transposed: params are as `trees.transpose_kernels` returns them. options:
    arguments of the method.
    """

    def encode(params, inputs, num_rows=None):
        def encode_rows(rows):
            # Here, since XLA would copy what is transposed outside of the loop.
            used = trees.transpose_kernels(params) if transposed else params
            return model.apply({"params": used}, rows, method=method, **options)[0]

        num_parts = _num_parts(model, method, inputs)
        if num_parts <= 1:
            return encode_rows(inputs)
        size = -(-len(inputs) // num_parts)
        padding = [(0, num_parts * size - len(inputs))] + [(0, 0)] * (inputs.ndim - 1)
        in_parts = jnp.pad(inputs, padding).reshape(-1, size, *inputs.shape[1:])

        def encode_part(part):
            first_row, rows = part
            if num_rows is None:
                return encode_rows(rows)
            shape = jax.eval_shape(encode_rows, rows)  # of ones, which have a length to divide by
            return jax.lax.cond(first_row < num_rows, encode_rows, lambda _: jnp.ones_like(shape), rows)

        parts = jax.lax.map(encode_part, (size * jnp.arange(num_parts), in_parts))
        return parts.reshape(-1, *parts.shape[2:])[: len(inputs)]

    return jax.jit(encode)


def _num_parts(model: Clip, method: str, inputs: Any) -> int:
    """Returns in how many parts of equal size inputs are encoded, so that each fits in a CPU's cache.

    1 for inputs that the model refuses, for a batch of symbolic size, and where rows share a capacity.
    """
    compute, text, vision = model.compute, model.config.text, model.config.vision
    if not compute.encoded_values or compute.dispatch == "capacity" or sharding.devices_in_use() > 1:
        return 1
    if isinstance(inputs, PackedText) or not isinstance(inputs.shape[0], int):
        return 1
    if method == METHODS["image"] and inputs.shape[1:] == (vision.image_size, vision.image_size, 3):
        values = (vision.grid**2 + 1) * vision.width
    elif method == METHODS["text"] and text and inputs.ndim == 2:
        values = inputs.shape[1] * text.width
    else:
        return 1
    return -(-len(inputs) // max(1, compute.encoded_values // values))


class Encoder:
    """A model with its params on a mesh. Batches have one size, so that each tower compiles once, or for
    packed captions once for each number of rows.

    Attributes:
        batch_size: rows of a batch over all devices, a multiple of their number.
    """

    def __init__(self, model: Clip, params: trees.Params, mesh: Mesh, batch_size: int):
        self._model, self._params, self._mesh = model, params, mesh
        self.batch_size = -(-batch_size // mesh.size) * mesh.size

    def batches(
        self, batches: Iterable[Mapping[str, Any]], inputs: Sequence[str] = ("image", "text")
    ) -> dict[str, np.ndarray]:
        """Returns {input: (N, d) float32 unit features} of a loader's batches, all those of `stream`.

        Raises Preempted after SIGTERM or Ctrl-C.
        """
        features = {name: [] for name in inputs}
        for of_batch in self.stream(batches, inputs):
            for name, array in of_batch.items():
                features[name].append(array)
            if distributed.preempted():
                raise distributed.Preempted("encoding")
        none = np.zeros((0, self._model.config.embed_dim), np.float32)
        return {name: np.concatenate(parts or [none]) for name, parts in features.items()}

    def stream(
        self, batches: Iterable[Mapping[str, Any]], inputs: Sequence[str] = ("image", "text")
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields {input: (n, d) float32 unit features} of each of a loader's batches, without rows that are
        not "valid".

        Each process gives its rows of a batch, and gets the features of all. A batch is read back when the
        next one is under way: the device neither waits nor piles up inputs.
        """
        pending = None
        for batch in batches:
            started = self._start({name: batch[name] for name in inputs}, batch["valid"])
            if pending is not None:
                yield self._finish(pending)
            pending = started
        if pending is not None:
            yield self._finish(pending)

    def pairs(
        self,
        pairs: loader.Pairs,
        first: int = 0,
        stop: int | None = None,
        inputs: Sequence[str] = ("image", "text"),
        num_workers: int = 0,
    ) -> dict[str, np.ndarray]:
        """Returns {input: (N, d) float32 unit features} of records `first` to `stop` of a data set, in
        order."""
        num_text_shards = self._mesh.size if "text" in inputs else 0
        with self.open(pairs, first, stop, num_workers, num_text_shards) as batches:
            return self.batches(batches, inputs)

    def open(
        self,
        pairs: loader.Pairs,
        first: int = 0,
        stop: int | None = None,
        num_workers: int = 0,
        num_text_shards: int = 0,
    ) -> AbstractContextManager[Iterator[loader.Batch]]:
        """Opens this process's rows of the batches of records `first` to `stop`, in order. num_text_shards:
        as for `loader.batches`; captions have a row each where sharing them saves less than it costs to
        compile another program than that of `texts`."""
        sampler = SequentialSampler(len(pairs) if stop is None else stop, self.batch_size, first)
        rows = self._rows(pairs, num_text_shards) if num_text_shards else ()
        return loader.batches(
            pairs,
            sampler,
            start_step=0,
            num_steps=sampler.num_steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=num_workers,
            num_text_shards=num_text_shards if rows else 0,
            rows=rows,
        )

    def _rows(self, pairs: loader.Pairs, num_shards: int) -> tuple[int, ...]:
        """The numbers of rows of a data set's batches; none where a row for each caption costs least."""
        sampler = SequentialSampler(len(pairs), self.batch_size)
        row_flops = sum(
            layer.flops for layer in flops.layers(self._model.config, "text", pairs.context_length)
        )
        row_cost = row_flops / accelerators.flops_of_compilation()
        rows = loader.rows_of_batches(pairs, sampler, sampler.num_steps, num_shards, row_cost)
        size = self.batch_size // num_shards
        saved = sampler.num_steps * row_cost * (size - max(rows, default=size))
        return rows if saved > len(rows) else ()

    def texts(self, tokens: np.ndarray) -> np.ndarray:
        """Encodes captions, the same in every process: (N, L) int32 -> (N, d) float32 unit features."""
        return self._array("text", tokens)

    def images(self, images: np.ndarray) -> np.ndarray:
        """Encodes images, the same in every process: (N, H, W, 3) uint8 -> (N, d) float32 unit features."""
        return self._array("image", images)

    def _array(self, name: str, array: np.ndarray) -> np.ndarray:
        num_batches = -(-len(array) // self.batch_size)
        padding = [(0, num_batches * self.batch_size - len(array))] + [(0, 0)] * (array.ndim - 1)
        valid = np.arange(num_batches * self.batch_size) < len(array)
        rows = self.batch_size // jax.process_count()
        starts = [i * self.batch_size + jax.process_index() * rows for i in range(num_batches)]
        array = np.pad(array, padding)
        local = ({name: array[i : i + rows], "valid": valid[i : i + rows]} for i in starts)
        return self.batches(local, [name])[name]

    def _start(self, inputs: Mapping[str, Any], valid: np.ndarray) -> dict[str, jax.Array]:
        """Starts a batch: this process's rows of it, or fewer, -> features of the whole batch."""
        # Up to the last row that counts. Where there are several devices, a batch has no parts.
        num_rows = np.int32(np.max(np.flatnonzero(valid), initial=-1) + 1)
        missing, local = self.batch_size // jax.process_count() - len(valid), {**inputs, "valid": valid}
        if missing:  # never where captions are packed: `pairs` gives whole batches
            local = {n: np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for n, a in local.items()}
        with jax.set_mesh(self._mesh):
            arrays = sharding.put_batch(self._mesh, local)
            started = {"valid": arrays.pop("valid")}
            for name, array in arrays.items():
                encode = make_encode(self._model, METHODS[name])
                started[name] = normalize_features(encode(self._params, array, num_rows))
            return sharding.replicate(self._mesh, started)

    @staticmethod
    def _finish(pending: dict[str, jax.Array]) -> dict[str, np.ndarray]:
        valid = np.asarray(pending.pop("valid"))
        return {name: np.asarray(array)[valid] for name, array in pending.items()}
