"""Kernels with one instruction changed, to see that tests/ptx finds the change: by a hazard, or by a launch's definition."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import launches
from ptx.capture import Started
from ptx.machine import Code, EndlessLoopError, Machine
from ptx.parse import Address, Immediate, Instruction, Kernel, Vector

Mutation = Callable[[Instruction], Instruction | None]  # None: the instruction is dropped


def _changed(place: int, change: Callable[[Any], Any]) -> Mutation:
    """Returns a mutation that changes an operand."""

    def mutate(i: Instruction) -> Instruction:
        operands = [change(each) if at == place else each for at, each in enumerate(i.operands)]
        return replace(i, operands=tuple(operands), text=f"{i.text} [operand {place} changed]")

    return mutate


def _exchanged(first: int, second: int) -> Mutation:
    def mutate(i: Instruction) -> Instruction:
        operands = list(i.operands)
        operands[first], operands[second] = operands[second], operands[first]
        return replace(i, operands=tuple(operands), text=f"{i.text} [operands exchanged]")

    return mutate


def _renamed(old: str, new: str) -> Mutation:
    return lambda i: replace(i, opcode=i.opcode.replace(old, new), text=f"{i.text} [{new}]")


def _further(address: Address) -> Address:
    return address._replace(offset=address.offset + 16)


def _turned(vector: Vector) -> Vector:
    return Vector(vector.items[1:] + vector.items[:1])


def _unguarded(i: Instruction) -> Instruction:
    return replace(i, predicate=None, text=f"{i.text} [for all lanes]")


def _dropped(i: Instruction) -> None:
    return None


@dataclass(frozen=True)
class Kind:
    opcode: str  # how it begins
    mutate: Mutation
    guarded: bool = False  # only of instructions with a predicate


KINDS = {
    "no barrier": Kind("bar.sync", _dropped),
    "no wait": Kind("cp.async.wait_group", _dropped),
    "a wait for one group fewer": Kind("cp.async.wait_group", _changed(0, lambda n: Immediate(n.bits + 1))),
    "no end of a group": Kind("cp.async.commit_group", _dropped),
    "copied elsewhere": Kind("cp.async.cg", _changed(0, _further)),
    "copied from elsewhere": Kind("cp.async.cg", _changed(1, _further)),
    "copied with no mask": Kind("cp.async.cg", _changed(3, lambda _: Immediate(16))),
    "ldmatrix: registers exchanged": Kind("ldmatrix", _changed(0, _turned)),
    "ldmatrix: other rows": Kind("ldmatrix", _changed(1, _further)),
    "mma: left registers exchanged": Kind("mma.sync", _changed(1, _turned)),
    "mma: right registers exchanged": Kind("mma.sync", _changed(2, _turned)),
    "loaded with no mask": Kind("ld.global", _unguarded, guarded=True),
    "stored with no mask": Kind("st.global", _unguarded, guarded=True),
    "loaded from elsewhere": Kind("ld.global", _changed(1, _further)),
    "stored elsewhere": Kind("st.global", _changed(0, _further)),
    "loaded from elsewhere in shared memory": Kind("ld.shared", _changed(1, _further)),
    "stored elsewhere in shared memory": Kind("st.shared", _changed(0, _further)),
    "less or equal": Kind("setp.lt", _renamed(".lt", ".le")),
    "maximum": Kind("min.", _renamed("min", "max")),
    "another lane": Kind("shfl.sync.bfly", _changed(2, lambda n: Immediate(0))),
    "a choice exchanged": Kind("selp", _exchanged(1, 2)),
}


def places(kind: Kind, code: Code) -> list[int]:
    """Returns the executed instructions that a kind can change."""
    instructions = enumerate(zip(code.kernel.instructions, code.executed))
    fits = lambda i: i.opcode.startswith(kind.opcode) and (i.predicate is not None or not kind.guarded)  # noqa: E731
    return [place for place, (each, executed) in instructions if executed and fits(each)]


def mutant(kernel: Kernel, kind: Kind, chosen: set[int]) -> Kernel:
    """Returns the kernel with these instructions changed."""
    changed = {place: kind.mutate(kernel.instructions[place]) for place in chosen}
    kept = [place for place in range(len(kernel.instructions)) if changed.get(place, 0) is not None]
    labels = {name: sum(place < target for place in kept) for name, target in kernel.labels.items()}
    return replace(kernel, instructions=[changed.get(p, kernel.instructions[p]) for p in kept], labels=labels)


def found_by(started: Started, kernel: Kernel) -> str:
    """Runs a launch again with another kernel. Returns how it is found to be wrong, "" if it is not."""
    launch, machine = started.launch, Machine()
    for name, before in started.before.items():
        started.arguments[name].detach().copy_(before)
    launch.memory.fetch()
    try:
        machine.execute(replace(launch, code=Code(kernel)))
    except EndlessLoopError:
        return "an endless loop"
    if machine.hazards:
        return next(iter(machine.hazards.values())).kind
    error = max(launches.compare(started).values())
    return f"an error of {error:.3g} times what is allowed" if error > 1 else ""


def sample(started: list[Started], count: int, seed: int = 0) -> list[tuple[Started, str, int]]:
    """Draws launches, kinds and places: each kind of a launch's kernel as often as others."""
    draw, all_of_them = random.Random(seed), []
    for each in started:
        for name, kind in KINDS.items():
            every = places(kind, each.launch.code)
            all_of_them += [(each, name, place) for place in draw.sample(every, min(len(every), 6))]
    return draw.sample(all_of_them, min(count, len(all_of_them)))
