"""The training loop, the only one: every phase differs by what it passes in."""

import contextlib
import math
import time
from collections.abc import Iterator

import jax
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from clipmoe_jax.core import distributed, sharding, trees
from clipmoe_jax.core.checkpoints import Checkpointer
from clipmoe_jax.core.metrics import Metrics
from clipmoe_jax.data import loader
from clipmoe_jax.models.clip import Clip
from clipmoe_jax.train.phase import PhaseConfig
from clipmoe_jax.train.step import INPUTS, LossConfig, init_state, make_train_step


def fit(
    name: str,
    model: Clip,
    params: trees.Params,
    *,
    trainable_rules: trees.Rules,
    pairs: loader.StreamedPairs | loader.DecodedPairs,
    sampler: loader.Sampler,
    phase: PhaseConfig,
    loss: LossConfig,
    seed: int,
    mesh: Mesh,
    metrics: Metrics,
    checkpoint_folder: epath.Path,
    checkpoint_every: int = 500,
    max_to_keep: int = 2,
    log_every: int = 10,
    num_workers: int = 0,
    frozen_dtype: str = "float32",
    num_steps: int | None = None,
) -> tuple[dict, dict[str, float]]:
    """Trains the leaves that the rules say, going on from the newest checkpoint; returns (params, measured).

    params: placed on the mesh; its trainable leaves are given up, and with another frozen_dtype than
    float32 the frozen ones, which the device then holds in that type alone. Batches, learning rates and
    dropout depend on the step and the seed alone, so an interrupted phase ends with the params of an
    uninterrupted one. measured: how many steps, how many of them now and in what time, and the last step's
    numbers.
    Raises ValueError naming the step, its records and the last good checkpoint if the loss stops being
    finite, Preempted when SIGTERM came and a checkpoint is written.
    """
    num_steps = num_steps or phase.length(sampler.num_steps)
    sharding.check_batch(mesh, phase.batch_size, phase.accumulation_steps)
    trainable, frozen = trees.partition(params, trainable_rules)
    metrics.say(f"{name}: {trees.describe(trainable_rules, params)}")
    held = frozen
    if frozen_dtype != "float32":
        held = trees.cast_matrices(frozen, frozen_dtype)
        on_device, frozen = frozen, sharding.to_host(frozen)
        jax.tree.map(lambda leaf, kept: leaf is kept or leaf.delete(), on_device, held)
    state = init_state(mesh, phase, trainable)
    train_step = make_train_step(model, loss, phase)
    rates = phase.learning_rates(num_steps)
    key = jax.jit(lambda: jax.random.key(seed), out_shardings=sharding.replicated(mesh))()
    numbers: dict[str, float] = {}
    began = time.perf_counter()

    def read(step: int, device_metrics: dict) -> dict[str, float]:
        """Waits for a step's numbers and stops if one is not finite."""
        found = {k: float(v) for k, v in jax.device_get(device_metrics).items()}
        if odd := [f"{k} is {v}" for k, v in found.items() if not math.isfinite(v)]:
            first = ", ".join(str(i) for i in sampler.indices(step)[:5])
            raise ValueError(
                f"{name}: {odd[0]} at step {step + 1} ({sampler.origin(step)}: records {first}, …); the "
                f"last good checkpoint is step {checkpointer.latest_step() or 0} in {checkpoint_folder}. "
                f"Lower the learning rate ({phase.learning_rate}) or look at those records"
            )
        return found

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(checkpoint_folder, max_to_keep))
        if (restored := checkpointer.restore(state)) is not None:
            state, meta = restored
            metrics.say(f"{name}: goes on from step {int(state.step)}, loss {meta['loss']:.3f}")
        start = int(state.step)
        stack.enter_context(jax.set_mesh(mesh))
        progress = stack.enter_context(metrics.progress(name, start, num_steps))
        batches = stack.enter_context(
            loader.batches(
                pairs,
                sampler,
                start_step=start,
                num_steps=num_steps - start,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                num_workers=num_workers,
                num_text_shards=mesh.size * phase.accumulation_steps,
            )
        )
        reporter = _Reporter(name, metrics, progress, start, num_steps, log_every, phase.batch_size)
        pending = None
        for step, batch in enumerate(reporter.time_waits(batches), start):
            arrays = sharding.put_batch(mesh, {k: v for k, v in batch.items() if k in INPUTS})
            rate = sharding.put_replicated(mesh, rates[step])
            with jax.transfer_guard("disallow"):  # nothing else goes to the devices or comes back
                state, found = train_step(state, held, arrays, rate, key)
            # A step's numbers are read when the next one is under way, so that the device never waits.
            if pending is not None:
                numbers = read(*pending)
                reporter.step(pending[0] + 1, numbers)
            pending = step, found
            done = step + 1
            stop = distributed.preempted() and done < num_steps
            if stop or (done % checkpoint_every == 0 and done < num_steps):
                numbers = read(*pending)
                checkpointer.save(done, state, {"phase": name, **numbers})
            if stop:
                reporter.step(done, numbers)
                raise distributed.Preempted(f"{name}, step {done}")
        if pending is not None:
            numbers = read(*pending)
            reporter.step(num_steps, numbers)
    seconds = round(time.perf_counter() - began, 2)
    measured = {"num_steps": num_steps, "steps_now": num_steps - start, "seconds_now": seconds, **numbers}
    return trees.merge(state.trainable, sharding.to_devices(frozen)), measured


class _Reporter:
    """Turns steps that are done into the progress bar and, every `log_every` of them, a logged line."""

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

    def time_waits(self, batches: Iterator[loader.Batch]) -> Iterator[loader.Batch]:
        """The same batches; how long each had to be waited for is counted."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def step(self, done: int, numbers: dict[str, float]) -> None:
        """`done` steps are done, and the last one's numbers are these."""
        self._progress.update()
        if done % self._log_every and done != self._num_steps:
            return
        now = time.perf_counter()
        elapsed = now - self._time
        rate, waited = (done - self._logged) * self._batch_size / elapsed, self._waited / elapsed
        self._logged, self._time, self._waited = done, now, 0.0
        speed = {"pairs_per_second": rate, "input_wait_fraction": waited}
        self._metrics.log(self._name, done, {**numbers, **speed})
        shown = f"loss {numbers['loss']:.3f}, {rate:.0f} pairs/s, input wait {waited:.0%}"
        self._progress.set_postfix_str(shown, refresh=False)
