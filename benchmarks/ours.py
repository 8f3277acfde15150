"""Our side of `benchmarks.steps`: the jitted step that a run calls, on one device."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Program
from benchmarks.workload import Workload
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.train.step import TrainState, init_state, make_train_step


def make_program(kind: str, sizes: dict[str, Any]) -> tuple[Program, dict[str, Any]]:
    """Returns the program of a kind of step, or of "product", and {"sizes", "device"}.

    sizes: fields of Workload; those that are missing or empty are chosen by platform.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    defaults = {
        "variant": "ViT-B/32" if on_cpu else "ViT-L/14",
        "batch": 32 if on_cpu else 100,
        "dtype": "float32" if on_cpu else "bfloat16",
    }
    given = {name: value for name, value in sizes.items() if value}
    workload = Workload(**defaults | given, platform=sharding.platform())
    told = {
        "sizes": dataclasses.asdict(workload),
        "device": {"device_kind": device.device_kind, "jax": jax.__version__},
    }
    if kind == "product":
        size, multiply = workload.matrix_size, jax.jit(jnp.matmul)
        a, b = (jax.random.normal(jax.random.key(i), (size, size), workload.dtype) for i in range(2))
        return Program(lambda: multiply(a, b), jax.block_until_ready, 2.0 * size**3), told
    step = Training(workload, kind)
    return Program(step, jax.block_until_ready, workload.step_flops(kind), workload.batch), told


class Training:
    """One step after the other on the same batch; `state` is the newest."""

    def __init__(self, workload: Workload, kind: str):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        phase, loss = workload.phase(kind)
        trainable, self._frozen = trees.partition(workload.params(kind), workload.rules(kind))
        self._frozen = trees.cast_matrices(self._frozen, workload.dtype)  # as `train.loop.fit` holds them
        trainable = jax.tree.map(jnp.copy, trainable)  # the state takes its arrays
        self.state: TrainState = init_state(mesh, phase, trainable)
        self._mesh: Any = mesh
        self._step: Any = make_train_step(workload.model(kind), loss, phase)
        self._batch = sharding.put_batch(mesh, workload.make_batch())
        self._rate = sharding.put_replicated(mesh, jnp.float32(phase.learning_rate))
        self._key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

    def compile(self) -> int:
        """Compiles the step before the first call. Returns the bytes of device memory that it needs."""
        with jax.set_mesh(self._mesh):
            compiled = self._step.lower(*self._arguments()).compile()
        self._step, memory = compiled, compiled.memory_analysis()
        return memory.peak_memory_in_bytes if memory else 0

    def __call__(self) -> dict[str, jax.Array]:
        """Takes a step and returns its metrics."""
        with jax.set_mesh(self._mesh):
            self.state, metrics = self._step(*self._arguments())
        return metrics

    def _arguments(self) -> tuple[Any, ...]:
        return self.state, self._frozen, self._batch, self._rate, self._key
