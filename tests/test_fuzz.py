"""Damaged files of every format end in a result or a line: the first cases of `benchmarks.fuzz`, and that it
sees what it looks for.
"""

import contextlib
import socket
import sys
import time

import pytest
from grids import grid

from benchmarks import fuzz

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's threads


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    fuzz.make_examples(folder)
    return folder


@pytest.mark.parametrize("first", grid(0, rest=(200, 400)))
def test_damaged_files_are_read_or_told(examples, first):
    lines = [fuzz.run_case(seed, examples) for seed in range(first, first + 200)]
    assert [line for line in lines if line["outcome"] in fuzz.FAULTS] == []
    assert len({line["format"] for line in lines}) > 30
    assert min(sum(line["outcome"] == outcome for line in lines) for outcome in ("read", "told")) > 50


def write_outside(folder):
    (folder.parent.parent / "escaped").write_text("")


def connect(folder):
    with contextlib.suppress(OSError), socket.socket() as opened:
        opened.connect(("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda folder: None, "read"),
        (lambda folder: (folder / "inside").write_text(""), "read"),
        (lambda folder: (folder / "gone").read_text(), "told"),
        (lambda folder: 1 // 0, "trace"),
        (write_outside, "escaped"),
        (connect, "escaped"),
    ],
)
def test_outcomes_are_told_apart(tmp_path, monkeypatch, read, outcome):
    monkeypatch.setattr(fuzz, "FORMATS", {"it": fuzz.Format(lambda folder: None, read)})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "file").write_bytes(b"contents")
    assert fuzz.run_case(7, tmp_path)["outcome"] == outcome


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("time.sleep(60)", "hang"),
        ("x = b'x' * 300_000_000; time.sleep(60)", "blow-up"),
        ("exit(3)", "blow-up"),
    ],
)
def test_workers_that_hang_grow_or_die_are_ended(monkeypatch, code, outcome):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5 if outcome == "hang" else 60)
    monkeypatch.setattr(fuzz, "GIGABYTES", 0.2)
    program = f"import time; print('ready', flush=True); input(); {code}"
    worker = fuzz.Worker([sys.executable, "-c", program])
    worker.start(5)
    line = None
    while line is None:
        time.sleep(0.05)
        line = worker.check() if worker.is_alive() else worker.result()
    assert line["outcome"] == outcome and line["seed"] == 5 and not worker.is_alive()
