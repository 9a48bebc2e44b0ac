"""The ranks of a command that torchrun started, which exchange Python objects.

join            a context in which there are ranks; elsewhere there is one
on_first        a call on the first rank, whose result all get
all_gather      the values of all ranks, on each of them
gather_to_first items of all ranks, on the first one

An error of one rank ends it, and torchrun then ends the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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

WEEK = 7 * 24 * 60.0  # minutes
_objects: Any = None  # within `join`: the group that exchanges Python objects, by gloo


class RankError(UserError, RuntimeError):
    """Another rank has ended, or does not answer."""


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
def join(minutes: float = WEEK) -> Iterator[None]:
    """Context in which the processes that torchrun started work together; else it does nothing.

    Makes the process group and destroys it at the end; if there is one already, its ranks are used.
    minutes: how long a rank waits for another one. Raises RankError if it waits longer, or if
    another rank has ended.
    """
    global _objects
    launched = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    starts, limit = launched and not dist.is_initialized(), timedelta(minutes=minutes)
    try:
        if starts:
            _init_process_group(limit)
        if dist.is_initialized():
            _objects = dist.new_group(backend="gloo", timeout=limit)
        yield
    except RuntimeError as error:
        raise as_rank_error(error) from error.__cause__
    finally:
        _objects = None
    # after an error the other ranks may be in a collective, and would wait for this one
    if starts:
        dist.destroy_process_group()


def _init_process_group(limit: timedelta) -> None:
    """Makes torchrun's process group, on one node without addresses of ranks before a restart.

    torchrun keeps its store when it restarts the ranks, so that a rank could find the address of a
    killed one in it. Nodes count restarts for themselves.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(store=store, rank=rank, world_size=size, timeout=limit)


def as_rank_error(error: Exception) -> Exception:
    """Returns a RankError for an error of torch.distributed or gloo; other errors as they are."""
    text = str(error)
    if isinstance(error, UserError) or not (isinstance(error, dist.DistError) or "gloo" in text):
        return error
    return RankError(
        "another rank has ended, or does not answer within run.timeout_minutes: "
        f"{first_line(error)}"
    )


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


def on_first(function: Callable[[*Arguments], Result], *args: *Arguments) -> Result:
    """Calls `function` on the first rank; returns its result on all ranks, which wait for it.

    It must not exchange anything with other ranks.
    """
    value: Any = function(*args) if first() else None
    return all_gather(value)[0]


def gather_to_first(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of all ranks on the first rank, one of each in turn; nothing on others.

    All ranks have to iterate over the result to its end.
    """
    iterator = iter(items)
    while True:
        parts = all_gather(list(islice(iterator, 1)))  # empty at the end
        if not any(parts):
            return
        if first():
            yield from chain.from_iterable(parts)


def seed_apart(seed: int) -> None:
    """Seeds torch's generator of each rank but the first differently, e.g. for dropout.

    To be called at each step, so that a checkpoint needs no states of these ranks, and after the
    weights, equal on all ranks, are drawn.
    """
    if not first():
        torch.manual_seed(seed + 1_000_003 * number())
