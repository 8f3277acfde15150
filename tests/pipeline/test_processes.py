"""Several processes, each with devices of its own: the same numbers, killed, stopped and gone on with."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from grids import exhaustive, grid

from clipmoe_jax.core import trees
from clipmoe_jax.models.model_folder import load_model

SCRIPT = pathlib.Path(__file__).parent / "killed_run.py"
REPOSITORY = SCRIPT.parents[2]
MODELS = ("base", "stage_1/params", "dense/params", "moe/upcycled", "moe/params")


def environment(num_devices: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLIPMOE_")}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def member(port: int, num_processes: int, i: int) -> dict[str, str]:
    """What makes a process the i-th of several."""
    return {
        "CLIPMOE_COORDINATOR": f"127.0.0.1:{port}",
        "CLIPMOE_NUM_PROCESSES": str(num_processes),
        "CLIPMOE_PROCESS_ID": str(i),
    }


def run(*arguments, num_processes=2, num_devices=4, timeout=200) -> list[subprocess.CompletedProcess]:
    """killed_run.py in every process; none outlives it."""
    port, started = free_port(), []
    try:
        for i in range(num_processes):
            process = member(port, num_processes, i) if num_processes > 1 else {}
            started.append(
                subprocess.Popen(
                    [sys.executable, str(SCRIPT), *map(str, arguments)],
                    env=environment(num_devices) | process,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, output)
        for process, output in zip(started, outputs, strict=True)
    ]


def assert_finished(done):
    assert [process.returncode for process in done] == [0] * len(done), done[0].stdout[-3000:]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The workdir of two processes with four devices each, never stopped; they also write diagnostics."""
    workdir = tmp_path_factory.mktemp("together")
    assert_finished(run(workdir, "nowhere, with diagnostics"))
    return workdir


def params_of(workdir, model):
    """Without the biases of attention keys: softmax does not see them, so that their gradients are rounding
    alone, of which Adam makes steps."""
    leaves = trees.flatten(load_model(workdir / model)[1])
    for name, leaf in leaves.items():
        if name.endswith("attn/in_proj/bias"):
            width = len(leaf) // 3
            leaves[name] = np.concatenate([leaf[:width], leaf[2 * width :]])
    return leaves


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    """The workdir of two processes of which one was sent SIGTERM while a stage trained; the processes."""
    workdir = tmp_path_factory.mktemp("terminated")
    return workdir, run(workdir, "mcl, after a checkpoint", "SIGTERM")


@pytest.fixture(scope="module")
def terminated_in_base(tmp_path_factory):
    """The same, but while the base trained, before its first checkpoint."""
    workdir = tmp_path_factory.mktemp("terminated_in_base")
    return workdir, run(workdir, "base, before its first checkpoint", "SIGTERM")


@pytest.fixture(scope="module")
def resumed(terminated, tmp_path_factory):
    """The workdir of the stopped run, finished by the same command."""
    workdir = shutil.copytree(terminated[0], tmp_path_factory.mktemp("resumed") / "workdir")
    assert_finished(run(workdir, "nowhere"))
    return workdir


@pytest.fixture(scope="module")
def killed(terminated, tmp_path_factory):
    """The workdir of the stopped run, of which one process was killed later, finished; the processes."""
    workdir = shutil.copytree(terminated[0], tmp_path_factory.mktemp("killed") / "workdir")
    processes = run(workdir, "router, after a checkpoint", "SIGKILL")
    assert_finished(run(workdir, "nowhere"))
    return workdir, processes


def assert_same_params(workdir, expected_workdir, model, rtol, atol):
    expected = params_of(expected_workdir, model)
    for name, leaf in params_of(workdir, model).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=rtol, atol=atol, err_msg=name)


def assert_same_arrays(workdir, expected_workdir):
    """Features and labels."""
    arrays = sorted(path.relative_to(expected_workdir) for path in expected_workdir.glob("stage_1/*/*.npy"))
    assert len(arrays) == 2 * 4 + 3
    for array in arrays:
        found, expected = np.load(workdir / array), np.load(expected_workdir / array)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3, err_msg=str(array))


STOPPED = pytest.mark.parametrize(
    "stopped_run", grid("terminated_in_base", rest=["terminated"]), ids=["base", "mcl"]
)


@STOPPED
def test_sigterm_to_one_process_saves_and_stops_both(request, stopped_run):
    """Exit code 75: start again."""
    _, done = request.getfixturevalue(stopped_run)
    assert [process.returncode for process in done] == [75, 75], done[0].stdout[-3000:]
    assert "stopped by SIGTERM; start the same command again to go on" in done[0].stdout


@STOPPED
def test_two_processes_have_the_losses_of_one_until_they_are_stopped(request, stopped_run, uninterrupted):
    found, expected = losses_of(request.getfixturevalue(stopped_run)[0]), losses_of(uninterrupted)
    assert len(found) > 1
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-5), step


@exhaustive
def test_two_processes_train_the_base_that_one_trains(uninterrupted, terminated):
    assert_same_params(terminated[0], uninterrupted, "base", rtol=1e-4, atol=1e-5)


@exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_stopped_and_resumed_train_what_one_trains(uninterrupted, resumed, model):
    assert_same_params(resumed, uninterrupted, model, rtol=1e-4, atol=1e-5)


@exhaustive
def test_two_processes_stopped_and_resumed_give_features_and_labels_of_one(uninterrupted, resumed):
    assert_same_arrays(resumed, uninterrupted)


@exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_what_one_trains(uninterrupted, together, model):
    assert_same_params(together, uninterrupted, model, rtol=1e-4, atol=1e-5)


@exhaustive
def test_two_processes_give_features_and_labels_of_one(uninterrupted, together):
    assert_same_arrays(together, uninterrupted)


@exhaustive
@pytest.mark.parametrize("model", MODELS)
def test_killed_and_resumed_processes_give_the_same_params_bit_for_bit(killed, together, model):
    assert_same_params(killed[0], together, model, rtol=0, atol=0)


@exhaustive
def test_process_that_is_killed_ends_the_other(killed):
    """It neither hangs nor goes on alone."""
    first, last = killed[1]
    assert last.returncode == -signal.SIGKILL
    assert first.returncode not in (0, 75)


@exhaustive
def test_only_process_0_writes_metrics(terminated):
    """A line for each logged step, not two; the processes agree on a step to stop at after the signal."""
    steps = [(line["phase"], line["step"]) for line in metrics_of(terminated[0])]
    assert len(steps) == len(set(steps))
    assert {("base", step) for step in range(1, 8)} | {("mcl_1", step) for step in range(1, 5)} <= {*steps}


def assert_every_step_has_one_line(workdir):
    steps = [(line["phase"], line["step"]) for line in metrics_of(workdir)]
    phases = ("base", "consolidation", "mcl_1", "router")
    assert sorted(steps) == [(phase, step) for phase in phases for step in range(1, 8)]


@exhaustive
def test_only_process_0_writes_metrics_of_a_run_that_was_resumed(resumed):
    assert_every_step_has_one_line(resumed)


@exhaustive
def test_only_process_0_writes_metrics_of_a_run_that_was_not_stopped(together):
    assert_every_step_has_one_line(together)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of one process with eight devices that SIGTERM stopped while a stage trained."""
    workdir = tmp_path_factory.mktemp("stopped")
    (done,) = run(workdir, "mcl, after a checkpoint", "SIGTERM", num_processes=1, num_devices=8)
    assert done.returncode == 75, done.stdout[-3000:]
    assert "mcl_1, step 5: stopped by SIGTERM" in done.stdout  # sent after 4 steps, seen by the next
    return workdir


@exhaustive
def test_ctrl_c_saves_as_sigterm_does(stopped, tmp_path):
    (done,) = run(tmp_path, "mcl, after a checkpoint", "SIGINT", num_processes=1, num_devices=8)
    assert done.returncode == 130, done.stdout[-3000:]
    assert "mcl_1, step 5: stopped by Ctrl-C; start the same command again to go on" in done.stdout
    assert "Traceback" not in done.stdout
    assert {path.name for path in (tmp_path / "stage_1" / "params.unfinished" / "checkpoints").iterdir()} == {
        path.name for path in (stopped / "stage_1" / "params.unfinished" / "checkpoints").iterdir()
    }


@exhaustive
def test_features_of_an_embedding_that_stopped_are_those_of_one_that_did_not(uninterrupted, tmp_path):
    """It stops within a part, and goes on with the next batch of it."""
    (done,) = run(tmp_path, "embed, within its one part", "SIGTERM", num_processes=1, num_devices=1)
    assert done.returncode == 75 and "embed_1, 32 pairs: stopped by SIGTERM" in done.stdout
    assert (tmp_path / "stage_1" / "features.unfinished" / "begun.npz").exists()
    assert_finished(run(tmp_path, "nowhere, with one part", num_processes=1, num_devices=1))
    for modality in ("image", "text"):
        (found,), parts = (
            [np.load(path) for path in sorted((run / "stage_1" / "features").glob(f"{modality}-*.npy"))]
            for run in (tmp_path, uninterrupted)
        )
        np.testing.assert_array_equal(found, np.concatenate(parts))
    assert {path.suffix for path in (tmp_path / "stage_1" / "features").iterdir()} == {".npy", ".json"}


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_of(workdir) -> dict[tuple[str, int], float]:
    """{(phase, step): loss}, of a step that was done again the later one."""
    return {(line["phase"], line["step"]): line["loss"] for line in metrics_of(workdir)}


@exhaustive
def test_run_resumes_with_other_processes_and_devices(tmp_path, uninterrupted, stopped):
    """Saved on eight devices of one process; finished by four of two."""
    workdir = tmp_path / "workdir"
    shutil.copytree(stopped, workdir)
    before = losses_of(workdir)
    assert max(step for phase, step in before if phase == "mcl_1") == 5
    assert_finished(run(workdir, "nowhere", num_processes=2, num_devices=2))
    assert {("mcl_1", 6), ("mcl_1", 7), ("router", 7)} <= losses_of(workdir).keys() - before.keys()
    assert_same_numbers(workdir, uninterrupted)


def assert_same_numbers(workdir, uninterrupted):
    """But for what the number of devices changes: the order of sums, and how many rows captions share."""
    expected, found = losses_of(uninterrupted), losses_of(workdir)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=3e-5), step
    expected = params_of(uninterrupted, "moe/params")
    for name, leaf in params_of(workdir, "moe/params").items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module", params=["consolidation, after a checkpoint", "router, after a checkpoint"])
def killed_on_four(request, tmp_path_factory):
    """The workdir of one process with four devices that was killed in a phase of training."""
    workdir = tmp_path_factory.mktemp("killed_on_four")
    (done,) = run(workdir, request.param, num_processes=1, num_devices=4)
    assert done.returncode == -signal.SIGKILL, done.stdout[-3000:]
    return workdir


@exhaustive
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_killed_run_resumes_on_any_number_of_devices(tmp_path, uninterrupted, killed_on_four, num_devices):
    workdir = tmp_path / "workdir"
    shutil.copytree(killed_on_four, workdir)
    assert_finished(run(workdir, "nowhere", num_processes=1, num_devices=num_devices))
    assert_same_numbers(workdir, uninterrupted)


BARRIER = """
import os, sys, time
from clipmoe_jax.core import distributed
distributed.initialize()
if os.environ["CLIPMOE_PROCESS_ID"] == "0":
    try:
        distributed.barrier("all meet", seconds=3)
    except TimeoutError as error:
        print(error, flush=True)
        os._exit(3)
time.sleep(60)
"""


def test_barrier_names_the_host_that_is_late():
    port, started = free_port(), []
    try:
        for i in range(2):
            command = [sys.executable, "-c", BARRIER]
            where = environment(1) | member(port, 2, i)
            started.append(subprocess.Popen(command, env=where, stdout=subprocess.PIPE, text=True))
        output, _ = started[0].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert started[0].returncode == 3
    assert f"all meet: after 3 s these are missing: process 1 on {socket.gethostname()}" in output


FAILING = """
import sys, time, jax
from clipmoe_jax.core import cli, distributed
def main(argv):
    distributed.initialize()
    distributed.barrier("both begin")
    if jax.process_index() in {failing}:
        raise ValueError("record 5 cannot be read")
    distributed.agree(True)
cli.run(main)
"""


def two_processes(script: str, *arguments: str) -> list[tuple[int, str]]:
    """(exit code, stderr) of two processes, of one device each, that run the script."""
    port, started = free_port(), []
    try:
        for i in range(2):
            command = [sys.executable, "-c", script, *arguments]
            where = environment(1) | member(port, 2, i)
            started.append(subprocess.Popen(command, env=where, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def failing(failing: tuple[int, ...], *flags: str) -> tuple[list[tuple[int, str]], float]:
    """(exit code, stderr) of two processes of which some fail, and the seconds that they took."""
    began = time.monotonic()
    found = two_processes(FAILING.format(failing=failing), *flags)
    return found, time.monotonic() - began


@pytest.mark.parametrize("flags", [(), ("--debug",)], ids=["a line", "a stack trace"])
def test_process_that_fails_alone_ends_the_other(flags):
    """And not after the five minutes for which Python's own end would wait for it."""
    ((code, _), (failed, message)), seconds = failing((1,), *flags)
    assert code != 0 and failed == 1 and seconds < 100
    assert "record 5 cannot be read" in message and ("Traceback" in message) == bool(flags)


def test_processes_that_fail_alike_say_so_and_no_more():
    found, seconds = failing((0, 1))
    assert [code for code, _ in found] == [1, 1] and seconds < 60
    for _, message in found:
        (line,) = (line for line in message.splitlines() if "distributed.py" not in line)  # JAX's log
        assert line.startswith("error: ValueError: record 5 cannot be read")


TERMINATED = """
import os, signal
from clipmoe_jax.core import cli, distributed
distributed.initialize()
assert not distributed.preempted()
os.kill(os.getpid(), signal.SIGTERM)
while not distributed.preempted():
    pass
with cli.announced_preemption():
    raise distributed.Preempted("alone")
"""


def test_sigterm_reaches_a_single_process_that_joined_a_cluster_of_one():
    """As on a TPU slice of one host."""
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED],
        env=environment(1) | member(free_port(), 1, 0),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 75, done.stderr[-3000:]
    assert "alone: stopped by SIGTERM; start the same command again" in done.stdout


ON_MAIN = """
import os, signal, sys, threading, time
from clipmoe_jax.core import cli, distributed
distributed.initialize()
assert not distributed.preempted()
number = getattr(signal, sys.argv[1])

def fail():
    raise ValueError("a source that is not there")

def work():
    while not distributed.preempted():
        time.sleep(0.01)
    raise distributed.Preempted("data")

try:
    distributed.on_main("a check", fail)
except (ValueError, SystemExit) as error:
    print(repr(error))
print(distributed.on_main("an answer", lambda: {"pairs": 3}), flush=True)
if os.environ["CLIPMOE_PROCESS_ID"] == "1":  # which waits
    threading.Timer(0.5, os.kill, [os.getpid(), number]).start()
with cli.announced_preemption():
    distributed.on_main("data", work)
"""


@pytest.mark.parametrize(
    ("number", "code", "cause"),
    grid(("SIGTERM", 75, "SIGTERM"), rest=[("SIGINT", 130, "Ctrl-C")]),
)
def test_signal_to_a_process_that_waits_stops_the_one_that_works(number, code, cause):
    """As while process 0 prepares data. An error there ends the others without a word."""
    port, started = free_port(), []
    try:
        for i in range(2):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", ON_MAIN, number],
                    env=environment(1) | member(port, 2, i),
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=60)[0].splitlines() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [code, code], outputs
    told = f"data: stopped by {cause}; start the same command again to go on"
    assert outputs[0][:2] == ["ValueError('a source that is not there')", "{'pairs': 3}"]
    assert outputs[0][-1] == told
    assert outputs[1][:2] == ["SystemExit(1)", "{'pairs': 3}"] and told not in outputs[1]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--processes=0", "--processes: 0 is not a whole number from 1 on"),
        ("--devices=none", "--devices: none is not a whole number from 1 on"),
        ("--restarts=-1", "--restarts: -1 is not a whole number from 0 on"),
    ],
)
def test_numbers_that_local_py_cannot_use_are_refused(flag, message):
    command = [sys.executable, str(REPOSITORY / "launch" / "local.py"), flag, "--dry-run", "--", "--config=x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_dry_run_of_local_py_prints_the_command_of_each_process(tmp_path):
    command = [sys.executable, str(REPOSITORY / "launch" / "local.py"), "--processes=2", "--devices=4"]
    done = subprocess.run(
        [*command, "--dry-run", "--", "--config=configs/demo.py:small", "--workdir=two words"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and "CLIPMOE_PROCESS_ID=1" in lines[1]
    assert lines[0].endswith("-m clipmoe_jax.main --config=configs/demo.py:small '--workdir=two words'")
    assert "JAX_NUM_CPU_DEVICES=4" in lines[0]
    assert f"PYTHONPATH={REPOSITORY}" in lines[0]  # so that it works from any folder


@pytest.mark.parametrize(
    ("sent", "starts", "code"),
    [
        (["SIGTERM", "SIGTERM"], 2, 75),  # starts once more
        (["SIGINT"], 1, 130),
        (["SIGTERM", "SIGINT"], 2, 130),
    ],
    ids=str,
)
def test_signals_to_local_py_reach_the_run(tmp_path, sent, starts, code):
    (tmp_path / "clipmoe_jax").mkdir()
    (tmp_path / "clipmoe_jax" / "__init__.py").touch()
    (tmp_path / "clipmoe_jax" / "main.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "pathlib.Path(sys.argv[1]).open('a').write('started ')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "began").touch()
    command = [sys.executable, str(REPOSITORY / "launch" / "local.py"), "--restarts=1", "--", "began"]
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True) as process:
        for number, name in enumerate(sent, 1):
            while (tmp_path / "began").read_text() != 2 * number * "started ":
                time.sleep(0.05)
            os.killpg(process.pid, signal.Signals[name])
    assert process.returncode == code
    assert (tmp_path / "began").read_text() == 2 * starts * "started "


def test_failure_of_one_process_of_local_py_ends_the_others(tmp_path):
    """A wrong config: its one line is seen, and the code is that of the failure."""
    command = [sys.executable, str(REPOSITORY / "launch" / "local.py"), f"--logs={tmp_path}", "--"]
    done = subprocess.run(
        [*command, "--config=configs/demo.py:small", f"--workdir={tmp_path}/run", "--stage=nonsense"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(1),
        timeout=120,
    )
    assert done.returncode == 1
    assert "error: 'nonsense' is not a stage of this config" in done.stderr


RESTORED = """
import os, pathlib, sys
import numpy as np
from etils import epath
from clipmoe_jax.core import distributed, sharding
from clipmoe_jax.core.checkpoints import Checkpointer
from clipmoe_jax.train.step import TrainState

distributed.initialize()
mesh, folder = sharding.make_mesh(fsdp=2), epath.Path(sys.argv[1])

def state(value):
    kernel = np.random.default_rng(value).normal(size=(256, 256)).astype(np.float32)
    placed = sharding.put_param(mesh, "visual/resblocks_0/mlp/c_fc/kernel", kernel)
    tree = {"visual": {"resblocks_0": {"mlp": {"c_fc": {"kernel": placed}}}}}
    return TrainState(sharding.put_replicated(mesh, np.int32(0)), tree, tree)

with Checkpointer(folder, 2) as checkpointer:
    for step in (1, 2):
        checkpointer.save(step, state(step), {})
distributed.barrier("saved")
if distributed.is_main():
    files = pathlib.Path(folder, "2", "trainable").rglob("ocdbt.process_1/d/*")
    (largest,) = sorted(files, key=os.path.getsize)[-1:]
    os.truncate(largest, largest.stat().st_size // 2)
distributed.barrier("cut off")
with Checkpointer(folder, 2) as checkpointer:
    restored, _ = checkpointer.restore(state(0))
assert restored.step == 1, restored.step
for found, wanted in zip(
    restored.trainable["visual"]["resblocks_0"]["mlp"]["c_fc"]["kernel"].addressable_shards,
    state(1).trainable["visual"]["resblocks_0"]["mlp"]["c_fc"]["kernel"].addressable_shards,
):
    np.testing.assert_array_equal(found.data, wanted.data)
assert [path.name for path in folder.iterdir()] == ["1"]
"""


def test_checkpoint_that_one_process_cannot_read_gives_way_to_the_one_before(tmp_path):
    """Of parameters over two processes, whose shards are each in a file of its own."""
    found = two_processes(RESTORED, str(tmp_path / "checkpoints"))
    assert [code for code, _ in found] == [0, 0], found[0][1][-2000:]
