"""Launches of sizes that no memory holds: addresses alone, of each loop the first two and the last
iterations, and a few programs.

A launch of fake tensors is compiled as for a card and runs on memory that loads zeros and stores
nothing: only where an access lies is checked. An index that overflows 32 bits leaves its tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ptx.capture import Card
from ptx.instructions import reader
from ptx.machine import Batch, Code, Lanes, Launch
from ptx.memory import Access, Memory
from ptx.parse import Register
from support.kernels.recorder import Stand

# log2 of the bytes from one tensor to the next: an index of 32 bits cannot be wrong by so much
APART = 46
FOREVER = np.iinfo(np.int64).max
# jumps back before a loop is shortened: more than a pipeline has stages, whose numbers come round
# again
LOOK = 5
OTHERS = 6  # programs between the first and the last, drawn at random


def address(tensor: Any) -> int:
    """Returns where a tensor begins; its bytes follow by their offsets in it."""
    return (tensor.storage + 1 << APART) + tensor.data_ptr()


class Stores(NamedTuple):
    """What an instruction stored."""

    programs: np.ndarray  # [n]
    at: np.ndarray  # [n] addresses
    size: int  # bytes at each of them


class Addresses(Memory):
    """Global memory that is not there. An access may lie anywhere in a tensor's storage."""

    name = "global"

    def __init__(self, tensors: list[Any]):
        super().__init__(16, 16)
        self.sizes = np.zeros(max(each.storage for each in tensors) + 2, np.int64)
        for each in tensors:
            self.sizes[each.storage + 1] = each.allocated
        self.accesses = 0
        self.stores: list[Stores] = []

    def address(self, tensor: Any) -> int:
        return address(tensor)

    def places(
        self, access: Access, addresses: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        at = addresses.view(np.int64)
        number = np.clip(at >> APART, 0, len(self.sizes) - 1)
        bad = (at < 0) | ((at & (1 << APART) - 1) + size > self.sizes[number])
        access.report("global address is outside of the tensors", bad)
        self.accesses += len(at)
        return at, bad

    def read(self, access: Access, at: np.ndarray, size: int, count: int) -> np.ndarray:
        return np.zeros((len(at), count), f"u{size}")

    def write(self, access: Access, at: np.ndarray, values: np.ndarray) -> None:
        batch = access.batch
        programs = batch.programs[batch.program_of[access.lanes]]
        self.stores.append(Stores(programs, at, values.itemsize * values.shape[1]))


@dataclass
class HugeCard(Card):
    """A card that runs the first, the last and some other programs of each launch, on addresses
    alone.
    """

    addresses: int = 0
    storages: dict[int, int] = field(default_factory=dict)  # of fake tensors -> their numbers

    def stand(self, tensor: Tensor) -> Stand:
        """Returns the stand-in for a fake tensor, which must live as long as the card."""
        storage = tensor.untyped_storage()._cdata
        return Stand.of(tensor, self.storages.setdefault(storage, len(self.storages)))

    def launch(self, code: Code, programs: int, threads: int, shared: int, values: Any) -> Launch:
        stands = [self.stand(each) if isinstance(each, Tensor) else each for each in values]
        return super().launch(code, programs, threads, shared, stands)

    def memory(self, tensors: list[Any], code: Code) -> Addresses:
        return Addresses(tensors)

    def execute(self, launch: Launch) -> None:
        self.at_jump_back = Loops()
        others = np.random.default_rng(0).integers(launch.programs, size=OTHERS).tolist()
        self.run(launch, sorted({0, launch.programs - 1, *others}))
        self.addresses += launch.memory.accesses


class Loops:
    """Shortens loops: registers that grow by the same step go on to the last iterations."""

    def __init__(self):
        # place of a jump -> registers at the last jumps
        self.history: dict[int, list[dict[str, np.ndarray]]] = {}

    def __call__(self, batch: Batch, place: int, lanes: Lanes) -> None:
        for inner in range(batch.code.targets[place], place):
            self.history.pop(inner, None)
        history = self.history.setdefault(place, [])
        history.append({bank: _signed(batch, bank).copy() for bank in ("32", "64")})
        if len(history) < LOOK:
            return
        every = {bank: np.diff([each[bank] for each in history], axis=0) for bank in ("32", "64")}
        history.clear()
        steps = {
            bank: np.where((each == each[0]).all(0), each[0], 0) for bank, each in every.items()
        }
        count = np.maximum(self.iterations(batch, place, steps) - 2, 0)
        for bank, step in steps.items():
            _signed(batch, bank)[:, lanes] += (step * count.astype(step.dtype))[:, lanes]

    def iterations(self, batch: Batch, place: int, steps: dict[str, np.ndarray]) -> np.ndarray:
        """Returns how often lanes jump back from here on, from what the loop's branches compare."""
        start, count = batch.code.targets[place], np.full(batch.size, FOREVER)
        body = batch.code.kernel.instructions[start : place + 1]
        predicates = {i.predicate for i in body if i.opcode.startswith("bra")}
        for i in body:
            of_integers = i.opcode.startswith("setp.") and not i.opcode.endswith("f32")
            if not of_integers or i.operands[0] not in predicates:
                continue
            kind = i.opcode.rpartition(".")[2].replace("u", "s").replace("b", "s")
            left, left_step = _value(batch, i.operands[1], kind, steps)
            right, right_step = _value(batch, i.operands[2], kind, steps)
            closing = left_step - right_step
            several = (right - left) // np.where(closing == 0, 1, closing)
            ends = (closing != 0) & (several > 0)
            count = np.where(ends, np.minimum(count, several), count)
        return np.where(count == FOREVER, 0, count)


def _signed(batch: Batch, bank: str) -> np.ndarray:
    return batch.registers[bank].view(f"i{int(bank) // 8}")


def _value(batch: Batch, operand: Any, kind: str, steps: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns an operand's values in int64, and by how much they grow in an iteration."""
    values = reader(operand, kind, batch.code)(batch, slice(None)).astype(np.int64)
    if not isinstance(operand, Register):
        return values, np.zeros_like(values)
    return values, steps[operand.bank][operand.index].astype(np.int64)
