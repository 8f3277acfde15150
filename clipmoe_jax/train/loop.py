"""The training loop, the only one: phases differ in what they pass to `fit`."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from clipmoe_jax.core import distributed, sharding, trees
from clipmoe_jax.core.checkpoints import Checkpointer
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.models.clip import Clip
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.rehearsal import Rehearsal, open_batches
from clipmoe_jax.train.step import INPUTS, TEACHER, LossConfig, TrainState, init_state, make_train_step
from clipmoe_jax.train.step_programs import cost_of_row, num_text_shards


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop that change none of its results, except frozen_dtype.

    checkpoints: their folder. checkpoint_every, log_every: in steps. max_to_keep: how many checkpoints.
    num_workers: decoding processes, 0 decodes in threads. frozen_dtype: in which frozen matrices are held.
    """

    checkpoints: epath.Path
    checkpoint_every: int = 500
    max_to_keep: int = 2
    log_every: int = 10
    num_workers: int = 0
    frozen_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Validation:
    """The measuring of a phase on held-out pairs while it trains.

    Attributes:
        every_steps: between measurements; the last step is measured too.
        measure: from params to recalls, between 0 and 1. May raise Preempted.
        best: a folder for the params with the highest mean of recalls, with which the phase then ends; None
            ends it with the last.
    """

    every_steps: int
    measure: Callable[[dict[str, Any]], Mapping[str, float]]
    best: epath.Path | None = None


def fit(
    name: str,
    model: Clip,
    params: dict[str, Any],
    *,
    trainable_rules: trees.Rules,
    pairs: loader.Pairs,
    sampler: loader.Sampler,
    caption_turns: loader.CaptionTurns,
    phase: PhaseConfig,
    loss: LossConfig,
    seed: int,
    mesh: Mesh,
    metrics: Metrics,
    loop: LoopConfig,
    rehearsal: Rehearsal | None = None,
    teacher: dict[str, Any] | None = None,
    validation: Validation | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains the leaves that match the rules, from the newest checkpoint on; returns (params, summary).

    params: placed on the mesh. The trainable leaves are donated; with another frozen_dtype than float32 so
    are the frozen ones, which the device then holds in that dtype alone. Batches, learning rates and dropout
    depend on the step and the seed alone, so an interrupted phase ends with the params of an uninterrupted
    one. rehearsal: steps on other pairs, among the phase's num_steps. teacher: params of the model that
    loss.teacher is the architecture of, placed on the mesh. validation: its metrics begin
    "validation_", and a step without them repeats those before. summary: what trains; num_steps; steps_now,
    seconds_now and compile_seconds_now of this process, without what was compiled ahead; the last step's
    metrics; with `Validation.best` best_step, after which the params were those returned.

    Raises ValueError naming the step, its records and the last good checkpoint if a metric stops being
    finite, and Preempted once a checkpoint is written after SIGTERM.
    """
    num_steps = phase.length(sampler.num_steps)
    sharding.check_batch(mesh, phase.batch_size, phase.accumulation_steps)
    row_cost = cost_of_row(model.config, params, trainable_rules, pairs.context_length, phase)
    trainable, frozen = trees.partition(params, trainable_rules)
    trained = trees.describe(trainable_rules, params)
    frozen, held = _hold(frozen, loop.frozen_dtype)
    given = held | {TEACHER: trees.cast_matrices(teacher, loop.frozen_dtype)} if teacher else held
    state = init_state(mesh, phase, trainable)
    train_step = make_train_step(model, loss, phase)
    rehearse_step = make_train_step(model, rehearsal.loss, phase) if rehearsal else train_step
    rates = phase.learning_rates(num_steps)
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh))()
    began = time.perf_counter()

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(loop.checkpoints, loop.max_to_keep))
        state, step_metrics = _restore(name, checkpointer, state, metrics)
        start = int(state.step)
        best = None
        if validation and validation.best:
            best = _Best(stack.enter_context(Checkpointer(validation.best, max_to_keep=1)), state)

        def validate(step: int) -> dict[str, float]:
            """Measures the params after `step` steps if it is time. Returns all metrics so far."""
            if validation is None or not step or (step % validation.every_steps and step != num_steps):
                return step_metrics
            progress.set_postfix_str("validation")
            newest = fetch(*pending) if pending is not None else step_metrics
            try:
                recalls = validation.measure(trees.merge(state.trainable, held))
            except distributed.Preempted as preempted:
                if checkpointer.latest_step() != step:
                    checkpointer.save(step, state, {"phase": name, **newest})
                raise distributed.Preempted(f"{name}, step {step}") from preempted
            if best:
                best.offer(step, state, recalls)
            return step_metrics | {f"validation_{metric}": recall for metric, recall in recalls.items()}

        def fetch(step: int, rehearses: bool, device_metrics: dict[str, jax.Array]) -> dict[str, float]:
            """Waits for a step's metrics and raises ValueError if one is not finite.

            Returns the newest of each kind of step; those of one that rehearses begin "rehearsal_".
            """
            prefix = "rehearsal_" if rehearses else ""
            fetched = {f"{prefix}{k}": float(v) for k, v in jax.device_get(device_metrics).items()}
            for metric, value in fetched.items():
                if not math.isfinite(value):
                    origin, records = _describe_step(step, sampler, rehearsal)
                    raise ValueError(
                        f"{name}: {metric} is {value} at step {step + 1} ({origin}: records "
                        f"{records}, …); the last good checkpoint is step {checkpointer.latest_step() or 0} "
                        f"in {loop.checkpoints}. Lower the learning rate ({phase.learning_rate}) or look at "
                        "those records"
                    )
            return {**step_metrics, **fetched}

        stack.enter_context(jax.set_mesh(mesh))
        progress = stack.enter_context(metrics.progress(name, start, num_steps))
        stack.callback(metrics.end_profile)
        batches = stack.enter_context(
            open_batches(
                pairs,
                sampler,
                rehearsal,
                start_step=start,
                num_steps=num_steps - start,
                caption_turns=caption_turns,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                num_workers=loop.num_workers,
                num_text_shards=num_text_shards(mesh, phase),
                row_cost=row_cost,
            )
        )
        reporter = _Reporter(name, metrics, progress, start, num_steps, loop.log_every, phase.batch_size)
        pending = None
        for step, (rehearses, batch) in enumerate(reporter.time_waits(batches), start):
            step_metrics = validate(step)  # a resumed phase measures its checkpoint again
            arrays = sharding.put_batch(mesh, {k: v for k, v in batch.items() if k in INPUTS})
            rate = sharding.put_replicated(mesh, rates[step])
            metrics.profile(name, step, state)
            take_step = rehearse_step if rehearses else train_step
            telling = reporter.tell_compilation(rehearses, arrays)
            # Nothing else goes to the devices or comes back.
            with telling, jax.transfer_guard("disallow"):
                state, device_metrics = take_step(state, given, arrays, rate, key)
            # A step's metrics are fetched once the next step is under way, so the device never waits.
            if pending is not None:
                step_metrics = fetch(*pending)
                reporter.report(pending[0] + 1, step_metrics)
            pending = step, rehearses, device_metrics
            done = step + 1
            stop = distributed.preempted() and done < num_steps
            if stop or (done % loop.checkpoint_every == 0 and done < num_steps):
                step_metrics = fetch(*pending)
                checkpointer.save(done, state, {"phase": name, **step_metrics})
            if stop:
                reporter.report(done, step_metrics)
                raise distributed.Preempted(f"{name}, step {done}")
        if pending is not None:
            step_metrics, pending = fetch(*pending), None
        step_metrics = validate(num_steps)
        reporter.report(num_steps, step_metrics)
        if best:
            state = best.restore(state)
            step_metrics |= {"best_step": int(state.step)}
    seconds = {"seconds_now": time.perf_counter() - began, "compile_seconds_now": reporter.compile_seconds}
    summary = {"trains": trained, "num_steps": num_steps, "steps_now": num_steps - start}
    summary |= {name: round(value, 2) for name, value in seconds.items()} | step_metrics
    return trees.merge(state.trainable, sharding.to_devices(frozen)), summary


def _hold(frozen: dict[str, Any], dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the frozen leaves as they are, on the host if `dtype` differs, and as the step takes them."""
    if dtype == "float32":
        return frozen, frozen
    held = trees.cast_matrices(frozen, dtype)
    on_host = sharding.to_host(frozen)
    for leaf, held_leaf in zip(jax.tree.leaves(frozen), jax.tree.leaves(held), strict=True):
        if leaf is not held_leaf:
            leaf.delete()
    return on_host, held


def _describe_step(step: int, sampler: loader.Sampler, rehearsal: Rehearsal | None) -> tuple[str, str]:
    """Returns where a step's records come from, and the first of them."""
    rehearsed = rehearsal.before(step) if rehearsal else 0
    if rehearsal and rehearsal.rehearses(step):
        sampler, step = rehearsal.records.sampler, rehearsed
        origin = f"rehearsal, {sampler.origin(step)}"
    else:
        step -= rehearsed
        origin = sampler.origin(step)
    return origin, ", ".join(str(i) for i in sampler.indices(step)[:5])


def _restore(
    name: str, checkpointer: Checkpointer, state: TrainState, metrics: Metrics
) -> tuple[TrainState, dict[str, float]]:
    """Returns state and metrics of the newest checkpoint; the given state and no metrics if there is none."""
    restored = checkpointer.restore(state)
    if restored is None:
        return state, {}
    state, meta = restored
    metrics.say(f"{name}: resumes from step {int(state.step)}, loss {meta['loss']:.3f}")
    return state, {key: value for key, value in meta.items() if key != "phase"}


class _Best:
    """The state with the highest mean of recalls, kept on disk; of equal ones the first.

    A resumed phase offers states again that it has offered before: one of a step before the kept one's is not
    kept, even if it measures better this time.
    """

    def __init__(self, checkpointer: Checkpointer, like: TrainState):
        self._checkpointer = checkpointer
        kept = checkpointer.restore(like)
        self._score = kept[1]["score"] if kept else -1.0

    def offer(self, step: int, state: TrainState, recalls: Mapping[str, float]) -> None:
        """Keeps a state if it is better than the one kept."""
        score = float(np.mean(list(recalls.values())))
        if score > self._score and self._checkpointer.save(step, state, {"score": score}):
            self._score = score

    def restore(self, like: TrainState) -> TrainState:
        """Returns the state that was kept."""
        self._checkpointer.latest_step()  # waits until it is written
        kept = self._checkpointer.restore(like)
        assert kept is not None  # the last step at least was offered
        return kept[0]


class _Reporter:
    """Moves the progress bar at every step and logs a line every `log_every` steps.

    compile_seconds: how long calls took that compiled a step.
    """

    def __init__(
        self,
        name: str,
        metrics: Metrics,
        progress: tqdm,
        start: int,
        num_steps: int,
        log_every: int,
        batch_size: int,
    ):
        self._name, self._metrics, self._progress = name, metrics, progress
        self._num_steps, self._log_every, self._batch_size = num_steps, log_every, batch_size
        self._logged, self._time, self._waited = start, time.perf_counter(), 0.0
        self._compiled, self.compile_seconds = set(), 0.0

    @contextlib.contextmanager
    def tell_compilation(self, rehearses: bool, arrays: Any) -> Iterator[None]:
        """Says so while a call compiles: the first of a kind of step with arrays of these shapes."""
        program = rehearses, tuple(array.shape for array in jax.tree.leaves(arrays))
        if program in self._compiled:
            yield
            return
        self._compiled.add(program)
        began = time.perf_counter()
        self._progress.set_postfix_str("compiling")
        yield
        self.compile_seconds += time.perf_counter() - began
        self._progress.unpause()  # the time left is that of steps
        self._progress.set_postfix_str(f"compiled in {time.perf_counter() - began:.0f} s", refresh=False)

    def time_waits(self, batches: Iterator[tuple[bool, loader.Batch]]) -> Iterator[tuple[bool, loader.Batch]]:
        """Yields the batches and adds up how long each took to come."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def report(self, done: int, step_metrics: dict[str, float]) -> None:
        """Reports that `done` steps are done, the last one with these metrics."""
        self._progress.update(done - self._progress.n)
        if done % self._log_every and done != self._num_steps:
            return
        now = time.perf_counter()
        elapsed = now - self._time
        rate, waited = (done - self._logged) * self._batch_size / elapsed, self._waited / elapsed
        self._logged, self._time, self._waited = done, now, 0.0
        speed = {"pairs_per_second": rate, "input_wait_fraction": waited}
        self._metrics.log(self._name, done, {**step_metrics, **speed})
        shown = f"loss {step_metrics['loss']:.3f}, {rate:.0f} pairs/s, input wait {waited:.0%}"
        self._progress.set_postfix_str(shown, refresh=False)
