"""Loader processes: how they start, and that the death of one is told between two batches only.

torch tells of a loader process that died by an error that its SIGCHLD handler raises, wherever the main thread is just then:
in the middle of an optimizer's update, or of writing a checkpoint.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # Windows has none
_former: Callable | None = None  # torch's handler, once ours stands before it
_holders = 0
_missed = False


@contextmanager
def undisturbed(tell: bool = True) -> Iterator[None]:
    """Within the block no error about a dead loader process is raised; after a block without an error it is, if `tell`."""
    global _holders, _missed
    _install()
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1
    if _missed and not _holders:
        _missed = False
        if tell:
            _former(_CHILD_ENDED, None)


def _install() -> None:
    # Once and for good, as torch's own: generators end in any order and thread, and handlers may be set in the main one only.
    global _former
    if _former is None and _CHILD_ENDED and threading.current_thread() is threading.main_thread():
        current = signal.getsignal(_CHILD_ENDED)
        if callable(current):
            _former = current
            signal.signal(_CHILD_ENDED, _handle)


def _handle(number: int, frame) -> None:
    global _missed
    if _holders:
        _missed = True
    else:
        _former(number, frame)


def start_worker(worker: int) -> None:
    """The first thing that a loader process does."""
    # Ctrl-C reaches the whole process group; the trainer must still get its batch to stop in an orderly way.
    # DataLoader itself caps torch's threads at one and ends its workers with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
