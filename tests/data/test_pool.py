"""Processes that share work, and messages on its progress."""

import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import Future

import pytest

from simplclip.common import progress
from simplclip.common.errors import UserError
from simplclip.common.progress import Progress
from simplclip.data.pool import cores, ordered, processes


def ended(pid, seconds=20):
    """Waits for a process; whether it ends in time."""
    for _ in range(seconds * 20):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(") ")[2][0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def pid_of(_):
    time.sleep(0.05)  # lets each process get some of the work
    return os.getpid()


def fail(word):
    raise ValueError(word)


def sleep_or_fail(seconds):
    time.sleep(seconds or 0.3)
    if not seconds:
        fail("word")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_order(count):
    with processes(count) as pool:
        assert [pair for pair in ordered(lambda i: pool.submit(divmod, i, 7), range(30), 5)] == [
            (i, divmod(i, 7)) for i in range(30)
        ]
        with pytest.raises(ValueError, match="word"):
            pool.submit(fail, "word").result()
    assert 1 <= cores() <= os.cpu_count()


def test_few_results_wait():
    started = []

    def submit(item):
        started.append(item)
        future = Future()
        future.set_result(None)
        return future

    results = ordered(submit, range(100), 4)
    next(results)
    assert started == [0, 1, 2, 3, 4]


def test_a_dead_process_is_a_users_error():
    with pytest.raises(UserError, match="a process died before its work was done"), processes(3) as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result()


def test_an_error_ends_running_work_at_once():
    began = time.monotonic()
    with pytest.raises(ValueError, match="word"), processes(2) as pool:
        list(pool.map(sleep_or_fail, [0, 60, 60, 60]))
    assert time.monotonic() - began < 30


def holder(pipe):
    with processes(2) as pool:
        pipe.send(list(pool.map(pid_of, range(8))))
        time.sleep(60)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processes_of_a_killed_one_end():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=holder, args=(theirs,))
    process.start()
    assert ours.poll(120)
    pids = set(ours.recv())
    assert len(pids) == 2
    process.kill()
    process.join()
    assert all(map(ended, pids))


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
    with Progress("shrink", 10_000, 1_000) as bar:
        bar.update(10)
        assert capsys.readouterr().err == ""  # work of a few seconds prints nothing
        clock.now += 10
        bar.update(490)
        assert capsys.readouterr().err == "shrink: 1,500 of 10,000 samples (15%), 50 samples/s, 02:50 left\n"
        clock.now += 5
        bar.update(1)
        assert capsys.readouterr().err == ""
        clock.now += 3600
        bar.update(1)
        clock.now += 30
        bar.update(1)  # after a while only one line a minute
        assert capsys.readouterr().err.count("\n") == 1
    assert capsys.readouterr().err == "shrink: 1,503 samples in 1:00:45\n"
    failing = Progress("shrink", 10)
    clock.now += 59
    failing.__exit__(ValueError)
    assert capsys.readouterr().err == ""  # unfinished work prints no last line


@pytest.mark.parametrize(
    ("total", "line"), [(None, "x: 5 images, 0.50 images/s"), (0, "x: 5 of 0 images (100%), 0.50 images/s")]
)
def test_lines_of_an_unknown_or_empty_total(clock, capsys, total, line):
    with Progress("x", total, unit="images") as bar:
        clock.now += 10
        bar.update(5)
    assert capsys.readouterr().err.startswith(line)
    with Progress("x", total, shown=False) as bar:
        clock.now += 10
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_and_lines_on_one_without_columns(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "fileno", lambda: 2)
        patch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((0, 0)))
        with Progress("x", 10) as bar:
            clock.now += 10
            bar.update(5)
    assert capsys.readouterr().err == "x: 5 of 10 samples (50%), 0.50 samples/s, 00:10 left\nx: 5 samples in 10 s\n"
    assert list(Progress("heads", 3, unit="steps").over("abc")) == list("abc")
    shown = capsys.readouterr().err
    assert "heads: 100%" in shown
    assert "3/3" in shown
