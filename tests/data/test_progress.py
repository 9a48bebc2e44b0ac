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


@pytest.mark.parametrize("term", ["xterm", "dumb", None])
def test_a_bar_on_a_terminal_and_lines_elsewhere(clock, monkeypatch, capsys, term):
    if term:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("TERM", term)
    with Progress("[heads]", 10_000, 1_000, unit="steps") as bar:
        bar.update(10)
        assert "1010/10000" not in capsys.readouterr().err
        clock.now += 10
        bar.update(490)
        shown = capsys.readouterr().err
        assert all(word in shown for word in ("[heads]", "1500/10000", " steps "))
        clock.now += 3600
        bar.update(1)
        clock.now += 30
        bar.update(1)  # in a log, after a while only a line a minute
        assert ("1502" in capsys.readouterr().err) == (term == "xterm")
    assert (capsys.readouterr().err == "") == (term != "xterm")
    with Progress("pack", shown=False) as bar:
        clock.now += 3600
        bar.update(10)
    assert capsys.readouterr().err == ""
