"""A machine that runs launches of kernels in PTX. A register is an array with a lane for each thread of a batch of programs.

The lanes with the lowest program counter run first, so that lanes that took different ways meet again where these join. A
barrier opens when no lane can go on. What no correct kernel does is reported as a hazard, and execution goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ptx import wgmma  # noqa: F401  (registers its instructions)
from ptx.instructions import Reader, Step, step_of
from ptx.memory import PROGRAM_SHIFT, WARP_BITS, Access, GlobalMemory, SharedMemory
from ptx.parse import Instruction, Kernel, UnknownPTXError

WARP = 32
BATCH = 8192  # lanes that run together, at least one program
JUMPS_BACK = 1 << 17  # at most, of a batch
Lanes = slice | np.ndarray
ALL = slice(None)
_DTYPES = {"pred": bool, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_KINDS = ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64")


class EndlessLoopError(Exception):
    pass


class Code:
    """A kernel made executable: a step for each instruction, and which instructions lanes have executed so far."""

    def __init__(self, kernel: Kernel):
        self.kernel, self.steps = kernel, []
        self.controls = [_control(instruction, kernel) for instruction in kernel.instructions]
        self.reached, self.taken = (bytearray(len(kernel.instructions)) for _ in range(2))  # taken: the predicate held
        self.granules = {"global": 16, "shared": 16}  # the bytes of the smallest accesses
        wgmma.check_fences(kernel)
        for place, instruction in enumerate(kernel.instructions):
            try:
                step = step_of(instruction, self)
            except (UnknownPTXError, KeyError, AttributeError, ValueError) as error:
                raise UnknownPTXError(f"{kernel.name}, {instruction}: {error}") from error
            self.steps.append(self.guarded(instruction, place, step))

    def guarded(self, instruction: Instruction, place: int, step: Step) -> Step:
        """Returns a step for those lanes whose predicate holds, which notes that the instruction was executed."""
        if instruction.predicate is None or self.controls[place] is not None:
            return step
        index, negated, taken = instruction.predicate.index, instruction.negated, self.taken

        def run(batch: Batch, lanes: Lanes) -> None:
            holds = batch.registers["pred"][index][lanes] != negated
            if holds.all():
                taken[place] = 1
                step(batch, lanes)
            elif holds.any():
                taken[place] = 1
                step(batch, batch.numbers[lanes][holds])

        return run

    def executed(self) -> list[bool]:
        """Returns which instructions a lane has executed; branches count when they are reached."""
        plain = [
            each.predicate is None or self.controls[place] is not None for place, each in enumerate(self.kernel.instructions)
        ]
        return [bool(reached and (free or taken)) for reached, taken, free in zip(self.reached, self.taken, plain)]


def _control(instruction: Instruction, kernel: Kernel) -> int | str | None:
    """Returns where a branch goes, "ret", "bar", or None for an instruction that is no control flow."""
    if instruction.opcode in ("bra", "bra.uni"):
        return kernel.labels[instruction.operands[0].name]
    return {"ret": "ret", "bar.sync": "bar"}.get(instruction.opcode)


@dataclass
class Launch:
    code: Code
    programs: int
    threads: int  # of a program
    shared_bytes: int
    parameters: np.ndarray  # bytes
    memory: GlobalMemory


@dataclass
class Hazard:
    kernel: str
    kind: str
    instruction: Instruction
    where: str  # first: program, warp and lane
    count: int = 0  # of lanes

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.instruction} in {self.where} ({self.count} lanes)"


@dataclass
class Machine:
    hazards: dict[tuple, Hazard] = field(default_factory=dict)
    at_jump_back: Callable | None = None  # called with the batch, the branch's place and the lanes that jump back

    def run(self, launch: Launch, programs: list[int] | None = None) -> None:
        """Runs these programs of a launch, by default all."""
        every = np.arange(launch.programs) if programs is None else np.array(programs)
        size = max(1, BATCH // launch.threads)
        with np.errstate(all="ignore"):
            for first in range(0, len(every), size):
                Batch(self, launch, every[first : first + size]).run()


class Batch:
    """Programs of a launch that run together."""

    def __init__(self, machine: Machine, launch: Launch, programs: np.ndarray):
        self.machine, self.launch, self.code, self.programs = machine, launch, launch.code, programs
        self.memory, self.parameters, threads = launch.memory, launch.parameters, launch.threads
        self.size = len(programs) * threads
        self.numbers = np.arange(self.size)  # of lanes
        self.program_of = self.numbers // threads  # among these
        counts = self.code.kernel.registers
        banks = {bank: np.zeros((counts[bank], self.size), dtype) for bank, dtype in _DTYPES.items()}
        self.registers = {kind: banks[kind[1:]].view(_dtype(kind)) for kind in _KINDS} | {"pred": banks["pred"]}
        self.registers["f32x2"] = banks["64"].view(np.float32).reshape(-1, self.size, 2)
        self.thread, program = self.numbers % threads, programs[self.program_of]
        same = {"ntid.x": threads, "nctaid.x": launch.programs}
        self.special = {name: np.full(self.size, value, np.uint32) for name, value in same.items()}
        self.special |= {"tid.x": self.thread.astype(np.uint32), "ctaid.x": program.astype(np.uint32)}
        self.shared = SharedMemory(launch.shared_bytes, len(programs), self.size, self.code.granules["shared"])
        self.owner = program << PROGRAM_SHIFT | self.thread // WARP  # of a shadow word
        self.time, self.limit = 0, np.zeros(self.size, np.int64)
        self.open_barrier(ALL)
        self.flights, self.jumps_back = wgmma.Flights(self), 0

    def open_barrier(self, lanes: Lanes) -> None:
        self.time += 1
        self.limit[lanes] = self.owner[lanes] >> PROGRAM_SHIFT << PROGRAM_SHIFT | self.time << WARP_BITS

    def tokens(self, lanes: Lanes) -> np.ndarray:
        return self.owner[lanes] | self.time << WARP_BITS

    def access(self, instruction: Instruction, lanes: Lanes) -> Access:
        self.time += 1
        return Access(self, instruction, self.numbers[lanes], self.tokens(lanes), self.limit[lanes])

    def report(self, kind: str, instruction: Instruction, lanes: np.ndarray) -> None:
        name, thread = self.code.kernel.name, self.thread[lanes[0]]
        where = f"program {self.programs[self.program_of[lanes[0]]]}, warp {thread // WARP}, lane {thread % WARP}"
        hazard = self.machine.hazards.setdefault((name, kind, instruction.line), Hazard(name, kind, instruction, where))
        hazard.count += len(lanes)

    def whole(self, instruction: Instruction, lanes: Lanes, size: int = WARP) -> Lanes:
        """Returns the lanes of whole warps, or other groups; reports the others."""
        if isinstance(lanes, slice):
            return lanes
        counts = np.bincount(lanes // size, minlength=self.size // size)
        some = (counts % size != 0)[lanes // size]
        if some.any():
            self.report(f"executed by some of {size} lanes", instruction, lanes[some])
            return lanes[~some]
        return lanes

    def expect_all(self, instruction: Instruction, lanes: Lanes, members: Reader) -> None:
        """Reports lanes whose mask of members is not all of a warp."""
        some = np.broadcast_to(members(self, lanes), self.numbers[lanes].shape) != 0xFFFFFFFF
        if some.any():
            self.report("expected all lanes as members", instruction, self.numbers[lanes][some])

    def run(self) -> None:
        ready: dict[int, Lanes] = {0: ALL}  # place in the code -> the lanes that go on there
        waiting: dict[int, Lanes] = {}  # at a barrier
        while ready or waiting:
            if not ready:
                ready, waiting = self.opened(waiting), {}
            place = min(ready)
            self.go(place, ready.pop(place), ready, waiting)

    def go(self, place: int, lanes: Lanes, ready: dict[int, Lanes], waiting: dict[int, Lanes]) -> None:
        """Runs lanes until they part, wait, return, or come to where other lanes are."""
        stop, code = min(ready, default=len(self.code.steps)), self.code
        while place < stop:
            code.reached[place] = 1
            control = code.controls[place]
            if self.flights.products:
                self.flights.check_registers(self, code.kernel.instructions[place], lanes)
            if control is None:
                code.steps[place](self, lanes)
                place += 1
                continue
            holds = self.holding(place, lanes)
            if not holds.all():
                self.add(ready, place + 1, self.numbers[lanes][~holds])
                lanes, stop = self.numbers[lanes][holds], place + 1
            if not len(holds) or not holds.any() or control == "ret":
                return
            if control == "bar":
                self.add(waiting, place, lanes)
                return
            if control <= place:
                self.jumps_back += 1
                if self.jumps_back > JUMPS_BACK:
                    raise EndlessLoopError(f"{code.kernel.instructions[place]}")
                if self.machine.at_jump_back:
                    self.machine.at_jump_back(self, place, lanes)
            place = control
        if place < len(code.steps):
            self.add(ready, place, lanes)

    def holding(self, place: int, lanes: Lanes) -> np.ndarray:
        """Returns for which lanes an instruction's predicate holds."""
        instruction = self.code.kernel.instructions[place]
        if instruction.predicate is None:
            return np.ones(1, bool)
        return self.registers["pred"][instruction.predicate.index][lanes] != instruction.negated

    def add(self, groups: dict[int, Lanes], place: int, lanes: Lanes) -> None:
        """Adds lanes to those at a place."""
        if place in groups:
            lanes = np.sort(np.concatenate([groups[place], lanes]))
        groups[place] = ALL if not isinstance(lanes, slice) and len(lanes) == self.size else lanes

    def opened(self, waiting: dict[int, Lanes]) -> dict[int, Lanes]:
        """Opens the barriers, and returns where their lanes go on."""
        for place, lanes in waiting.items():
            count = np.bincount(self.program_of[lanes], minlength=len(self.programs))
            some = (count != self.launch.threads)[self.program_of[lanes]]
            if some.any():
                kind = "the barrier is not reached by all threads of the program"
                self.report(kind, self.code.kernel.instructions[place], self.numbers[lanes][some])
            self.open_barrier(lanes)
        return {place + 1: lanes for place, lanes in waiting.items()}


def _dtype(kind: str) -> str:
    return {"b": "u", "u": "u", "s": "i", "f": "f"}[kind[0]] + str(int(kind[1:]) // 8)
