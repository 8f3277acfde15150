"""Runs a tiny pipeline and sends this process a signal at one place: a helper of the tests beside it.

python killed_run.py WORKDIR PLACE [SIGNAL] [FIELD=VALUE ...]      SIGNAL: default SIGKILL

PLACE: a key of PLACES, or "nowhere", or "nowhere, with one part", or "nowhere, with diagnostics", which take
long to compile. FIELD: of the tiny config, not a flag or a tuple.

Of several processes the last is the one.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable

import jax
from etils import epath
from tiny_config import get_config

from clipmoe_jax.core import artifacts, cli, distributed
from clipmoe_jax.data import preparation
from clipmoe_jax.data.clusters import ClusterIndex
from clipmoe_jax.dmu import results as dmu_results
from clipmoe_jax.dmu import runner, stages, training
from clipmoe_jax.train import loop

_signal = signal.SIGKILL


def kill_at_call(module, name: str, call: int, *, after: bool, match: str = "") -> None:
    """Kills this process at the n-th call of a function whose arguments mention `match`."""
    original: Callable = getattr(module, name)
    count = 0

    def killing(*args, **kwargs):
        nonlocal count
        count += match in repr(args)
        result = original(*args, **kwargs) if count < call or after else None
        if count == call:
            os.kill(os.getpid(), _signal)
        return result

    setattr(module, name, killing)


def kill_at_step(phase: str, step: int) -> None:
    original = loop._Reporter.report

    def killing(self, done, numbers):
        original(self, done, numbers)
        if self._name == phase and done == step:
            os.kill(os.getpid(), _signal)

    loop._Reporter.report = killing


def kill_within_part(num_batches: int) -> None:
    """Kills this process when a part has so many batches."""
    original = stages.Encoder.stream

    def killing(self, *arguments):
        for number, features in enumerate(original(self, *arguments), 1):
            if number == num_batches:
                os.kill(os.getpid(), _signal)
            yield features

    stages.Encoder.stream = killing


PLACES = {
    "data, between two data sets": lambda: kill_at_call(preparation, "write_pairs", 2, after=False),
    "base, before its first checkpoint": lambda: kill_at_step("base", 1),
    "base, while a checkpoint is written": lambda: kill_at_step("base", 5),
    "base, trained but not saved": lambda: kill_at_call(training, "save_model", 1, after=False),
    "embed, between two parts": lambda: kill_at_call(stages, "save_array", 2, after=True, match="text-"),
    "embed, within its one part": lambda: kill_within_part(2),
    "cluster, sorted but not saved": lambda: kill_at_call(ClusterIndex, "write", 1, after=False),
    "mcl, after a checkpoint": lambda: kill_at_step("mcl_1", 4),
    "consolidation, after a checkpoint": lambda: kill_at_step("consolidation", 5),
    "upcycle, model written, stage not done": lambda: kill_at_call(
        training, "save_model", 1, after=True, match="upcycled"
    ),
    "upcycle, done but not renamed": lambda: kill_at_call(
        artifacts, "write_json", 1, after=True, match="upcycled.unfinished/done.json"
    ),
    "router, after a checkpoint": lambda: kill_at_step("router", 6),
    "router, whole, its checkpoints half deleted": lambda: kill_at_call(
        artifacts, "_tidy", 1, after=False, match="moe/params"
    ),
}


if __name__ == "__main__":
    workdir, place, *rest = sys.argv[1:]
    config = get_config()
    for field, value in (part.split("=", 1) for part in rest if "=" in part):
        *sections, name = field.split(".")
        section = functools.reduce(getattr, sections, config)
        section[name] = type(section[name])(value)
    names = [part for part in rest if "=" not in part]
    _signal = signal.Signals[names[0]] if names else signal.SIGKILL
    distributed.initialize()
    stages.PART_ROWS = 64 if place.endswith("one part") else 16  # one part of features, or four
    if place != "nowhere, with diagnostics":
        dmu_results._diagnose = lambda run, folder, progress: {}
        dmu_results._nothing_changed = lambda run: []
    if place in PLACES and jax.process_index() == jax.process_count() - 1:
        PLACES[place]()
    with cli.announced_preemption():
        runner.run_variants(config, epath.Path(workdir))
