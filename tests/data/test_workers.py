"""Loader processes: signals, items that cannot be sent, the death of a worker or its parent."""

import collections
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from simplclip import data
from simplclip.data.workers import from_workers
from support.data.pairs import keys, loader, png, resize, sample, take, write
from support.train.runs import bits

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument")


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


def test_a_worker_that_dies_ends_the_loader_while_it_waits_and_not_before(pattern, often):
    """The trainer has the last batch's state then, from which another loader goes on."""
    whole = take(loader(pattern, workers=1, batch_size=1), 12)
    reader = loader(pattern, workers=1, batch_size=1)
    batches = iter(reader)
    found = [next(batches)]
    (victim,) = multiprocessing.active_children()
    os.kill(victim.pid, signal.SIGKILL)
    end = time.monotonic() + 1
    while time.monotonic() < end:  # an error would be raised here by torch's handler of SIGCHLD
        pass
    with pytest.raises(data.WorkerError, match="a loader process died: .*fewer data.workers"):
        found += list(batches)
    assert bits(found) == bits(whole[: len(found)])
    again = loader(pattern, reader.state_dict(), workers=1, batch_size=1)
    assert bits(take(again, 12 - len(found))) == bits(whole[len(found) :])
    assert not multiprocessing.active_children()


def test_a_json_of_any_depth_is_read_or_counted(tmp_path):
    """Of a depth from 495 to 970 Python reads a json that it cannot send to another process."""
    samples = []
    for depth in (99, 100, 300, 600, 900, 5000):
        deep = b'{"caption": "deep", "x": ' + b"[" * depth + b"]" * depth + b"}"
        samples.append((str(depth), {"png": png(), "json": deep}))
    path = write(tmp_path / "a.tar", [*samples, sample(1)])
    reader = loader(path, workers=1, batch_size=1)
    assert sorted(keys(take(reader, 6))) == [*3 * ["99"], *3 * ["k001"]]
    assert {*reader.skipped.counts} == {"bad json"}
    assert reader.skipped.counts["bad json"] >= 5 * 2


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize(
    ("item", "message"),
    [(lambda: None, ".*pickle"), (torch.ones(1, requires_grad=True) * 2, ".*requires_grad")],
    ids=["function", "tensor of a graph"],
)
def test_an_item_that_cannot_be_sent_is_an_error(pin_memory, item, message):
    received = from_workers(lambda worker, workers: iter(["first", item, "third"]), 1, pin_memory)
    assert next(received) == "first"
    message = f"data.workers: a loader process cannot send an item: {message}"
    with pytest.raises(data.WorkerError, match=message):
        next(received)


def test_items_arrive_as_they_were_sent():
    """Also those with a tensor twice, a view, and records larger than a pipe."""
    table = torch.arange(12.0).reshape(3, 4)
    sent = {
        "view": table[:, 1],
        "again": [table, table],
        "empty": torch.empty(0),
        "meta": ["x" * 300_000],
        "count": 3,
    }
    received = list(from_workers(lambda worker, workers: iter([sent]), 1))
    assert bits(received) == bits([sent])


def killed_while_it_sends(worker, workers):
    yield "first"
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        yield "x" * 1_000_000  # more than a pipe holds


def killed_with_a_lock(worker, workers):
    yield "first"
    time.sleep(0.5)  # until it is sent
    frame = sys._getframe()
    while "done_event" not in frame.f_locals:  # torch's event, which it asks between two items
        frame = frame.f_back
    lock = getattr(frame.f_locals["done_event"], "_cond", None)
    if lock is not None:
        lock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    yield


@pytest.fixture
def often(monkeypatch):
    """torch waits half a second, not five, for a process that may have died."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.5,))


@pytest.mark.parametrize("items", [killed_while_it_sends, killed_with_a_lock])
def test_a_killed_worker_ends_the_loader_wherever_it_was(items, often):
    def overdue(signum, frame):
        pytest.fail("the loader waits for a process that was killed")

    former = signal.signal(signal.SIGALRM, overdue)
    # again, since torch waits once more where it ends its processes
    signal.setitimer(signal.ITIMER_REAL, 20, 5)
    try:
        received = from_workers(items, 2)
        next(received)
        time.sleep(1)
        with pytest.raises(data.WorkerError, match="a loader process died"):
            collections.deque(received, maxlen=0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def endless(worker, workers):
    for number in itertools.count():
        yield number
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


def test_an_iterator_that_is_dropped_ends_workers_that_are_busy(often):
    received, began = from_workers(endless, 1), time.monotonic()
    next(received)
    (worker,) = multiprocessing.active_children()
    time.sleep(1)  # it has begun the next item
    received.close()
    worker.join(30)
    assert not worker.is_alive()
    assert time.monotonic() - began < 60
