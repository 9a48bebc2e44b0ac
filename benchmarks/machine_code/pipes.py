"""The pipes of a multiprocessor, and the share of the data sheet's tensor rate that a kernel's
machine code allows.

The model of a tile: the busiest pipe is never idle, if enough programs share a multiprocessor that
one's latencies and epilogue hide behind the products of others. Times are cycles of a
multiprocessor. It knows no bank conflicts, no waves of programs, and no DRAM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.machine_code.sass import LANES, Instruction, counts, tensor_instructions
from gates.gate import LIMITS

ARCHITECTURES = tuple(LIMITS)


@dataclass(frozen=True)
class Constant:
    """A property of a multiprocessor, in the order of ARCHITECTURES, and who says so."""

    values: tuple[float, ...]
    source: str

    def __getitem__(self, architecture: int) -> float:
        return self.values[ARCHITECTURES.index(architecture)]


_GUIDE = "CUDA C++ Programming Guide, arithmetic throughput; 120 as 89, assumed"
CONSTANTS = {
    "tensor": Constant(
        (1024, 256, 256, 2048, 256),
        "multiply-adds a clock of bfloat16, summed in float32: data sheets of A100, RTX 3090, RTX "
        "4090, H100, RTX 5090 by their multiprocessors and clocks",
    ),
    "mma.sync": Constant(
        (1024, 256, 256, 1270, 256),
        "as `tensor`, but 62 % of it on an H100, which needs wgmma for more: arXiv 2402.13499",
    ),
    # results a clock
    "issue": Constant((128,) * 5, "four schedulers of a warp each; tuning guides"),
    "fp32": Constant((64, 128, 128, 128, 128), _GUIDE),
    "imad": Constant((64,) * 5, _GUIDE),
    "alu": Constant((64,) * 5, _GUIDE),
    "mufu": Constant((16,) * 5, _GUIDE),
    "shuffle": Constant((32,) * 5, _GUIDE),
    "shared": Constant((128,) * 5, "bytes a clock: 32 banks of 4; CUDA C++ Programming Guide"),
    "l2": Constant(
        (35.5, 17.0, 15.2, 35.0, 15.3),
        "bytes a clock read: 80 and 89: cp.async on an A100 and an RTX 4090, "
        "smallscientist1/cuda_microbenchmark, 3,840 and 1,946 B; 86 and 90: RRZE-HPC/gpu-benches, "
        "an A40's 2,430 GB/s at 1.74 GHz (an RTX 3090 has the same cache and 82 multiprocessors) "
        "and an H100 PCIe's 7,000 GB/s at 1.755 GHz; 120: the 4090's by the width of the memory "
        "bus, assumed",
    ),
    "l2 share": Constant((0.9,) * 5, "of these bytes, beside other work; assumed"),
    "l2 latency": Constant(
        (211, 277, 277, 266, 360),
        "cycles: 80, 89 and 90: RRZE-HPC/gpu-benches (A100, L40, H100 PCIe); 86 as 89, assumed; "
        "120: markdewing/AI_kernels (RTX 5090)",
    ),
    "exposed": Constant(
        (60, 60, 60, 0, 100),
        "cycles from a step's barrier to its first product, in which a program alone multiplies "
        "nothing; Triton loads operands ahead for 80 to 89, wgmma runs on; assumed",
    ),
    "issue share": Constant((0.8,) * 5, "of the issue, in code without products; assumed"),
}


def cycles(asked: Counter[str], warps: int, architecture: int) -> dict[str, float]:
    """Returns the cycles of each pipe for what each of `warps` warps asks, by sass.counts."""

    def take(unit: str, lanes: int = LANES) -> float:
        return asked[unit] * warps * lanes / CONSTANTS[unit][architecture]

    return {
        "tensor": take("tensor", 1) + take("mma.sync", 1),  # wgmma, and others
        "issue": take("issue"),
        "fma": take("fp32") + take("imad"),
        "alu": take("alu"),
        "mufu": take("mufu"),
        # both go through the same crossbar
        "shared": take("shared", 1) + take("shuffle"),
    }


@dataclass(frozen=True)
class Program:
    """The resources of a program: a block of threads."""

    architecture: int
    warps: int
    stages: int  # a step's copies to shared memory start `stages` - 1 steps before it
    resident: int  # programs on a multiprocessor


@dataclass(frozen=True)
class Phase:
    """Instructions that each warp executes `steps` times."""

    code: Sequence[Instruction]
    steps: float = 1.0
    moved: float = 0.0  # bytes from and to the L2 cache, of all steps together
    products: bool = False  # whether it is a loop of products


@dataclass(frozen=True)
class Prediction:
    """What the model says of a kernel; times of pipes are in units of its tensor cores' time."""

    share: float  # of the data sheet's tensor rate
    bound: str  # by which pipe, or "latency"
    products: dict[str, float]  # of the phases of products
    rest: dict[str, float]  # of the others
    per_mma: float  # instructions of a warp for a tensor-core instruction, in these phases
    elsewhere: float  # instructions of a warp in the others


def predict(program: Program, phases: Sequence[Phase], macs: float) -> Prediction:
    """Predicts a kernel whose programs go through these phases, of which `macs` are useful."""
    constant = {name: each[program.architecture] for name, each in CONSTANTS.items()}
    times: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    issued = {True: 0.0, False: 0.0}
    multiplied = 0.0
    alone = 0.0  # the time of a program that has a multiprocessor for itself
    for phase in phases:
        asked = counts(phase.code)
        of_step = cycles(asked, program.warps, program.architecture)
        took = {pipe: phase.steps * time for pipe, time in of_step.items()}
        took["l2"] = phase.moved / (constant["l2"] * constant["l2 share"])
        waits = [took["issue"] / constant["issue share"]]
        if phase.products:
            copies = phase.steps * constant["l2 latency"] + phase.moved / constant["l2"]
            waits = [
                took["tensor"] + phase.steps * constant["exposed"],
                copies / max(1, program.stages - 1),
            ]
        alone += max(*waits, *took.values())
        times[phase.products].update(took)
        issued[phase.products] += phase.steps * asked["issue"]
        if phase.products:
            multiplied += phase.steps * tensor_instructions(phase.code)
    tensor = macs / constant["tensor"]
    total = times[True] + times[False]
    total["latency"] = alone / program.resident
    bound = max(total, key=lambda name: total[name])
    return Prediction(
        tensor / total[bound],
        bound,
        {pipe: time / tensor for pipe, time in times[True].items()},
        {pipe: time / tensor for pipe, time in times[False].items()},
        issued[True] / multiplied,
        issued[False],
    )
