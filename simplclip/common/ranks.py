"""The ranks of a command that torchrun started: the rank of this process, exchange between ranks, work of the first rank.

Without torchrun, and outside of `joined`, there is one rank, and the functions here have no effect.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from simplclip.common import hardware
from simplclip.common.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
GRACE = 25.0  # seconds that ranks wait for the first rank's error; torchrun kills all ranks 30 seconds after an error
ANOTHER = "another rank ended or did not answer"
# Parts of torch's messages when another rank is gone, or silent for too long.
LOST = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "imed out", "timeout", "failed to connect")

_joined = False  # within `joined`
_alone = False  # within `alone`


def count() -> int:
    return dist.get_world_size() if _joined and not _alone else 1


def number() -> int:
    return dist.get_rank() if _joined else 0


def first() -> bool:
    return number() == 0


def on_this_host() -> int:
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _joined else 1


def _attempt() -> str:
    return f"simplclip/{os.environ['TORCHELASTIC_RESTART_COUNT']}"


@contextmanager
def joined() -> Iterator[None]:
    """Context in which the processes that torchrun started work together: by NCCL on cards, by gloo on CPUs.

    If there is a process group already, its ranks are used. An error goes into torchrun's report, which names the rank that
    failed first, its host and the reason. If another rank fails with the first rank's error, only the first rank tells it.
    """
    global _joined
    before, exists = _joined, dist.is_initialized()
    started = not exists and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    _joined = exists or started
    try:
        with _met() if started else nullcontext():
            yield
    finally:
        _joined = before


@contextmanager
def _met() -> Iterator[None]:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # A prefix for each attempt, since torchrun's store still holds the values of earlier attempts after a restart.
    store, rank, ranks = next(dist.rendezvous("env://"))
    dist.init_process_group(store=dist.PrefixStore(_attempt(), store), rank=rank, world_size=ranks)
    last_words = Exchange()
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, SystemExit) or ANOTHER in str(error)):
            get_error_handler().record_exception(error)
        if first():
            last_words.say("end", str(error))
        elif isinstance(error, SystemExit):
            last_words.hear("end", GRACE)
        elif last_words.hear("end", 3.0) == str(error):
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process is the only rank, for work in which other ranks take no part."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def device(name: str) -> torch.device:
    """Returns the device `name`; if there are several ranks and `name` is a GPU, the GPU of this rank."""
    picked = hardware.pick_device(name)
    if count() > 1 and picked.type == "cuda":
        picked = hardware.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(picked)
    return picked


class Exchange:
    """Exchange of values between ranks, also by their loader processes: a call with (name, value) returns all ranks' values.

    The values go through torchrun's store, since a process group does not survive a fork.
    """

    made = 0
    KEPT = 64  # last values of a process stay in the store, for a loader process that restarts a few batches earlier

    def __init__(self) -> None:
        Exchange.made += 1  # all ranks make their exchanges in the same order
        self.rank, self.ranks, self.place = number(), count(), f"{_attempt()}/{Exchange.made}"
        self._maker, self._process = os.getpid(), 0

    def __call__(self, name: str, value: Any) -> list[Any]:
        self.say(f"{name}/{self.rank}", value)
        return [self.hear(f"{name}/{rank}") for rank in range(self.ranks)]

    def say(self, name: str, value: Any) -> None:
        self._connect().set(name, pickle.dumps(value))  # type: ignore[arg-type]
        self._said.append(name)
        if len(self._said) > self.KEPT:
            self._store.delete_key(self._said.popleft())

    def hear(self, name: str, seconds: float = float("inf")) -> Any:
        """Returns the value of a name, None if there is none after `seconds`. Unlike torch's `wait`, it heeds signals."""
        store, began, pause = self._connect(), time.monotonic(), 1e-4
        while not store.check([name]):
            if os.getpid() != self._maker != os.getppid():
                raise SystemExit(f"data: the process of rank {self.rank} is gone")
            if time.monotonic() - began > seconds:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return pickle.loads(store.get(name))

    def _connect(self) -> dist.Store:
        if self._process != os.getpid():
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            self._store = dist.PrefixStore(self.place, store)
            self._process = os.getpid()
            self._said: deque[str] = deque()
        return self._store


def on_first(make: Callable[[], Result]) -> Result:
    """Calls `make` on the first rank; returns its result on all ranks. Other ranks wait without limit; a failure ends all."""
    if count() == 1:
        return make()
    turn = Exchange()
    result: list[Any] = [None]
    if first():
        try:
            with alone():
                result = [make()]
        except BaseException:
            turn.say("done", False)
            raise
        turn.say("done", True)
    elif not turn.hear("done"):
        raise SystemExit(1)
    dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def gathered(items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items of all ranks on the first rank, one of each rank in turn, and nothing on other ranks.

    All ranks have to iterate over the result. An error of one rank is an error of all.
    """
    if count() == 1:
        yield from items
        return
    mine, rounds, turn = iter(items), 0, Exchange()
    while True:
        error: Exception | None = None
        try:
            here = list(islice(mine, 1))
        except Exception as failed:
            error, here = failed, []
        # Through the store, since a collective would time out while another rank takes long.
        said = turn(str(rounds), (bool(here), error and str(error)))
        if error:
            raise error
        if failures := [failure for _, failure in said if failure is not None]:
            raise UserError(failures[0])
        lists: list[list[Item]] | None = [[]] * count() if first() else None
        dist.gather_object(here, lists)
        yield from chain.from_iterable(lists or ())
        if not any(more for more, _ in said):
            return
        rounds += 1


def mapped(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function` of each item, in order, on the first rank. Ranks divide the items; all iterate over the result."""
    return gathered(function(item) for item in islice(items, number(), None, count()))


def all_values(value: Item) -> list[Item]:
    """Returns the values of all ranks, in the order of the ranks."""
    return Exchange()("value", value) if count() > 1 else [value]


def any_reason(reason: str | None) -> str | None:
    """Returns this rank's reason to stop, else a text if another rank has a reason, else None. All ranks have to call it."""
    if count() > 1:
        stop = torch.tensor(reason is not None, dtype=torch.int32)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        reason = reason or ("signal to another rank" if stop else None)
    return reason


def total(value: Tensor) -> Tensor:
    """Sums `value` over the ranks, in place."""
    if count() > 1:
        dist.all_reduce(value)
    return value


def loss_arguments() -> dict[str, Any]:
    """Returns arguments of a loss over the batch of all ranks; its gradients are right after DDP averages them."""
    return {"gather_with_grad": True, "rank": number(), "world_size": count()} if count() > 1 else {}


def error_line(error: BaseException) -> str:
    """Returns an error as one line of text."""
    message = f"{type(error).__name__}: {str(error).strip().rstrip('.') or 'no message'}"
    if count() > 1 and isinstance(error, RuntimeError) and any(sign in message for sign in LOST):
        message = f"{ANOTHER}: torchrun's report says which, where and why ({message:.200})"
    return message if first() else f"rank {number()} on {socket.gethostname()}: {message}"


def seed_apart(seed: int) -> None:
    """Seeds each rank after the first differently, e.g. for dropout. The weights, equal on all ranks, are drawn before."""
    if not first():
        torch.manual_seed(seed + 1_000_003 * number())


def before(state: dict[str, Any]) -> str:
    """Returns a note for the start of a run whose checkpoint was written by another number of ranks, else an empty string."""
    was = state.get("ranks", 1)
    if was == count():
        return ""
    return f" with {count()} ranks after {was}: batches, order and schedule are the same, sums may differ in their last bits"
