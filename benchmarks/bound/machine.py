"""Machine code of the kernels that launchers start, for an architecture that is not here, and how often its parts run."""

from __future__ import annotations

import functools
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.utils._pytree import tree_leaves

from benchmarks.bound import ptx, sass
from benchmarks.bound.trace import Launch, Stand

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
import triton  # noqa: E402
from gates import gate  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

SAMPLES = 8  # blocks of a grid whose threads are run


@dataclass
class Machine:
    """A kernel for one architecture."""

    name: str
    registers: int
    shared: int
    stack: int
    warps: int
    code: sass.Code
    program: ptx.Kernel
    signature: dict = field(default_factory=dict)

    def blocks(self, architecture: int) -> int:
        return gate.blocks_per_multiprocessor(architecture, self.registers, self.shared, self.warps)


@dataclass
class Work:
    """The work of a launch: the instructions of each part that a warp executes, and bytes of all blocks."""

    executed: list[sass.Part]
    asked: dict[str, dict[int, int]] = field(
        default_factory=dict
    )  # by "read" or "written", then by tensor: bytes that warps access
    reached: dict[str, dict[int, int]] = field(default_factory=dict)  # likewise: bytes that these accesses extend over
    exact: bool = True  # False: the loops of machine code and PTX could not be told apart


class _Elsewhere:
    """A stand-in for Triton's driver, with a device of this architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:  # Triton keeps kernels by this number
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Launch, architecture: int) -> Machine:
    """Compiles the kernel of a launch for an architecture, or finds it in Triton's cache."""
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Elsewhere(architecture))
    try:
        found = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    finally:
        triton.runtime.driver._active = before
    return _machine(found.hash, found, architecture)


@functools.cache
def _disassembled(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return gate.disassemble(Path(file.name))


_MACHINES: dict[tuple[str, int], Machine] = {}


def _machine(key: str, found, architecture: int) -> Machine:
    if (key, architecture) not in _MACHINES:
        usage, code = _disassembled(found.asm["cubin"])
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        _MACHINES[key, architecture] = Machine(
            found.metadata.name, registers, found.metadata.shared, stack, found.metadata.num_warps, sass.parse(code),
            ptx.Kernel(found.asm["ptx"]),
        )  # fmt: skip
    machine = _MACHINES[key, architecture]
    machine.signature = found.src.signature
    return machine


def tensors_of(launch: Launch) -> list[Stand]:
    return [t for t in tree_leaves((launch.args, launch.options)) if isinstance(t, Stand)]


def values(launch: Launch, signature: dict) -> tuple[dict[int, int], list[Stand]]:
    """Returns the values of the kernel's parameters, and the tensors of its pointers in order of their numbers."""
    names = launch.kernel.arg_names
    given = {**dict(zip(names, launch.args)), **launch.options}
    found: dict[int, int] = {}
    tensors: list[Stand] = []

    def add(kind, value) -> None:
        if isinstance(kind, (tuple, list)):
            for each in zip(kind, value):
                add(*each)
        elif kind != "constexpr":
            at = ptx.parameter(len(found))
            if isinstance(value, Stand):
                found[at] = ptx.pointer(len(tensors))
                tensors.append(value)
            else:
                found[at] = int(value) & (1 << 64) - 1 if isinstance(value, int) else 0

    for name in names:
        add(signature[name], given.get(name))
    return {at: value & 0xFFFFFFFF if value < 1 << 33 or value >> 63 else value for at, value in found.items()}, tensors


def sampled(grid: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields blocks that are spread evenly over a grid, from its first to its last."""
    count = math.prod(grid)
    for n in sorted({round(each * (count - 1) / (SAMPLES - 1)) for each in range(SAMPLES)}):
        yield tuple(n // math.prod(grid[:axis]) % grid[axis] for axis in range(len(grid)))


def work(machine: Machine, launch: Launch) -> Work:
    """Computes the work of a launch by running a few of its threads."""
    parameters, tensors = values(launch, machine.signature)
    threads, programs = machine.warps * 32, math.prod(launch.grid)
    blocks = list(sampled(launch.grid))
    runs, first = [], []
    for block in blocks:
        of_block = [
            machine.program.run(parameters, block, t, launch.grid, threads) for t in (0, threads // 2 - 1, threads - 1)
        ]
        runs += of_block
        first.append(of_block[0])
    counts = Counter({at: sum(run.counts[at] for run in first) / len(first) for at in range(len(machine.program.blocks))})
    executed, exact = matched(machine.code, machine.program, counts)
    out = Work(executed, exact=exact)
    warp = [machine.program.run(parameters, blocks[len(blocks) // 2], t, launch.grid, threads) for t in (0, 1, 2, 4, 8, 16)]
    for side in ("read", "written"):
        places = {place for run in runs for place in getattr(run, side) if 0 <= place < len(tensors)}
        asked, reached = {}, {}
        for place in places:
            found = [getattr(run, side)[place] for run in runs if place in getattr(run, side)]
            share = _distinct([getattr(run, side).get(place, ptx.Reached()) for run in warp])
            asked[place] = round(sum(each.bytes for each in found) / len(runs) * threads * programs * share)
            tensor = tensors[place]
            extent = max(each.end for each in found) - min(each.lowest for each in found)
            reached[place] = min(asked[place], extent, tensor.touched()[1])
        out.asked[side], out.reached[side] = asked, reached
    return out


def _distinct(lanes: list[ptx.Reached]) -> float:
    """Returns the share of a warp's bytes that is left if lanes with the same address count once.

    Lanes 0, 1, 2, 4, 8 and 16 decide: if lane 2^k has the address of lane 0, so have all lanes that differ in bit k alone.
    """
    zero, *others = (lane.first for lane in lanes)
    if not zero or any(len(other) != len(zero) for other in others):
        return 1.0
    left = sum(of_lanes[0][1] / 2 ** of_lanes[1:].count(of_lanes[0]) for of_lanes in zip(zero, *others))
    return left / sum(size for _, size in zero)


def matched(code: sass.Code, program: ptx.Kernel, counts: Counter[int]) -> tuple[list[sass.Part], bool]:
    """Returns the instructions that a warp executes in each part of the machine code, by the counts of the PTX's blocks; and
    whether both have equally many loops.

    Loops keep their order. A loop that ptxas unrolled k times has k times the matrix instructions, and runs k times less.
    A loop that is two in PTX, since its branches return to two places, has the instructions of both. In a part with branches,
    each pipe executes the same share of its instructions as in PTX. Where a branch depends on numbers that were read, a
    comparison of floats holds, and an integer is 0.
    """
    theirs = [program.products(loop.own) for loop in program.loops]
    own = [part.products for part in code.parts[1:]]
    exact = len(theirs) == len(own)
    pairs: dict[int, int] = dict(enumerate(range(len(own))))
    if not exact:
        pairs = {}
        for with_products in (True, False):
            rest = [n for n, count in enumerate(theirs) if bool(count) == with_products]
            pairs |= zip((k for k, count in enumerate(own) if bool(count) == with_products), rest)
    inside = {at for loop in program.loops for at in range(loop.first, loop.last + 1)}
    outside = [at for at in range(len(program.blocks)) if at not in inside]
    executed = [_shared(code.parts[0], program, outside, counts, 1.0)]
    for k, part in enumerate(code.parts[1:]):
        if k not in pairs:
            executed.append(part)
            continue
        loop, count = program.loops[pairs[k]], theirs[pairs[k]]
        inner = (program.loops[n] for n in set(range(len(theirs))) - set(pairs.values()) if not theirs[n])
        blocks = [*loop.own, *(at for other in inner if loop.first <= other.first <= loop.last for at in other.own)]
        runs = max(counts[at] for at in blocks)
        executed.append(_shared(part, program, blocks, counts, runs * (count / own[k] if count and own[k] else 1)))
    return executed, exact


def _shared(
    part: sass.Part, program: ptx.Kernel, blocks: Sequence[int], counts: Counter[int], times: float
) -> sass.Part:  # fmt: skip
    """Returns the part's instructions, `times` times, scaled for each pipe by the share of its PTX in `blocks` that runs."""
    runs = max((counts[at] for at in blocks), default=0) or 1
    there: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for at in blocks:
        for instruction in program.blocks[at].instructions:
            if code := sass.of_ptx(instruction):
                for name in (sass.pipe(code), "all"):
                    there[name] += 1
                    ran[name] += counts[at] / runs  # type: ignore[assignment]

    def share(code: str) -> float:
        name = sass.pipe(code)
        name = name if there[name] and name != "issue" else "all"
        return ran[name] / there[name] if there[name] else 1.0

    return sass.Part(Counter({code: n * times * share(code) for code, n in part.codes.items()}))  # type: ignore[misc]
