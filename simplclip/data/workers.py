"""Items of loader processes, and one error if a process dies or cannot send an item."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing import parent_process
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from simplclip.common.errors import UserError
from simplclip.data.errors import WorkerError

Items = Callable[[int, int], Iterator[Any]]  # the items of worker i of n, with 0 of 1 for this process


def from_workers(items: Items, workers: int, pin_memory: bool = False) -> Generator[Any, None, None]:
    """Yields the items of each of `workers` processes in turn; with 0 those of this process.

    Raises a user's errors without the worker's traceback, and WorkerError if a process cannot send an item or died; that is
    noticed within 5 seconds, and never while the caller uses an item. The processes end within seconds of this one.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": 2, "worker_init_fn": _start}
        options |= {"multiprocessing_context": "fork"} if sys.platform == "linux" else {}
    former = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        former = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # that there are fewer cores than processes
        # Without its own generator the DataLoader would draw from the caller's global generator.
        loader = DataLoader(_Items(items), batch_size=None, collate_fn=_unchanged, generator=torch.Generator(), **options)
        iterator: Any = iter(loader)
    # torch's handler would raise wherever the main thread is when a process dies, e.g. in the middle of an optimizer's update
    # or of writing a checkpoint. torch also looks for dead processes whenever it waits for an item.
    if former is not None:
        signal.signal(signal.SIGCHLD, former)
    try:
        for item in iterator:
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, UserError) or not workers or not _died(error):
            raise
        raise WorkerError(
            f"data.workers: a loader process died: {str(error) or repr(error)}. A system that runs out of memory kills "
            "processes; fewer data.workers or a smaller batch need less"
        ) from error
    finally:
        if workers:  # torch has no public method for this
            ended = any(queue._close and not queue._close.still_active() for queue in iterator._index_queues)
            if ended and not pin_memory and not sys.is_finalizing():  # torch's thread for pinning needs whole messages
                # The garbage collector has ended the queues, so that no process would be told to end, and each waited for.
                for process in iterator._workers:
                    process.kill()
            iterator._shutdown_workers()


class _Items(IterableDataset):
    def __init__(self, items: Items) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            yield from self.items(*((info.id, info.num_workers) if info else (0, 1)))
        except UserError as error:
            yield error


def _unchanged(item: Any) -> Any:
    return item


def _died(error: Exception) -> bool:
    """Whether an error says that a loader process died, perhaps while it sent a batch."""
    cut_off = isinstance(error, (EOFError, ConnectionError, FileNotFoundError)) and "in DataLoader worker" not in str(error)
    return cut_off or str(error).startswith("DataLoader worker")


def _start(worker: int) -> None:
    # Ctrl-C, and SIGTERM at the end of a job, reach all processes; the trainer needs a batch to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """Ends this process when its parent sends SIGTERM or has ended. DataLoader looks only between two items."""
    parent: Any = parent_process()
    while os.getppid() == parent.pid:
        received = signal.sigtimedwait([signal.SIGTERM], 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _send_error(queue: Any, error: Exception, message: tuple[int, Any]) -> None:
    """Sends an error in place of an item that cannot be sent, for which the parent would wait without end."""
    queue.put((message[0], WorkerError(f"data.workers: a loader process cannot send an item: {error!r}")))
