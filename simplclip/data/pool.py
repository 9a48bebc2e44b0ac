"""Pools of processes for work that holds Python's global lock, such as resizing images. The processes write no files."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from simplclip.common import ranks
from simplclip.common.errors import InputError, UserError

Item = TypeVar("Item")


class ProcessError(UserError, RuntimeError):
    """A process of a pool died."""


def cores() -> int:
    """Returns the number of cores that this process may use. The ranks of a machine share its cores."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // ranks.on_this_host())


@contextlib.contextmanager
def processes(count: int | None = None) -> Iterator[Executor]:
    """Context with an executor of `count` processes, by default one for each core. For 1 it is a thread of this process.

    The processes start before the block does, so that they inherit no lock which the block holds. They end with this process,
    even if it is killed. Raises ProcessError if one of the processes dies.
    """
    if count is not None and count < 1:
        raise InputError(f"workers: expected an integer of at least 1, got {count}")
    count = count or cores()
    if count == 1:
        with ThreadPoolExecutor(1) as pool:
            yield pool
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    # Closing our end of the pipe tells the processes to end. An Event has a lock, which a killed process could hold for ever.
    theirs, ours = context.Pipe(duplex=False)
    with ProcessPoolExecutor(count, context, _start, (theirs, ours)) as pool, theirs:
        pool.submit(os.getpid).result()
        try:
            yield pool
        except BrokenProcessPool as error:
            ours.close()
            raise ProcessError(
                "workers: a process died before its work was done (out of memory, the system kills processes); "
                "the same command goes on where it was"
            ) from error
        except BaseException:
            ours.close()
            raise
    ours.close()


def ordered(submit: Callable[[Item], Future], items: Iterable[Item], ahead: int) -> Iterator[tuple[Item, Any]]:
    """Yields the items in order with the results of their futures. Up to `ahead` later items are submitted meanwhile."""
    waiting: deque[tuple[Item, Future]] = deque()
    for item in items:
        waiting.append((item, submit(item)))
        if len(waiting) > ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def _start(theirs: Connection, ours: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its processes
    torch.set_num_threads(1)

    ours.close()  # this process's copy; the parent closes its own, at the latest when it dies

    def watch() -> None:
        theirs.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
