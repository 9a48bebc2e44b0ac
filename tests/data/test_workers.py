"""Loader processes: signals, the death of a worker or its parent."""

import functools
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from simplclip.data.workers import from_workers
from support.data.pairs import loader, resize, sample, take, write
from support.programs import forked
from support.train.runs import bits


@pytest.fixture
def pattern(tmp_path):
    """Writes two shards."""
    for shard in (0, 10):
        write(tmp_path / f"train-{shard}.tar", [sample(i) for i in range(shard, shard + 10)])
    return str(tmp_path / "train-*.tar")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_leaves_workers_to_the_trainer(pattern, number):
    def interrupt(image):
        os.kill(os.getpid(), number)
        return resize(image)

    assert len(take(loader(pattern, workers=1, transform=interrupt), 4)) == 4


def die_and_go_on(pattern):
    whole = take(loader(pattern, workers=1, batch_size=1), 12)
    reader = loader(pattern, workers=1, batch_size=1)
    found = []

    def read_and_kill():
        for batch in reader:
            found.append(batch)
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    # OSError or EOFError where the worker ends while it hands a tensor over
    with pytest.raises((RuntimeError, OSError, EOFError)):
        read_and_kill()
    assert bits(found) == bits(whole[: len(found)])
    again = loader(pattern, reader.state_dict(), workers=1, batch_size=1)
    assert bits(take(again, 12 - len(found))) == bits(whole[len(found) :])


def test_after_the_death_of_a_worker_another_loader_goes_on(pattern):
    """In a fork: DataLoader's error comes with each signal of a child from then on."""
    assert forked(functools.partial(die_and_go_on, pattern)) == 0


def endless(worker, workers):
    yield worker
    time.sleep(600)  # in place of a large batch


def receive(pids):
    received = from_workers(endless, 2)
    next(received), next(received)
    for process in multiprocessing.active_children():
        pids.send(process.pid)
    next(received)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_with_their_parent():
    """Which was killed, and left them no time to finish an item."""
    pids, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=receive, args=(sender,))
    parent.start()
    workers = [pids.recv(), pids.recv()]
    assert all(map(is_running, workers))
    parent.kill()
    end = time.monotonic() + 10
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.1)
