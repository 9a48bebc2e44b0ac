"""Items of loader processes. Errors about dead processes are raised between two batches only.

If a loader process dies, torch's SIGCHLD handler raises an error wherever the main thread is, e.g. in the middle of an
optimizer's update or of writing a checkpoint.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from simplclip.common.errors import UserError
from simplclip.data.broken import ShardError

_CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # Windows has none
_open: set[Any] = set()  # iterators with processes
_former: Callable | None = None  # torch's handler, after ours has replaced it
_holders = 0  # open blocks of `undisturbed`
_missed = False  # whether SIGCHLD came within such a block
_waiting = False  # whether `_following` waits for an item, so that an error may be raised


class WorkerError(UserError, RuntimeError):
    """A loader process died; the message says how."""


def from_workers(dataset: IterableDataset, workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """Yields the items of a data set from each of `workers` processes in turn; with 0 from this process.

    A ShardError that the data set yields is raised here. If the data set raised it, it would have the worker's traceback.
    Raises WorkerError if a process died, but never while the caller uses an item.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": _start}
        options |= {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}
    # Without its own generator the DataLoader would draw from the caller's global generator in every epoch.
    loader = DataLoader(dataset, batch_size=None, collate_fn=_unchanged, generator=torch.Generator(), **options)
    iterator: Any = iter(loader)
    _open.add(iterator)
    with undisturbed(report=False):
        try:
            while (item := _following(iterator)) is not None:
                if isinstance(item, ShardError):
                    raise item
                yield item
        except (RuntimeError, EOFError, OSError) as error:
            if not workers or not _died(error):
                raise
            raise WorkerError(
                f"data.workers: a loader process died before its epoch ended: {_end(iterator) or repr(error)}. A system that "
                "runs out of memory kills processes; fewer data.workers or a smaller batch need less"
            ) from error
        finally:
            # Done here, and `_open` keeps the iterator until then: the garbage collector would close the iterator's queues
            # first, and the iterator would then wait 5 seconds for each process. torch has no public method for this.
            _open.discard(iterator)
            if workers:
                iterator._shutdown_workers()


def _unchanged(item: Any) -> Any:
    return item


@contextmanager
def undisturbed(report: bool = True) -> Iterator[None]:
    """Delays errors about dead loader processes to the end of the block, or drops them unless `report`."""
    global _former, _holders, _missed
    # The handler stays, as torch's does: generators end in any order and thread, but only the main thread may set handlers.
    current = signal.getsignal(_CHILD_ENDED) if _CHILD_ENDED else None
    if _former is None and callable(current) and threading.current_thread() is threading.main_thread():
        _former = current
        signal.signal(_CHILD_ENDED, _handle)
    _holders += 1
    try:
        yield
    finally:
        _holders -= 1
    if _missed and not _holders:
        _missed = False
        if report:
            _former(_CHILD_ENDED, None)


def _following(iterator: Iterator) -> Any:
    """Returns the next item of a DataLoader's iterator, None at its end. Errors are raised at once, despite `undisturbed`.

    If another iterator is open, the dead process may be its own: then torch's check of this iterator every 5 seconds decides.
    """
    global _missed, _waiting
    _waiting = _holders == 1
    try:
        if _missed and _waiting:
            _missed = False
            _former(_CHILD_ENDED, None)
        return next(iterator, None)
    finally:
        _waiting = False


def _died(error: Exception) -> bool:
    """Whether an error of `_following` says that a loader process died, perhaps while it sent a batch."""
    cut_off = isinstance(error, (EOFError, ConnectionError, FileNotFoundError)) and "in DataLoader worker" not in str(error)
    return cut_off or str(error).startswith("DataLoader worker")


def _end(iterator: Any) -> str:
    """Returns how a process of an iterator died, "" if it is not known."""
    codes = []
    for process in iterator._workers:
        process.join(0.2)
        codes.append(process.exitcode)
    code = next((code for code in codes if code), None)
    if code is None:
        return ""
    return f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _handle(number: int, frame) -> None:
    global _missed, _waiting
    if _holders and not _waiting:
        _missed = True
    else:
        _waiting = False  # raises only once
        _former(number, frame)


def _start(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer still needs a batch to finish its step.
    # DataLoader itself caps torch's threads at one and ends its workers with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
