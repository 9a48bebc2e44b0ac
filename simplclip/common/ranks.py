"""The ranks of a command that torchrun started, which exchange Python objects.

join            a context in which there are ranks; elsewhere there is one
fail_together   a context that all ranks leave, or in which all end
on_first        a call on the first rank, whose result all get
all_gather      the values of all ranks, on each of them
gather_to_first, map_to_first   items of all ranks, on the first one
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain, islice
from typing import Any, TypeVar, TypeVarTuple

import torch
import torch.distributed as dist

from simplclip.common import hardware
from simplclip.common.errors import UserError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

_objects: Any = None  # within `join`: the group that exchanges Python objects, by gloo
_limit = timedelta(days=7)  # the time that a rank waits for another one


class RankError(UserError, RuntimeError):
    """Another rank has ended, or does not answer."""


class Stopped(Exception):
    """Work that gives way to a stop, on all ranks; see `fail_together`."""


def count() -> int:
    """Returns the number of ranks; 1 outside `join`."""
    return dist.get_world_size() if _objects is not None else 1


def number() -> int:
    """Returns the number of this rank, from 0; 0 outside `join`."""
    return dist.get_rank() if _objects is not None else 0


def first() -> bool:
    """Whether this is the first rank, or there is only one."""
    return number() == 0


@contextmanager
def join(minutes: float | None = None) -> Iterator[None]:
    """Context in which the processes that torchrun started work together; else it does nothing.

    Makes the process group and destroys it at the end; if there is one already, its ranks are used.
    minutes: how long a rank waits for another one, except for the first one in `on_first`; None: a
    week. Raises RankError if a rank waits longer, or if another one has ended.
    """
    global _objects, _limit
    before, exists = (_objects, _limit), dist.is_initialized()
    starts = not exists and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    _limit = timedelta(days=7) if minutes is None else timedelta(minutes=minutes)
    try:
        if starts:
            store, rank, size = next(dist.rendezvous("env://", timeout=_limit))
            store = _attempt_store(store, rank, size)
            dist.init_process_group(store=store, rank=rank, world_size=size, timeout=_limit)
        if starts or exists:
            _objects = dist.new_group(backend="gloo", timeout=_limit)
        yield
    except RuntimeError as error:
        raise as_rank_error(error) from error.__cause__
    finally:
        _objects, _limit = before
    # after an error the other ranks may be in a collective, and would wait for this one
    if starts:
        dist.destroy_process_group()


def _attempt_store(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Returns the part of torchrun's store that only these processes use.

    The store outlives a restart of the ranks, and nodes count restarts differently. So each rank
    writes a random word, and the first rank answers each with its own, the attempt's name.
    """
    word = secrets.token_hex(8)
    if rank:
        store.set(f"word of {rank}", word)
        attempt = store.get(f"answer to {word}").decode()
        store.set(f"{attempt}/{rank}", "here")
        return dist.PrefixStore(attempt, store)
    end = time.monotonic() + _limit.total_seconds()
    missing = list(range(1, size))
    while missing := [other for other in missing if not store.check([f"{word}/{other}"])]:
        for other in missing:
            # perhaps the word of an ended rank, whose successor will replace it
            if store.check([f"word of {other}"]):
                other_word = store.get(f"word of {other}").decode()
                store.set(f"answer to {other_word}", word)
        if time.monotonic() > end:
            raise dist.DistStoreError(
                f"timeout: of {size} ranks these have not started: {', '.join(map(str, missing))}"
            )
        time.sleep(0.02)
    return dist.PrefixStore(word, store)


def as_rank_error(error: Exception) -> Exception:
    """Returns a RankError for an error of torch.distributed or gloo; other errors as they are."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return error
    # without gloo's line of code and advice
    reason = re.sub(r"^\[.*?\] ", "", first_line(error)).partition(". ")[0]
    if "imed out" in text or "timeout" in text:
        minutes = f"{_limit.total_seconds() / 60:g} minutes (run.timeout_minutes)"
        return RankError(
            f"no answer from another rank within {minutes}; its node may be gone ({reason})"
        )
    return RankError(f"another rank has ended ({reason})")


def set_device(name: str) -> torch.device:
    """As `hardware.pick_device`; of several ranks on GPUs, the GPU of this rank, made current."""
    picked = hardware.pick_device(name)
    if count() > 1 and picked.type == "cuda":
        picked = hardware.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(picked)
    return picked


def all_gather(value: Item) -> list[Item]:
    """Returns the values of all ranks, which are pickled, in their order; all have to call it."""
    if count() == 1:
        return [value]
    values = [value] * count()
    dist.all_gather_object(values, value, group=_objects)
    return values


@contextmanager
def fail_together() -> Iterator[None]:
    """Context that all ranks leave together; if one of them fails inside, all end.

    The first rank that fails raises its error; the others end in silence, but for the first rank of
    each other node, which repeats it. If ranks raise Stopped and none fails, all raise it. All
    ranks have to enter it; they must not exchange anything inside.
    """
    error = None
    try:
        yield
    except Exception as failure:
        error = failure
    node = os.environ.get("GROUP_RANK")
    stopped = isinstance(error, Stopped)
    own = None if error is None or stopped else (str(error), node)
    gathered = all_gather((own, stopped))
    failures = {rank: failure for rank, (failure, _) in enumerate(gathered) if failure}
    if not failures:
        if any(stops for _, stops in gathered):
            raise Stopped
        return
    failed = min(failures)
    if error is not None and failed == number():
        raise error
    message, failed_node = failures[failed]
    if failed_node != node and os.environ.get("LOCAL_RANK") == "0":
        raise RankError(f"of rank {failed}: {message}")
    raise SystemExit(1)


def on_first(function: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """Calls `function` on the first rank; returns its result on all ranks, which wait for it.

    If it fails, all end, as in `fail_together`. It must not exchange anything with other ranks.
    """
    if count() == 1:
        return function(*args)
    result: Any = None
    with fail_together():
        if first():
            with _telling_others_to_wait():
                result = function(*args)
        else:
            _wait_for_first()
    return _broadcast_from_first(result)


def _wait_for_first() -> None:
    """Waits on a rank but the first until `_telling_others_to_wait` ends; prints so to stderr."""
    while _broadcast_from_first(True):
        if os.environ.get("LOCAL_RANK") == "0":  # a line in the log of each node
            message = f"rank {number()}: the first rank works alone, e.g. packs"
            print(message, file=sys.stderr, flush=True)


@contextmanager
def _telling_others_to_wait() -> Iterator[None]:
    """Context of the first rank's work; a thread tells others, in `_wait_for_first`, to wait."""
    done = threading.Event()
    thread = threading.Thread(target=_tell_others, args=[done], daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _tell_others(done: threading.Event) -> None:
    """Sends True to the other ranks from time to time, and False when `done` is set."""
    seconds = min(60.0, _limit.total_seconds() / 4)
    # RuntimeError: of a rank that has ended, which the next exchange notices
    with suppress(RuntimeError):
        while _broadcast_from_first(not done.wait(seconds)):
            pass


def _broadcast_from_first(value: Item) -> Item:
    """Returns the first rank's value on each rank; all ranks have to call it."""
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"), group=_objects)
    return values[0]


def gather_to_first(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of all ranks on the first rank, one of each in turn; nothing on others.

    All ranks have to iterate over the result to its end. An error of one rank ends all.
    """
    if count() == 1:
        yield from items
        return
    iterator = iter(items)
    while True:
        with fail_together():
            part = list(islice(iterator, 1))  # empty at the end
        parts = all_gather(part)
        if not any(parts):
            return
        if first():
            yield from chain.from_iterable(parts)


def map_to_first(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function(item)` of each item, in order, on the first rank; nothing on others.

    The ranks divide the items, which must be the same on all.
    """
    return gather_to_first(function(item) for item in islice(items, number(), None, count()))


def seed_apart(seed: int) -> None:
    """Seeds torch's generator of each rank but the first differently, e.g. for dropout.

    To be called at each step, so that a checkpoint needs no states of these ranks, and after the
    weights, equal on all ranks, are drawn.
    """
    if not first():
        torch.manual_seed(seed + 1_000_003 * number())
