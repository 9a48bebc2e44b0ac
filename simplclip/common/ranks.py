"""The ranks of a command that torchrun started: the rank of this process, exchange between ranks, work of the first rank.

Without torchrun, and outside of `joined`, there is one rank, and the functions here have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from simplclip.common import hardware

Item = TypeVar("Item")
Result = TypeVar("Result")

_objects: Any = None  # within `joined`: the group that exchanges Python objects, by gloo, without a limit of time
_alone = False  # while the first rank does work in which other ranks take no part


def count() -> int:
    return dist.get_world_size() if _objects is not None and not _alone else 1


def number() -> int:
    return dist.get_rank() if _objects is not None else 0


def first() -> bool:
    return number() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Context in which the processes that torchrun started work together: by NCCL on cards, by gloo on CPUs.

    If there is a process group already, its ranks are used.
    """
    global _objects
    before, exists = _objects, dist.is_initialized()
    started = not exists and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if started:
        dist.init_process_group()
    try:
        if started or exists:
            _objects = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        yield
    finally:
        _objects = before
    if started:  # after an error the other ranks may be in a collective, and would wait for this one
        dist.destroy_process_group()


def device(name: str) -> torch.device:
    """Returns the device `name`; if there are several ranks and `name` is a GPU, the GPU of this rank."""
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
    """Calls `make` on all ranks. If it fails on one, the first such rank raises the error, and the others end in silence."""
    result, error = None, None
    try:
        result = make()
    except Exception as failure:
        error = failure
    failed = [rank for rank, fails in enumerate(exchanged(error is not None)) if fails]
    if error is not None and failed[0] == number():
        raise error
    if failed:
        raise SystemExit(1)
    return result  # type: ignore[return-value]


def on_first(make: Callable[[], Result]) -> Result:
    """Calls `make` on the first rank; returns its result on all ranks, which wait without limit. A failure ends all."""
    if count() == 1:
        return make()

    def made() -> Any:
        global _alone
        if not first():
            return None
        _alone = True
        try:
            return make()
        finally:
            _alone = False

    result = [agreed(made)]
    dist.broadcast_object_list(result, device=torch.device("cpu"), group=_objects)
    return result[0]


def gathered(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of all ranks on the first rank, one of each rank in turn, and nothing on other ranks.

    All ranks have to iterate over the result. An error of one rank ends all.
    """
    if count() == 1:
        yield from items
        return
    iterator = iter(items)
    while any(parts := exchanged(agreed(lambda: list(islice(iterator, 1))))):
        yield from chain.from_iterable(parts if first() else ())


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function` of each item, in order, on the first rank. Ranks divide the items; all iterate over the result."""
    return gathered(function(item) for item in islice(items, number(), None, count()))


def seed_apart(seed: int) -> None:
    """Seeds each rank after the first differently, e.g. for dropout. The weights, equal on all ranks, are drawn before."""
    if not first():
        torch.manual_seed(seed + 1_000_003 * number())
