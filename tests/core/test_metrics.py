"""Progress bars. tests/core/test_paths.py has metrics in a bucket."""

import gzip
import importlib
import json
import sys
import threading
import types

import jax
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from clipmoe_jax.core import distributed, metrics


def work():
    with metrics.progress_bar("decoding", total=3, unit="image", initial=1) as bar:
        bar.update(2)


def test_numbers_reach_tensorboard_from_the_callers_thread(tmp_path):
    """A thread of its own would end on a full disk, and whoever adds numbers would wait for ever."""
    threads = threading.active_count()
    run = metrics.Metrics(epath.Path(tmp_path))
    run.log("mcl_1", 3, {"loss": 0.5})
    run.log("mcl_1", 4, {"loss": 0.25})
    run.log("mcl_2", 4, {"loss": 0.125})
    run.log_scores("mcl_1", 4, {"recall/image_to_text_r1": 0.75})
    assert threading.active_count() == threads
    run.close()
    numbers = {}
    for folder in (tmp_path / "tensorboard").iterdir():  # TensorBoard draws a tag of all folders as one chart
        [file] = folder.iterdir()
        events = list(tfrecords(file.read_bytes()))
        numbers[folder.name] = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert numbers == {
        "mcl_1": [(3, "loss", 0.5), (4, "loss", 0.25), (4, "recall/image_to_text_r1", 0.75)],
        "mcl_2": [(4, "loss", 0.125)],
    }


class WandB(types.ModuleType):
    """The part of wandb's interface that a run uses: what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.opened, self.axes, self.logged, self.finished = [], {}, [], 0

    def init(self, *, project, name, id, resume, config, dir=None):
        self.opened.append((project, name, id, resume, config, dir))
        return self

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, data):
        self.logged.append(data)

    def finish(self):
        self.finished += 1


def test_numbers_reach_weights_and_biases_where_a_project_is_named(tmp_path, monkeypatch):
    """A resumed run goes on in the run of before. Steps of a phase are its own axis: they begin anew."""
    wandb = WandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (3, 4):
        run = metrics.Metrics(epath.Path(tmp_path / "run"), wandb="scenes", config={"seed": 1})
        run.log("mcl_1", step, {"loss": 0.5})
        run.log_scores("mcl_2", step, {"recall/image_to_text_r1": 0.75})
        run.close()
    first, second = wandb.opened
    where = str(tmp_path / "run")
    assert first == second == ("scenes", "run", first[2], "allow", {"seed": 1}, where) and first[2]
    assert wandb.axes == {"mcl_1/*": "mcl_1/step", "mcl_2/*": "mcl_2/step"} and wandb.finished == 2
    assert wandb.logged[2:] == [
        {"mcl_1/step": 4, "mcl_1/loss": 0.5},
        {"mcl_2/step": 4, "mcl_2/recall/image_to_text_r1": 0.75},
    ]


def test_weights_and_biases_that_is_not_installed_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="^wandb=scenes needs the package wandb: pip install wandb$"):
        metrics.Metrics(epath.Path(tmp_path), wandb="scenes")


def test_steps_are_traced_for_perfetto(tmp_path):
    run = metrics.Metrics(epath.Path(tmp_path), profiled=range(1, 3))
    for phase, num_steps in (("mcl_1", 4), ("mcl_2", 2)):  # the second ends within the trace
        for step in range(num_steps):
            run.profile(phase, step, running=jax.numpy.ones(2))
            assert run._traces == (step in (1, 2))
            jax.numpy.ones(8).sum().block_until_ready()
        run.end_profile()
    run.close()
    for phase in ("mcl_1", "mcl_2"):
        [trace] = (tmp_path / "profile" / phase).rglob("perfetto_trace.json.gz")
        assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]


def tfrecords(content: bytes):
    """Events of a file: each 8 bytes of length, 4 of checksum, itself, 4 of checksum."""
    while content:
        length = int.from_bytes(content[:8], "little")
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_full_disk_ends_the_run_where_numbers_are_written(tmp_path, monkeypatch):
    run = metrics.Metrics(epath.Path(tmp_path))
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", -1)  # writes all at once
    (tmp_path / "full").symlink_to("/dev/full")
    run._sinks[0].file("mcl_1")._py_recordio_writer._writer = (tmp_path / "full").open("wb")
    with pytest.raises(OSError, match="No space left on device"):
        run.log("mcl_1", 3, {"loss": 0.5})


def test_progress_bar_is_silent_in_a_log_file(capsys):
    work()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_main", [True, False])
def test_progress_bar_shows_on_a_terminal_of_the_main_process(monkeypatch, capsys, is_main):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: is_main)
    work()
    shown = capsys.readouterr().err
    assert ("decoding" in shown and "1/3" in shown) if is_main else shown == ""
    assert not shown.rpartition("\r")[0].rpartition("\r")[2].strip()  # and leaves nothing behind
