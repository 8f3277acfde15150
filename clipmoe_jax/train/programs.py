"""The programs of a phase's steps, from shapes alone: they compile before the phase begins.

Letters: B pairs of the global batch, S shards of its text, R rows of each, L row length.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AbstractMesh, Mesh

from clipmoe_jax.core import accelerators, sharding, trees
from clipmoe_jax.data import loader
from clipmoe_jax.models import flops
from clipmoe_jax.models.clip import Clip, ClipConfig
from clipmoe_jax.models.inputs import PackedText
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.rehearsal import Rehearsal, Targets, rows_of_phase
from clipmoe_jax.train.step import INPUTS, TEACHER, LossConfig, abstract_state, make_train_step


class Program(NamedTuple):
    """A step and its arguments as shapes with their shardings, of one number of rows of text."""

    step: jax.stages.Wrapped
    arguments: tuple[Any, ...]


class CompiledAhead:
    """Compiles programs in a thread, those of one phase after the other, while other phases train."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._begun: dict[str, Future] = {}

    def begin(self, phase: str, mesh: Mesh, programs: Sequence[Program]) -> None:
        """Begins to compile the programs of a phase, by its name. A call of such a step finds them then."""

        def compile_all() -> None:
            with jax.set_mesh(mesh):
                for program in programs:
                    program.step.lower(*program.arguments).compile()

        self._begun[phase] = self._thread.submit(compile_all)

    def wait(self, phase: str) -> None:
        """Waits until the programs of a phase are compiled, if the thread is at them.

        If it has not begun, or failed, the phase compiles them itself, and raises what is wrong with them.
        """
        future = self._begun.get(phase)
        if future is None or future.cancel():
            return
        if error := future.exception():
            logging.warning("%s was not compiled ahead: %s", phase, error)

    def close(self) -> None:
        """Compiles no other program. One that is being compiled goes on."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def programs_of_phase(
    model: Clip,
    params: trees.Params,
    *,
    trainable_rules: trees.Rules,
    pairs: loader.Pairs,
    sampler: loader.Sampler,
    phase: PhaseConfig,
    loss: LossConfig,
    mesh: Mesh,
    frozen_dtype: str,
    rehearsal: Rehearsal | None = None,
    teacher: trees.Params | None = None,
) -> list[Program]:
    """Returns the programs that `fit` runs with these arguments, but for batches with more rows of text than
    its samples of them have.

    params, teacher: as shapes with their shardings.
    """
    trainable, frozen = trees.partition(params, trainable_rules)
    held = abstract_held(frozen, teacher, frozen_dtype)
    num_shards = num_text_shards(mesh, phase)
    own, rehearsed = rows_of_phase(
        pairs,
        sampler,
        rehearsal,
        num_steps=phase.length(sampler.num_steps),
        num_text_shards=num_shards,
        row_cost=cost_of_row(model.config, params, trainable_rules, pairs.context_length, phase),
    )
    kinds: list[tuple[LossConfig, Sequence[loader.Pairs], Sequence[int], Targets | None]] = [
        (loss, [pairs], own, None)
    ]
    if rehearsal:
        drawn = [drawn.pairs for drawn in rehearsal.drawn]
        kinds.append((rehearsal.loss, drawn, rehearsed[-1], rehearsal.targets))
    programs, split = [], sharding.batch_sharding(mesh)
    for of_kind, sources, rows, targets in kinds:
        step = make_train_step(model, of_kind, phase)
        for num_rows in rows or (phase.batch_size // num_shards,):
            batch = _batch(sources, phase.batch_size, num_shards * num_rows, targets)
            batch = jax.tree.map(lambda leaf: leaf.update(sharding=split), batch)
            programs.append(Program(step, abstract_arguments(mesh, phase, trainable, held, batch)))
    return programs


def _batch(
    sources: Sequence[loader.Pairs], size: int, num_rows: int, targets: Targets | None
) -> dict[str, Any]:
    """A batch as a step takes it: images of the first of the sources, captions of the last, in rows that they
    share if they may."""
    images, captions = (source.gather(np.array([-1])) for source in (sources[0], sources[-1]))  # of no pair
    arrays = {name: array for name, array in (images | {"text": captions["text"]}).items() if name in INPUTS}
    if targets:
        arrays |= {"target_images": targets.images, "target_texts": targets.texts}
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
    if sources[0].packs:
        ends, rows = jax.ShapeDtypeStruct((size,), np.int32), (num_rows, sources[-1].context_length)
        tokens = jax.ShapeDtypeStruct(rows, np.int32)
        batch["text"] = PackedText(tokens, tokens, ends)
    return batch


def num_text_shards(mesh: Mesh, phase: PhaseConfig) -> int:
    """Returns S: a device computes a microbatch at once."""
    return mesh.size * phase.accumulation_steps


def cost_of_row(
    config: ClipConfig, params: trees.Params, rules: trees.Rules, context_length: int, phase: PhaseConfig
) -> float:
    """Returns what a row of text of all parts costs in a step, in compilations of it."""
    trains = trees.match_rules(rules, list(trees.flatten(params)))
    row_flops = flops.forward_backward(config, trains, context_length, towers=["text"])
    return phase.accumulation_steps * row_flops / accelerators.flops_of_compilation()


def abstract_arguments(
    mesh: Mesh | AbstractMesh,
    phase: PhaseConfig,
    trainable: trees.Params,
    held: trees.Params,
    batch: dict[str, Any],
) -> tuple[Any, ...]:
    """Returns a step's arguments as shapes with their shardings, from such params and batch."""
    everywhere = sharding.replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rate, key = (jax.ShapeDtypeStruct((), dtype, sharding=everywhere) for dtype in (jnp.float32, key.dtype))
    return abstract_state(mesh, phase, trainable), held, batch, rate, key


def abstract_held(frozen: trees.Params, teacher: trees.Params | None, dtype: str) -> dict[str, Any]:
    """Returns what `fit` holds of frozen params, those of a teacher that is a model of its own among them."""
    given = dict(frozen) | ({TEACHER: teacher} if teacher else {})
    cast = jax.eval_shape(lambda tree: trees.cast_matrices(tree, dtype), given)
    return jax.tree.map(lambda leaf, cast: leaf.update(dtype=cast.dtype), given, cast)
