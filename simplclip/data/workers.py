"""Items of loader processes, and one error if a process dies or cannot send an item.

A process may be killed at any moment: the caller waits for no lock that it may hold and for no half
of a message.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterator
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from simplclip.common.errors import UserError
from simplclip.data.errors import WorkerError

Item = TypeVar("Item")
# function of a worker's number and the number of workers, 0 and 1 in this process
Items = Callable[[int, int], Iterator[Item]]


def from_workers(
    items: Items[Item], workers: int, pin_memory: bool = False
) -> Generator[Item, None, None]:
    """Starts `workers` processes and yields their items, one of each in turn.

    With 0 workers `items` is called in this process. pin_memory: copy tensors to page-locked
    memory. Raises a user's errors without the worker's traceback, and WorkerError if a process
    cannot send an item or died; that is noticed within 5 seconds, and never while the caller uses
    an item. The processes end with the generator, and within seconds of this process.
    """
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
    if workers:
        method = "fork" if sys.platform == "linux" else None
        context: Any = copy.copy(multiprocessing.get_context(method))
        context.Event = _Event
        options |= {
            "prefetch_factor": 2,
            "worker_init_fn": _set_up_loader,
            "multiprocessing_context": context,
        }
    former = None
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        former = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # torch warns of more processes than cores
        warnings.filterwarnings("ignore", "This DataLoader will create")
        # Without its own generator the DataLoader would draw from the caller's global generator.
        loader = DataLoader(
            _Items(items),
            batch_size=None,
            collate_fn=_identity,
            generator=torch.Generator(),
            **options,
        )
        iterator: Any = iter(loader)
    # torch's handler would raise wherever the main thread is when a process dies, e.g. in the
    # middle of an optimizer's update or of writing a checkpoint. torch also looks for dead
    # processes whenever it waits for an item.
    if former is not None:
        signal.signal(signal.SIGCHLD, former)
    try:
        for message in iterator:
            item = _unpack(message) if workers else message
            if isinstance(item, UserError):
                raise item
            yield item
    except (RuntimeError, EOFError, OSError) as error:
        if isinstance(error, UserError) or not workers or not _died(error):
            raise
        raise WorkerError(
            f"data.workers: a loader process died: {str(error) or repr(error)}. A system that runs "
            "out of memory kills processes; fewer data.workers or a smaller batch need less"
        ) from error
    finally:
        if workers:
            _shut_down(iterator, pin_memory)


def _shut_down(iterator: Any, pin_memory: bool) -> None:
    """Ends the processes of a DataLoader's iterator; torch has no public method for it."""
    queues_ended = any(
        queue._close and not queue._close.still_active() for queue in iterator._index_queues
    )
    # torch's thread for pinning needs whole messages
    if queues_ended and not pin_memory and not sys.is_finalizing():
        # The garbage collector has ended the queues: torch could not tell the processes to end, and
        # would wait for each.
        for process in iterator._workers:
            process.kill()
    iterator._shutdown_workers()


class _Items(IterableDataset):
    def __init__(self, items: Items) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        """Yields this process's items; in a loader process as messages of `_pack`."""
        info = get_worker_info()
        if info is None:
            yield from self.items(0, 1)
            return
        try:
            for item in self.items(info.id, info.num_workers):
                yield _pack(item)
        except UserError as error:
            yield _pack(error)


Message = tuple[list[torch.Tensor], torch.Tensor]


def _pack(item: object) -> Message:
    """Returns the message of an item: its tensors, and the pickle of the rest as uint8."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, pickle.HIGHEST_PROTOCOL)
    try:
        pickler.dump(item)
    except Exception as error:
        raise _not_sent(error) from error
    return pickler.tensors, torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def _unpack(message: Message) -> Any:
    """Returns the item of a message that `_pack` made."""
    tensors, pickled = message
    unpickler = pickle.Unpickler(io.BytesIO(pickled.numpy().tobytes()))
    unpickler.persistent_load = tensors.__getitem__  # type: ignore[method-assign]
    return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: object) -> int | None:
        """Appends a tensor to `tensors` and returns its index; None for a value that is pickled."""
        if type(value) is not torch.Tensor:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Event:
    """multiprocessing.Event without the lock, which a process that is killed may hold for ever."""

    def __init__(self) -> None:
        self._value = RawValue("b", 0)

    def is_set(self) -> bool:
        """Whether `set` was called, in any process."""
        return bool(self._value.value)

    def set(self) -> None:
        """Sets the event for all processes that share it."""
        self._value.value = 1


def _identity(item: Item) -> Item:
    """Returns `item`: the collate_fn of items that are batches already."""
    return item


def _died(error: Exception) -> bool:
    """Whether an error says that a loader process died, perhaps while it sent a batch."""
    message = str(error)
    if message.startswith("DataLoader worker"):
        return True
    cut_off = isinstance(error, (EOFError, ConnectionError, FileNotFoundError))
    return cut_off and "in DataLoader worker" not in message


def _set_up_loader(worker: int) -> None:
    """Sets up signals, errors and the end of a loader process."""
    # Ctrl-C, and SIGTERM at the end of a job, reach all processes; but the trainer needs a batch to
    # finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]


def _end_with_parent() -> None:
    """Ends this process with its parent, which DataLoader looks for only between two items."""
    parent: Any = multiprocessing.parent_process()
    while os.getppid() == parent.pid:
        received = signal.sigtimedwait([signal.SIGTERM], 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _send_error(queue: Queue, error: Exception, message: tuple[int, object]) -> None:
    """Sends an error in place of an item, for which the parent would wait for ever."""
    queue.put((message[0], _pack(_not_sent(error))))


def _not_sent(error: Exception) -> WorkerError:
    """Returns the WorkerError for an item that cannot be sent because of `error`."""
    return WorkerError(f"data.workers: a loader process cannot send an item: {error!r}")
