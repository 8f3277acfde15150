"""Our side of `benchmarks.run`: the jitted functions that a run calls, on one device.

Each section is a function `(workload, group) -> {program: function that makes it}`.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import moe_block
from benchmarks.timing import Program
from benchmarks.workload import ATTENTION, RULES, SETTINGS, Workload, setting_choices
from clipmoe_jax.core import sharding, trees
from clipmoe_jax.evaluation.encoder import make_encode
from clipmoe_jax.models.attention import attention, default_implementation
from clipmoe_jax.models.clip import METHODS, normalize_features
from clipmoe_jax.train.step import TrainState, init_state, make_train_step

NAME, PEER = "clipmoe_jax", "PyTorch"
TOWERS = {"image": "visual", "text": "text"}  # of a batch, of the params
Builders = dict[str, Callable[[], Program]]


def describe() -> dict[str, str]:
    """Where and with what this runs."""
    device = jax.devices()[0]
    return {"platform": sharding.platform(), "device_kind": device.device_kind, "jax": jax.__version__}


def free_memory() -> None:
    """After programs are forgotten."""
    gc.collect()


def _program(call: Callable[[], Any], flops: float, pairs: int = 0, against: tuple = (PEER,)) -> Program:
    return Program(call, jax.block_until_ready, flops, pairs, against)


def peak(workload: Workload, group: str) -> Builders:
    """The product of two square matrices."""

    def build() -> Program:
        size, multiply = workload.matrix_size, jax.jit(jnp.matmul)
        a, b = (jax.random.normal(jax.random.key(i), (size, size), workload.dtype) for i in range(2))
        return _program(lambda: multiply(a, b), 2.0 * size**3)

    return {NAME: build}


def towers(workload: Workload, group: str) -> Builders:
    """The features of a batch of images or captions."""

    def build() -> Program:
        encode = make_encode(workload.model("mcl"), METHODS[group])
        params = workload.params("mcl")
        inputs = jax.device_put(workload.make_batch(workload.batch)[group])
        flops = workload.forward_flops(TOWERS[group], workload.batch)
        return _program(lambda: encode(params, inputs), flops, workload.batch)

    return {NAME: build}


def attend(
    workload: Workload, group: str, implementation: str
) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """The jitted function of a row of ATTENTION, and its arguments."""
    _, causal, gradient = ATTENTION[group]
    *qkv, target = (jnp.asarray(a, workload.dtype) for a in workload.attention_inputs(group))
    qkv = jnp.stack(qkv, axis=2)

    def forward(qkv):
        return attention(qkv, causal=causal, implementation=implementation)

    def forward_and_gradient(qkv, target):
        y, pull_back = jax.vjp(forward, qkv)
        return y, *pull_back(target)

    if gradient:
        return jax.jit(forward_and_gradient), (qkv, target)
    return jax.jit(forward), (qkv,)


def attention_section(workload: Workload, group: str) -> Builders:
    """The platform's own implementation, and XLA's."""

    def build(implementation: str) -> Program:
        function, arguments = attend(workload, group, implementation)
        return _program(lambda: function(*arguments), workload.attention_flops(group), workload.batch)

    names = dict.fromkeys((default_implementation(workload.platform, workload.dtype), "xla"))
    return {f"{NAME} {name}": lambda name=name: build(name) for name in names}


def moe(workload: Workload, group: str) -> Builders:
    """A feed-forward layer, dense and as a mixture with each dispatch."""
    gradient = group != "forward"

    def build(layer: str) -> Program:
        calls = moe_block.make_calls(**workload.moe_sizes, dtype=workload.dtype, layers=(layer,))
        dense = layer == moe_block.DENSE
        against = (f"{PEER} dense FFN",)
        if not dense:
            against = (f"{PEER} masked loop", f"{PEER} exported", f"{NAME} dense FFN")
        flops = workload.moe_flops(dense, gradient)
        return _program(calls[gradient][layer], flops, against=against)

    return {f"{NAME} {layer}": lambda layer=layer: build(layer) for layer in moe_block.LAYERS}


class Training:
    """One step after the other on the same batch; `state` is what the steps have changed."""

    def __init__(self, workload: Workload, kind: str):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        phase, loss = workload.phase(kind)
        trainable, self._frozen = trees.partition(workload.params(kind), RULES[kind])
        self._frozen = trees.cast_matrices(self._frozen, workload.dtype)  # as `train.loop.fit` holds them
        mine = jax.tree.map(jnp.copy, trainable)  # the state takes them; the next program wants them too
        self.state: TrainState = init_state(mesh, phase, mine)
        self._mesh, self._step = mesh, make_train_step(workload.model(kind), loss, phase)
        self._batch = sharding.put_batch(mesh, workload.make_batch(workload.batch))
        self._rate = sharding.put_replicated(mesh, jnp.float32(phase.learning_rate))
        self._key = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

    def __call__(self) -> dict[str, jax.Array]:
        """Takes a step; its metrics."""
        with jax.set_mesh(self._mesh):
            self.state, metrics = self._step(self.state, self._frozen, self._batch, self._rate, self._key)
        return metrics


def steps(workload: Workload, group: str) -> Builders:
    """A whole step of training."""

    def build() -> Program:
        step = Training(workload, group)
        return _program(step, workload.step_flops(group), workload.batch)

    return {NAME: build}


def settings(workload: Workload, group: str) -> Builders:
    """A step with each choice of a group of SETTINGS."""

    def build(choice: str) -> Program:
        return steps(dataclasses.replace(workload, settings=choice), SETTINGS[group])[NAME]()

    return {choice: lambda choice=choice: build(choice) for choice in setting_choices(group)}


def embed(workload: Workload, group: str) -> Builders:
    """Unit features of images and captions, as the stages embed a data set. group: the batch size."""
    size = int(group)

    def build() -> Program:
        params, model = workload.params("mcl"), workload.model("mcl")
        batch = jax.device_put(workload.make_batch(size))
        encode = {tower: make_encode(model, method) for tower, method in METHODS.items()}

        def call() -> list[jax.Array]:
            return [normalize_features(encode[tower](params, batch[tower])) for tower in METHODS]

        return _program(call, workload.pair_flops(size), size)

    return {NAME: build}


SECTIONS = {
    "peak": peak,
    "towers": towers,
    "attention": attention_section,
    "moe": moe,
    "steps": steps,
    "settings": settings,
    "embed": embed,
}
