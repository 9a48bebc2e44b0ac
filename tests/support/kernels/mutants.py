"""Kernels with one instruction changed, which tests/ptx must find."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptx.capture import Started
from ptx.machine import Code, EndlessLoopError, Machine
from ptx.parse import Address, Immediate, Instruction, Kernel, Vector
from support.kernels import launches

Mutation = Callable[[Instruction], Instruction | None]  # None: the instruction is dropped


def _operand(index: int, change: Callable[[Any], Any]) -> Mutation:
    """Returns a mutation that changes an operand."""

    def mutate(i: Instruction) -> Instruction:
        operands = list(i.operands)
        operands[index] = change(operands[index])
        return replace(i, operands=tuple(operands))

    return mutate


def _renamed(old: str, new: str) -> Mutation:
    return lambda i: replace(i, opcode=i.opcode.replace(old, new))


def _further(address: Address) -> Address:
    return address._replace(offset=address.offset + 16)


def _turned(vector: Vector) -> Vector:
    return Vector(vector.items[1:] + vector.items[:1])


def _unguarded(i: Instruction) -> Instruction:
    return replace(i, predicate=None)


def _dropped(i: Instruction) -> None:
    return None


def _other_choice(i: Instruction) -> Instruction:
    return replace(i, operands=(i.operands[0], i.operands[2], i.operands[1], i.operands[3]))


@dataclass(frozen=True)
class Kind:
    opcode: str  # how it begins
    mutate: Mutation
    guarded: bool = False  # only of instructions with a predicate


KINDS = {
    "no barrier": Kind("bar.sync", _dropped),
    "no wait": Kind("cp.async.wait_group", _dropped),
    "a wait for one group fewer": Kind(
        "cp.async.wait_group", _operand(0, lambda n: Immediate(n.bits + 1))
    ),
    "no end of a group": Kind("cp.async.commit_group", _dropped),
    "copied elsewhere": Kind("cp.async.cg", _operand(0, _further)),
    "copied from elsewhere": Kind("cp.async.cg", _operand(1, _further)),
    "copied with no mask": Kind("cp.async.cg", _operand(3, lambda _: Immediate(16))),
    "ldmatrix: registers exchanged": Kind("ldmatrix", _operand(0, _turned)),
    "ldmatrix: other rows": Kind("ldmatrix", _operand(1, _further)),
    "mma: left registers exchanged": Kind("mma.sync", _operand(1, _turned)),
    "mma: right registers exchanged": Kind("mma.sync", _operand(2, _turned)),
    "loaded with no mask": Kind("ld.global", _unguarded, guarded=True),
    "stored with no mask": Kind("st.global", _unguarded, guarded=True),
    "loaded from elsewhere": Kind("ld.global", _operand(1, _further)),
    "stored elsewhere": Kind("st.global", _operand(0, _further)),
    "loaded from elsewhere in shared memory": Kind("ld.shared", _operand(1, _further)),
    "stored elsewhere in shared memory": Kind("st.shared", _operand(0, _further)),
    "less or equal": Kind("setp.lt", _renamed(".lt", ".le")),
    "maximum": Kind("min.", _renamed("min", "max")),
    "another lane": Kind("shfl.sync.bfly", _operand(2, lambda n: Immediate(0))),
    "a choice exchanged": Kind("selp", _other_choice),
}


def places(kind: Kind, code: Code, *, executed: bool = True) -> list[int]:
    """Returns the indices of instructions that a kind can change; executed: of those alone."""

    def fits(i: Instruction) -> bool:
        guarded = i.predicate is not None or not kind.guarded
        return i.opcode.startswith(kind.opcode) and guarded and kind.mutate(i) != i

    instructions = enumerate(zip(code.kernel.instructions, code.executed))
    return [index for index, (i, done) in instructions if (done or not executed) and fits(i)]


def mutant(kernel: Kernel, kind: Kind, chosen: Collection[int]) -> Kernel:
    """Returns the kernel with these instructions changed."""
    instructions: list[Instruction] = []
    new_index = []  # of each instruction, and of the end
    for index, instruction in enumerate(kernel.instructions):
        new_index.append(len(instructions))
        if index in chosen:
            instruction = kind.mutate(instruction)
        if instruction is not None:
            instructions.append(instruction)
    new_index.append(len(instructions))
    labels = {name: new_index[target] for name, target in kernel.labels.items()}
    return replace(kernel, instructions=instructions, labels=labels)


def found_by(started: Started, kernel: Kernel) -> str:
    """Runs a launch again with another kernel. Returns what shows that it is wrong, or ""."""
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


def sample(codes: Sequence[Code], count: int) -> list[tuple[Code, str, int]]:
    """Draws codes, kinds and places: at most six places of a kind in a code."""
    rng, mutations = random.Random(0), []
    for code in codes:
        for name, kind in KINDS.items():
            indices = places(kind, code)
            drawn = rng.sample(indices, min(len(indices), 6))
            mutations += [(code, name, index) for index in drawn]
    return rng.sample(mutations, min(count, len(mutations)))
