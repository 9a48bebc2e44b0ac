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
            == "pack: 1,500 of 10,000 samples (15%), 50 samples/s, 02:50 left\n"
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
        bar.update(10)
        clock.now += 0.05
        bar.update(10)
    shown = capsys.readouterr().err
    if term == "dumb":
        assert shown == (
            "[heads]: 20 of 30 steps (67%), 2.00 steps/s, 00:05 left\n[heads]: 30 steps in 10 s\n"
        )
        return
    lines = [line for line in shown.split("\r") if "\x1b[2K" in line]  # each replaces the former
    assert [line.count("\n") for line in lines] == [0] * (len(lines) - 1) + [1]
    assert "0 of 30" in lines[0]
    assert "20 of 30 steps (67%), 2.00 steps/s" in shown
    assert "[heads]: 30 of 30 steps (100%), 2.99 steps/s, 00:00 left" in lines[-1]
