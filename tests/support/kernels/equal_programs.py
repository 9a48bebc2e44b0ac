"""Which dropped waits, barriers and ends of groups leave a kernel as it was, read from its text.

A pipelined loop has second waits and second barriers. Dropping one changes nothing that a run could
show, whatever the data. What is not decided here counts as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from ptx.parse import Address, Instruction, Kernel

State = TypeVar("State")
MANY = 32  # groups of copies; more are counted as so many
COMMIT = "cp.async.commit_group"
WAIT = "cp.async.wait_group"
BARRIER = "bar.sync"
# Opcodes begin so, and stand for accesses of (memory, whether it is written).
ACCESSES: dict[str, set[tuple[str, bool]]] = {
    "ld.global": {("global", False)},
    "st.global": {("global", True)},
    "ld.shared": {("shared", False)},
    "st.shared": {("shared", True)},
    "ldmatrix": {("shared", False)},
    "stmatrix": {("shared", True)},
    "cp.async.ca": {("global", False), ("shared", True)},
    "cp.async.cg": {("global", False), ("shared", True)},
}


def is_equal(kernel: Kernel, name: str, place: int) -> bool:
    """Returns whether a mutation of mutants.KINDS at a place is known to change nothing."""
    if not all(map(_is_understood, kernel.instructions)):
        return False
    if name == "no barrier":
        return not _orders_accesses(kernel, place)
    if name in ("no wait", "a wait for one group fewer"):
        return _is_second_wait(kernel, place) or _is_repeated(kernel, place)
    if name == "no end of a group":
        return _ends_no_group_that_is_waited_for(kernel, place)
    return False


def _is_understood(i: Instruction) -> bool:
    addresses = any(isinstance(each, Address) for each in i.operands)
    if addresses:
        return i.opcode.startswith((*ACCESSES, "ld.param"))
    return not i.opcode.startswith(("wgmma", "fence"))


def _is_barrier(i: Instruction) -> bool:
    return i.opcode == BARRIER and i.predicate is None


def _successors(kernel: Kernel) -> list[list[int]]:
    """Returns the places that may follow each instruction."""
    successors = []
    for place, i in enumerate(kernel.instructions):
        following = []
        if i.predicate is not None or i.opcode not in ("ret", "bra", "bra.uni"):
            following.append(place + 1)
        if i.opcode in ("bra", "bra.uni"):
            following.append(kernel.labels[i.operands[0].name])
        successors.append([each for each in following if each < len(kernel.instructions)])
    return successors


def _reached(
    successors: list[list[int]],
    first: int,
    start: State,
    after: Callable[[int, State], State | None],
) -> Iterator[tuple[int, State]]:
    """Yields the places behind `first` that are reached, each with the states there.

    after(place, state): the state behind an instruction, None where nobody goes on.
    """
    pending = [(each, start) for each in successors[first]]
    seen = set(pending)
    while pending:
        place, state = pending.pop()
        yield place, state
        following = after(place, state)
        if following is None:
            continue
        for each in successors[place]:
            if (each, following) not in seen:
                seen.add((each, following))
                pending.append((each, following))


def _groups(i: Instruction) -> int:
    """Returns how many groups a wait leaves unfinished."""
    return i.operands[0].bits


def _unfinished(kernel: Kernel, place: int) -> int:
    """Returns how many groups of a thread may be unfinished before an instruction, at most."""
    instructions = kernel.instructions
    successors = _successors(kernel)
    most = [-1] * len(instructions)  # -1: not reached
    most[0] = 0
    pending = [0]
    while pending:
        index = pending.pop()
        i, count = instructions[index], most[index]
        if i.opcode == COMMIT:
            count = min(count + 1, MANY)
        elif i.opcode == WAIT and i.predicate is None:
            count = min(count, _groups(i))
        for each in successors[index]:
            if count > most[each]:
                most[each] = count
                pending.append(each)
    return most[place]


def _is_second_wait(kernel: Kernel, wait: int) -> bool:
    """Returns whether earlier waits have finished all that this one waits for."""
    return _unfinished(kernel, wait) <= _groups(kernel.instructions[wait])


def _accesses(i: Instruction) -> set[tuple[str, bool]]:
    for opcode, accesses in ACCESSES.items():
        if i.opcode.startswith(opcode):
            return accesses
    return set()


def _uses_shared_memory(i: Instruction) -> bool:
    return any(memory == "shared" for memory, _ in _accesses(i))


def _is_repeated(kernel: Kernel, wait: int) -> bool:
    """Returns whether a wait that is not weaker follows before shared memory is used, and behind
    it a barrier if there was one.
    """
    instructions = kernel.instructions
    allowed = _groups(instructions[wait])

    def after(place: int, state: str) -> str | None:
        i = instructions[place]
        if _is_barrier(i):
            return None if state == "needs a barrier" else "needs both"
        if i.opcode == WAIT and i.predicate is None and _groups(i) <= allowed:
            return None if state == "needs a wait" else "needs a barrier"
        return state

    reached = _reached(_successors(kernel), wait, "needs a wait", after)
    return not any(_uses_shared_memory(instructions[place]) for place, _ in reached)


def _accesses_up_to_barriers(
    kernel: Kernel, edges: list[list[int]], barrier: int, waits_write: bool
) -> set[tuple[str, bool]]:
    """Returns the accesses between a barrier and the next ones along the edges."""
    instructions = kernel.instructions

    def after(place: int, state: bool) -> bool | None:
        return None if _is_barrier(instructions[place]) else state

    accesses: set[tuple[str, bool]] = set()
    for place, _ in _reached(edges, barrier, True, after):
        i = instructions[place]
        accesses |= _accesses(i)
        if i.opcode == WAIT and waits_write and not _is_second_wait(kernel, place):
            accesses.add(("shared", True))
    return accesses


def _orders_accesses(kernel: Kernel, barrier: int) -> bool:
    """Returns whether a barrier may stand between two accesses of which one writes.

    A first wait before it writes what was copied. A wait behind it does not count: who uses these
    bytes before the barrier races with the copy anyway.
    """
    successors = _successors(kernel)
    predecessors: list[list[int]] = [[] for _ in successors]
    for place, following in enumerate(successors):
        for each in following:
            predecessors[each].append(place)
    before = _accesses_up_to_barriers(kernel, predecessors, barrier, waits_write=True)
    behind = _accesses_up_to_barriers(kernel, successors, barrier, waits_write=False)
    return any(
        memory == other and (writes or other_writes)
        for memory, writes in before
        for other, other_writes in behind
    )


def _ends_no_group_that_is_waited_for(kernel: Kernel, commit: int) -> bool:
    """Returns whether every wait finishes the same copies if they join the next group.

    A wait for all but n groups tells a group from the next one if n follow it. Only the group that
    ends here and those before it, which may be unfinished, have then one fewer behind them.
    """
    instructions = kernel.instructions
    successors = _successors(kernel)

    def after(place: int, behind: int) -> int | None:
        i = instructions[place]
        if i.opcode == COMMIT:
            return min(behind + 1, MANY)
        if i.opcode == WAIT and i.predicate is None and behind > _groups(i):
            return None  # the group is finished with and without the change
        return behind

    for older in range(_unfinished(kernel, commit) + 1):
        for place, behind in _reached(successors, commit, older, after):
            i = instructions[place]
            if place == commit or (i.opcode == WAIT and behind == _groups(i)):
                return False
    return True
