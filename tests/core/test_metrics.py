"""Progress bars. tests/core/test_paths.py has metrics in a bucket."""

import sys

import pytest

from clipmoe_jax.core import distributed, metrics


def work():
    with metrics.progress_bar("decoding", total=3, unit="image", initial=1) as bar:
        bar.update(2)


def test_progress_bar_is_silent_in_a_log_file(capsys):
    work()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_main", [True, False])
def test_progress_bar_shows_on_a_terminal_of_the_main_process(monkeypatch, capsys, is_main):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: is_main)
    work()
    shown = capsys.readouterr().err
    assert ("decoding" in shown and "3/3" in shown) if is_main else shown == ""
