"""The programs of a phase's steps, from shapes alone: they compile before the phase begins.

Letters: B pairs of the global batch, S shards of its text, R rows of each.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from clipmoe_jax.train.rehearsal import Rehearsal, rows_of_phase
from clipmoe_jax.train.step import INPUTS, TEACHER, LossConfig, abstract_state, make_train_step


class Program(NamedTuple):
    """A step and its arguments as shapes with their shardings, for one R."""

    step: jax.stages.Wrapped
    arguments: tuple[Any, ...]


class CompiledAhead:
    """Compiles programs in a thread, those of one phase after the other, while other phases train.

    A call of such a step finds its program then, and waits for it where the thread is at it.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._is_closed = threading.Event()

    def begin(self, phase: str, mesh: Mesh, make_programs: Callable[[], Sequence[Program]]) -> None:
        """Has the thread make and compile the programs of a phase, which is told by its name if it fails."""

        def compile_all() -> None:
            try:
                for program in make_programs():
                    if self._is_closed.is_set():
                        return
                    with jax.set_mesh(mesh):
                        program.step.lower(*program.arguments).compile()
            except Exception as error:  # the phase itself raises what is wrong with them
                if not self._is_closed.is_set():
                    logging.warning("%s was not compiled ahead: %s", phase, error)

        self._thread.submit(compile_all)

    def close(self) -> None:
        """Lets the thread end with the program that it is at."""
        self._is_closed.set()
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

    params, teacher: as shapes with their shardings. Of a rehearsal's targets only shape and dtype count.
    """
    trainable, frozen = trees.partition(params, trainable_rules)
    held = abstract_held(frozen, teacher, frozen_dtype)
    num_shards, num_steps = num_text_shards(mesh, phase), phase.length(sampler.num_steps)
    own, rehearsed = rows_of_phase(
        pairs,
        sampler,
        rehearsal,
        num_steps=num_steps,
        num_text_shards=num_shards,
        row_cost=cost_of_row(model.config, params, trainable_rules, pairs.context_length, phase),
    )
    kinds: list[tuple[LossConfig, list[loader.Pairs], tuple[int, ...], Any]] = [(loss, [pairs], own, None)]
    if rehearsal and rehearsal.before(num_steps):
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


def _batch(sources: Sequence[loader.Pairs], size: int, all_rows: int, targets: Any) -> dict[str, Any]:
    """A batch of B pairs as a step takes it: images of the first of the sources, captions of the last, in the
    S R rows that they share if they may."""
    images, captions = (source.gather(np.array([-1])) for source in (sources[0], sources[-1]))  # of no pair
    arrays = {name: array for name, array in (images | {"text": captions["text"]}).items() if name in INPUTS}
    if targets:
        arrays |= {"target_images": targets.images, "target_texts": targets.texts}
    batch: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((size, *array.shape[1:]), array.dtype) for name, array in arrays.items()
    }
    if sources[0].packs:
        tokens = jax.ShapeDtypeStruct((all_rows, sources[-1].context_length), np.int32)
        batch["text"] = PackedText(tokens, tokens, jax.ShapeDtypeStruct((size,), np.int32))
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
