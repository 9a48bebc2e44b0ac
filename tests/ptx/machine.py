"""A machine that runs launches of kernels in PTX.

A register is an array with a lane for each thread of a batch of programs. The lanes with the lowest
program counter run first, so that lanes that took different ways meet again where these join. A
barrier opens when no lane can go on. What no correct kernel does is reported as a hazard, and
execution goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ptx import elementwise, wgmma  # noqa: F401 (elementwise adds its instructions)
from ptx.instructions import step_of
from ptx.memory import (
    LANE_BITS,
    PROGRAM_SHIFT,
    THREAD_BITS,
    Access,
    GlobalMemory,
    Memory,
    SharedMemory,
)
from ptx.numbers import BANKS, POISON
from ptx.parse import Instruction, Kernel, UnknownPTXError

WARP = 32
BATCH = 8192  # lanes that run together, at least one program
JUMPS_BACK = 1 << 17  # at most, of a batch
Lanes = slice | np.ndarray
Variant = Callable[[Kernel], Kernel]
ALL = slice(None)


class EndlessLoopError(Exception):
    pass


class LaunchError(Exception):
    """A launch that CUDA refuses."""


class Code:
    """A kernel made executable: a step for each instruction, and which instructions lanes have
    executed so far.

    variant: changes the kernel first.
    """

    def __init__(self, kernel: Kernel, variant: Variant | None = None):
        kernel = variant(kernel) if variant else kernel
        self.kernel, self.steps = kernel, []
        self.targets = [_target(instruction, kernel) for instruction in kernel.instructions]
        self.executed = [False] * len(kernel.instructions)
        # the bytes of the smallest accesses
        self.granules = {"global": 16, "shared": 16, "param": 16}
        wgmma.check_fences(kernel)
        for instruction in kernel.instructions:
            try:
                self.steps.append(step_of(instruction, self))
            except (UnknownPTXError, KeyError, AttributeError, ValueError) as error:
                raise UnknownPTXError(f"{kernel.name}, {instruction}: {error}") from error

    def accesses(self, space: str, size: int) -> None:
        """Notes that an instruction accesses so many bytes."""
        self.granules[space] = min(self.granules[space], size)


def _target(instruction: Instruction, kernel: Kernel) -> int | str | None:
    """Returns where a branch goes, "ret", "bar", or None for other instructions."""
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
        return (
            f"{self.kernel}: {self.kind}: {self.instruction} in {self.where} ({self.count} lanes)"
        )


@dataclass
class Machine:
    hazards: dict[tuple, Hazard] = field(default_factory=dict)
    shared_limit: int = 227 << 10  # bytes of a program at most

    def launch(
        self, code: Code, programs: int, threads: int, shared_bytes: int, values: Sequence
    ) -> Launch:
        """Runs a kernel. values: numpy's numbers, tensors or None, aligned as parameters."""
        tensors = [value for value in values if not isinstance(value, np.generic | None)]
        memory, parameters = GlobalMemory(tensors, code.granules["global"]), b""
        for value in values:
            if value is None:
                word = np.uint64(0)
            elif isinstance(value, np.generic):
                word = value
            else:
                word = np.uint64(memory.address(value))
            parameters += bytes(-len(parameters) % word.itemsize) + word.tobytes()
        assert len(parameters) <= code.kernel.parameter_bytes, code.kernel.name
        parameters = parameters.ljust(code.kernel.parameter_bytes, b"\0")
        launch = Launch(
            code, programs, threads, shared_bytes, np.frombuffer(parameters, np.uint8), memory
        )
        self.check_launch(launch)
        self.execute(launch)
        return launch

    def check_launch(self, launch: Launch) -> None:
        """Raises LaunchError for a launch that the kernel or the card does not allow."""
        kernel = launch.code.kernel
        for what, number, allowed in (
            ("threads", launch.threads, kernel.threads),
            ("bytes of shared memory", launch.shared_bytes, range(self.shared_limit + 1)),
            ("programs", launch.programs, range(1, 1 << 31)),
        ):
            if number not in allowed:
                raise LaunchError(
                    f"{kernel.name}: expected {allowed[0]} to {allowed[-1]} {what}, got {number}"
                )

    def execute(self, launch: Launch) -> None:
        size = max(1, BATCH // launch.threads)
        with np.errstate(all="ignore"):
            for first in range(0, launch.programs, size):
                programs = np.arange(first, min(first + size, launch.programs))
                Batch(self, launch, programs).run()
        launch.memory.write_back()


class Parameters(Memory):
    """The parameters of a kernel, which all lanes read."""

    def __init__(self, data: np.ndarray):
        self.data = data

    def load(self, access: Access, addresses: np.ndarray, size: int, count: int = 1) -> np.ndarray:
        return self.data[self.elements(addresses.astype(np.int64), 1, size * count)].view(
            f"u{size}"
        )


class Batch:
    """Programs of a launch that run together."""

    def __init__(self, machine: Machine, launch: Launch, programs: np.ndarray):
        self.machine = machine
        self.launch = launch
        self.code = launch.code
        self.programs = programs
        threads = launch.threads
        self.size = len(programs) * threads
        self.numbers = np.arange(self.size)  # of lanes
        self.program_of = self.numbers // threads  # among these
        self.thread, program = self.numbers % threads, programs[self.program_of]
        counts = self.code.kernel.registers
        self.registers = {
            bank: np.full((counts[bank], self.size), POISON[bank], word)
            for bank, word in BANKS.items()
        }
        special = {
            "tid.x": self.thread,
            "ctaid.x": program,
            "ntid.x": threads,
            "nctaid.x": launch.programs,
        }
        self.special = {
            name: np.full(self.size, values, np.uint32) for name, values in special.items()
        }
        shared = SharedMemory(
            launch.shared_bytes, len(programs), self.size, self.code.granules["shared"]
        )
        self.memory = {
            "global": launch.memory,
            "shared": shared,
            "param": Parameters(launch.parameters),
        }
        # of a shadow word
        self.owner = (
            program << PROGRAM_SHIFT | self.thread // WARP << LANE_BITS | self.thread % WARP
        )
        self.time, self.jumps_back = 0, 0
        # shadow words of the lane's program from the last barrier on are not less, and of the
        # lane's warp from the last bar.warp.sync on
        self.limit = np.zeros(self.size, np.int64)
        self.warp_limit = np.zeros(self.size, np.int64)
        self.open_barrier(ALL)
        self.flights = wgmma.Flights(self)

    def open_barrier(self, lanes: Lanes) -> None:
        self.sync_warps(lanes)
        self.limit[lanes] = self.warp_limit[lanes]

    def sync_warps(self, lanes: Lanes) -> None:
        self.time += 1
        self.warp_limit[lanes] = (
            self.owner[lanes] >> PROGRAM_SHIFT << PROGRAM_SHIFT | self.time << THREAD_BITS
        )

    def access(self, instruction: Instruction, lanes: Lanes) -> Access:
        self.time += 1
        return Access(self, instruction, self.numbers[lanes])

    def report(self, kind: str, instruction: Instruction, lanes: np.ndarray) -> None:
        name, thread = self.code.kernel.name, self.thread[lanes[0]]
        where = (
            f"program {self.programs[self.program_of[lanes[0]]]}, warp {thread // WARP}, lane "
            f"{thread % WARP}"
        )
        hazard = self.machine.hazards.setdefault(
            (name, kind, instruction.line), Hazard(name, kind, instruction, where)
        )
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

    def expect_all_members(self, instruction: Instruction, lanes: Lanes, masks: np.ndarray) -> None:
        """Reports lanes whose mask of members is not all of a warp."""
        if (masks != 0xFFFFFFFF).any():
            self.report(
                "expected all lanes as members",
                instruction,
                self.numbers[lanes][masks != 0xFFFFFFFF],
            )

    def run(self) -> None:
        ready: dict[int, Lanes] = {0: ALL}  # place in the code -> the lanes that go on there
        waiting: dict[int, Lanes] = {}  # at a barrier
        while ready or waiting:
            if not ready:
                ready, waiting = self.opened(waiting), {}
            place = min(ready)
            self.go(place, ready.pop(place), ready, waiting)

    def go(
        self, place: int, lanes: Lanes, ready: dict[int, Lanes], waiting: dict[int, Lanes]
    ) -> None:
        """Runs an instruction, and adds its lanes to those that are ready or waiting."""
        target, instruction = self.code.targets[place], self.code.kernel.instructions[place]
        if self.flights.products:
            self.flights.check_registers(self, instruction, lanes)
        taken, others = self.parted(instruction, lanes)
        if target is not None or taken is not None:
            self.code.executed[place] = True  # a branch also where no lane takes it
        if target is None:
            if taken is not None:
                self.code.steps[place](self, taken)
            self.add(ready, place + 1, lanes)
            return
        self.add(ready, place + 1, others)
        if taken is None or target == "ret":
            return
        if target == "bar":
            self.add(waiting, place, taken)
            return
        if target <= place:
            self.jump_back(place)
        self.add(ready, target, taken)

    def parted(self, instruction: Instruction, lanes: Lanes) -> tuple[Lanes | None, Lanes | None]:
        """Returns the lanes whose predicate holds, and the others; None for no lanes."""
        if instruction.predicate is None:
            return lanes, None
        holds = self.registers["pred"][instruction.predicate.index][lanes] != instruction.negated
        if holds.all():
            return lanes, None
        if not holds.any():
            return None, lanes
        return self.numbers[lanes][holds], self.numbers[lanes][~holds]

    def jump_back(self, place: int) -> None:
        self.jumps_back += 1
        if self.jumps_back > JUMPS_BACK:
            raise EndlessLoopError(f"{self.code.kernel.instructions[place]}")

    def add(self, groups: dict[int, Lanes], place: int, lanes: Lanes | None) -> None:
        """Adds lanes to those at a place."""
        if lanes is None:
            return
        if place in groups:
            lanes = np.sort(np.concatenate([groups[place], lanes]))
        if not isinstance(lanes, slice) and len(lanes) == self.size:
            lanes = ALL
        groups[place] = lanes

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
