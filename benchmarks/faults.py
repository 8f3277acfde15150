"""Kills and stops a run of several processes at random moments until it is done, and compares what it made.

    python -m benchmarks.faults --kills=20 --sigterms=5 --workdir=/tmp/faults

Each time one process of launch/local.py gets SIGKILL or SIGTERM after a random time, and the same command is
started again. A run that ends before its signal came is compared, and the next begins from nothing. Every
parameter, feature and pseudo-label must be that of a run that nobody disturbed, bit for bit: a step that was
lost, done twice or given other pairs would show in all that come after it.
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np

from clipmoe_jax.core import trees
from clipmoe_jax.models.model_folder import load_model

ROOT = pathlib.Path(__file__).parents[1]


def start(workdir: pathlib.Path, config: str, num_processes: int, cache: pathlib.Path) -> subprocess.Popen:
    """Starts launch/local.py, its consoles in WORKDIR.log."""
    command = [sys.executable, str(ROOT / "launch" / "local.py"), f"--processes={num_processes}"]
    command += [f"--logs={workdir.parent}", "--", f"--config={config}", f"--workdir={workdir}"]
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    with pathlib.Path(f"{workdir}.log").open("a") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    """Returns the processes that a process started."""
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def where(workdir: pathlib.Path) -> str:
    """Returns the artifact that is being made."""
    unfinished = sorted(str(path.relative_to(workdir)) for path in workdir.glob("**/*.unfinished"))
    return unfinished[0].removesuffix(".unfinished") if unfinished else "between stages"


def compare(workdir: pathlib.Path, whole: pathlib.Path) -> int:
    """Raises AssertionError at the first array that is not the same; returns how many were compared."""
    count = 0
    for model in sorted(path.parent.relative_to(whole) for path in whole.glob("**/model.json")):
        expected = trees.flatten(load_model(whole / model)[1])
        for name, leaf in trees.flatten(load_model(workdir / model)[1]).items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=f"{model}: {name}")
            count += 1
    for path in sorted(whole.glob("stage_*/*/*.npy")):
        array = path.relative_to(whole)
        np.testing.assert_array_equal(np.load(workdir / array), np.load(path), err_msg=str(array))
        count += 1
    return count


def main() -> None:
    """Starts, signals and compares until all signals are sent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sigterms", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--config", default="configs/demo.py:small")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    rng, cache = random.Random(arguments.seed), arguments.workdir / "cache"
    whole, workdir = arguments.workdir / "whole", arguments.workdir / "disturbed"

    began = time.monotonic()
    if code := start(whole, arguments.config, arguments.processes, cache).wait():
        sys.exit(f"the run that nobody disturbed ended with {code}: see {whole}.log")
    longest = time.monotonic() - began
    print(f"undisturbed: {longest:.0f} s", flush=True)

    signals = [signal.SIGKILL] * arguments.kills + [signal.SIGTERM] * arguments.sigterms
    rng.shuffle(signals)
    codes, runs = collections.defaultdict(collections.Counter), 0
    while True:
        running = start(workdir, arguments.config, arguments.processes, cache)
        if signals:
            delay = rng.uniform(3, 0.7 * longest)
            try:
                code = running.wait(delay)
            except subprocess.TimeoutExpired:
                place, number = where(workdir), signals.pop()
                os.kill(rng.choice(children(running.pid)), number)
                code = running.wait()
                codes[number.name][code] += 1
                print(f"{number.name} after {delay:.0f} s in {place}: code {code}", flush=True)
                continue
        else:
            code = running.wait()
        if code:
            sys.exit(f"a run that got no signal ended with {code}: see {workdir}.log")
        runs += 1
        print(f"run {runs} is whole: {compare(workdir, whole)} arrays are the same bit for bit", flush=True)
        if not signals:
            break
        shutil.rmtree(workdir)
    for name, counts in codes.items():
        print(f"{name}: " + ", ".join(f"{times} x code {code}" for code, times in counts.items()))


if __name__ == "__main__":
    main()
