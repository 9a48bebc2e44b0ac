"""Progress of long commands: lines in a log, a bar on a terminal."""

import sys

import pytest

from simplclip.common import progress
from simplclip.common.progress import Progress


class Clock:
    """A clock that moves only when a test moves it."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


def test_lines_without_a_terminal(clock, capsys):
    with Progress("pack", 10_000, 1_000) as bar:
        bar.update(10)
        assert capsys.readouterr().err == ""  # work of a few seconds prints nothing
        clock.now += 10
        bar.update(490)
        assert (
            capsys.readouterr().err
            == "pack: 1,500 of 10,000 samples (15%), 50 samples/s, 2:50 left\n"
        )
        clock.now += 5
        bar.update(1)
        assert capsys.readouterr().err == ""
        clock.now += 3600
        bar.update(1)
        clock.now += 30
        bar.update(1)  # after a while only one line a minute
        assert capsys.readouterr().err.count("\n") == 1
    assert capsys.readouterr().err == "pack: 1,503 samples in 1:00:45\n"
    failing = Progress("pack", 10)
    clock.now += 59
    failing.__exit__(ValueError)
    assert capsys.readouterr().err == ""  # unfinished work prints no last line


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_bar_on_a_terminal_and_lines_on_one_that_cannot_draw(clock, monkeypatch, capsys, term):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    with Progress("[heads]", 30, unit="steps") as bar:
        bar.update(10)
        clock.now += 10
        bar.update(20)
    shown = capsys.readouterr().err
    if term == "dumb":
        line = "[heads]: 30 of 30 steps (100%), 3.00 steps/s, 0 s left\n"
        assert shown == f"{line}[heads]: 30 steps in 10 s\n"
    else:
        assert "[heads]: 30 of 30 steps (100%), 3.00 steps/s, 0 s left" in shown
