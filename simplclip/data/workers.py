"""Items of loader processes, and one error if a process dies."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from simplclip.common.errors import UserError
from simplclip.data.errors import WorkerError

_CHILD_ENDED = getattr(signal, "SIGCHLD", None)  # Windows has none


def from_workers(dataset: IterableDataset, workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """Yields the items of a data set from each of `workers` processes in turn; with 0 from this process.

    An error for users that the data set yields is raised here. If it raised it, it would have the worker's traceback.
    Raises WorkerError if a process died; it is noticed within 5 seconds, and never while the caller uses an item.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": _start}
        options |= {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}
    # Without its own generator the DataLoader would draw from the caller's global generator.
    loader = DataLoader(dataset, batch_size=None, collate_fn=_unchanged, generator=torch.Generator(), **options)
    iterator: Any = _iterator(loader)
    try:
        for item in iterator:
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, UserError) or not workers or not _died(error):
            raise
        raise WorkerError(
            f"data.workers: a loader process died: {_end(iterator) or repr(error)}. A system that runs out of memory kills "
            "processes; fewer data.workers or a smaller batch need less"
        ) from error
    finally:
        if workers:  # the garbage collector would wait 5 seconds for each process; torch has no public method for this
            iterator._shutdown_workers()


def _iterator(loader: DataLoader) -> Iterator[Any]:
    """Starts the loader's processes without torch's handler of SIGCHLD.

    The handler would raise wherever the main thread is when a process dies, e.g. in the middle of an optimizer's update or of
    writing a checkpoint. torch also looks for dead processes whenever it waits for an item.
    """
    if _CHILD_ENDED is None or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    former = signal.getsignal(_CHILD_ENDED)
    try:
        return iter(loader)
    finally:
        signal.signal(_CHILD_ENDED, former)


def _unchanged(item: Any) -> Any:
    return item


def _died(error: Exception) -> bool:
    """Whether an error says that a loader process died, perhaps while it sent a batch."""
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


def _start(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the trainer still needs a batch to finish its step.
    # DataLoader itself caps torch's threads at one and ends its workers with the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
