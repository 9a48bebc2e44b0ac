"""The ranks of a command that torchrun started: the rank of this process, exchange between ranks,
work of the first rank.

Without torchrun, and outside of `joined`, there is one rank, and the functions here have no effect.
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
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from simplclip.common import hardware
from simplclip.common.errors import UserError, first_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_objects: Any = None  # within `joined`: the group that exchanges Python objects, by gloo
_limit = timedelta(days=7)  # the time that a rank waits for another one
_alone = False  # while the first rank does work in which other ranks take no part


class RankError(UserError, RuntimeError):
    """Another rank has ended, or does not answer."""


def count() -> int:
    return dist.get_world_size() if _objects is not None and not _alone else 1


def number() -> int:
    return dist.get_rank() if _objects is not None else 0


def first() -> bool:
    return number() == 0


@contextmanager
def joined(minutes: float | None = None) -> Iterator[None]:
    """Context in which the processes that torchrun started work together: by NCCL on cards, by gloo
    on CPUs.

    If there is a process group already, its ranks are used.
    minutes: the time that a rank waits for another one, except for the first one in `on_first`;
    None: a week.

    Raises RankError if a rank waits longer, or if another one has ended.
    """
    global _objects, _limit
    before, exists = (_objects, _limit), dist.is_initialized()
    started = not exists and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    _limit = timedelta(days=7) if minutes is None else timedelta(minutes=minutes)
    try:
        if started:
            store, rank, size = next(dist.rendezvous("env://", timeout=_limit))
            dist.init_process_group(
                store=_met(store, rank, size), rank=rank, world_size=size, timeout=_limit
            )
        if started or exists:
            _objects = dist.new_group(backend="gloo", timeout=_limit)
        yield
    except RuntimeError as error:
        raise named(error) from error.__cause__
    finally:
        _objects, _limit = before
    # after an error the other ranks may be in a collective, and would wait for this one
    if started:
        dist.destroy_process_group()


def _met(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Returns the part of torchrun's store for these processes alone.

    The store outlives a restart of the ranks, and keeps addresses of the dead.
    TORCHELASTIC_RESTART_COUNT does not tell attempts apart, since nodes count differently. So each
    rank asks by a random word, which the first one answers.
    """
    word, until = secrets.token_hex(8), time.monotonic() + _limit.total_seconds()
    if rank:
        store.set(f"word of {rank}", word)
        attempt = store.get(f"answer to {word}").decode()
        store.set(f"{attempt}/{rank}", "here")
        return dist.PrefixStore(attempt, store)
    missing = list(range(1, size))
    while missing := [other for other in missing if not store.check([f"{word}/{other}"])]:
        for other in missing:
            # perhaps of a dead one, whose successor will replace it
            if store.check([f"word of {other}"]):
                store.set(f"answer to {store.get(f'word of {other}').decode()}", word)
        if time.monotonic() > until:
            raise dist.DistStoreError(
                f"timeout: of {size} ranks these have not started: {', '.join(map(str, missing))}"
            )
        time.sleep(0.02)
    return dist.PrefixStore(word, store)


def named(error: Exception) -> Exception:
    """Returns a RankError in place of an error of torch.distributed or gloo; other errors as they
    are.
    """
    if isinstance(error, UserError) or not (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    ):
        return error
    late = "imed out" in str(error) or "timeout" in str(error)
    minutes = f"{_limit.total_seconds() / 60:g} minutes (run.timeout_minutes)"
    silence = f"no answer from another rank within {minutes}; its node may be gone"
    # without gloo's line of code and advice
    reason = re.sub(r"^\[.*?\] ", "", first_line(error)).partition(". ")[0]
    return RankError(f"{silence if late else 'another rank has ended'} ({reason})")


def device(name: str) -> torch.device:
    """Returns the device `name`; if there are several ranks and `name` is a GPU, the GPU of this
    rank.
    """
    picked = hardware.pick_device(name)
    if count() > 1 and picked.type == "cuda":
        picked = hardware.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(picked)
    return picked


def exchanged(value: Item) -> list[Item]:
    """Returns the values of all ranks, in the order of the ranks. All ranks have to call it."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_objects)
    return values


def agreed(make: Callable[[], Result]) -> Result:
    """Calls `make` on all ranks.

    If it fails on one, the first such rank raises the error. The others end in silence, but for the
    first rank of each other node, which repeats the error.
    """
    result = None
    error = None
    node = os.environ.get("GROUP_RANK")
    try:
        result = make()
    except Exception as failure:
        error = failure
    for rank, failed in enumerate(exchanged((str(error), node) if error else None)):
        if failed is None:
            continue
        if error and rank == number():
            raise error
        message, its_node = failed
        if its_node != node and os.environ.get("LOCAL_RANK") == "0":
            raise RankError(f"of rank {rank}: {message}")
        raise SystemExit(1)
    return result  # type: ignore[return-value]


def on_first(make: Callable[[], Result]) -> Result:
    """Calls `make` on the first rank; returns its result on all ranks, which wait while it works.

    A failure ends all.
    """
    if count() == 1:
        return make()

    def made() -> Any:
        global _alone
        if not first():
            while _of_first(None):
                if os.environ.get("LOCAL_RANK") == "0":  # a line in the log of each node
                    print(
                        f"rank {number()}: the first rank works alone, e.g. packs",
                        file=sys.stderr,
                        flush=True,
                    )
            return None
        done = threading.Event()
        teller = threading.Thread(target=_tell_until, args=[done], daemon=True)
        teller.start()
        _alone = True
        try:
            return make()
        finally:
            _alone = False
            done.set()
            teller.join()

    return _of_first(agreed(made))


def _tell_until(done: threading.Event) -> None:
    """Tells the other ranks from time to time that the first one, whose thread this is, works, and
    then that it is done.
    """
    with suppress(RuntimeError):  # of a rank that has ended, which the next exchange notices
        while _of_first(not done.wait(min(60.0, _limit.total_seconds() / 4))):
            pass


def _of_first(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, device=torch.device("cpu"), group=_objects)
    return values[0]


def gathered(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of all ranks on the first rank, one of each rank in turn, and nothing on
    other ranks.

    All ranks have to iterate over the result. An error of one rank ends all.
    """
    if count() == 1:
        yield from items
        return
    iterator = iter(items)
    while any(parts := exchanged(agreed(lambda: list(islice(iterator, 1))))):
        yield from chain.from_iterable(parts if first() else ())


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function` of each item, in order, on the first rank.

    Ranks divide the items; all iterate over the result.
    """
    return gathered(function(item) for item in islice(items, number(), None, count()))


def seed_apart(seed: int) -> None:
    """Seeds each rank after the first differently, e.g. for dropout; at each step, so that a
    checkpoint needs no state of theirs. The weights, equal on all ranks, are drawn before.
    """
    if not first():
        torch.manual_seed(seed + 1_000_003 * number())
