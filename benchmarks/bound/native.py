"""Kernels of the CUDA extension: the instructions of one block, counted in the PTX that nvcc makes of csrc/cuda."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bound import ptx, sass
from benchmarks.bound.assumed import Multiprocessor
from benchmarks.bound.machine import gate
from benchmarks.bound.trace import Step
from simplclip.ops import backends

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda" / "attention"
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "tf32"}
# The structs of csrc/cuda/attention/attention.h: views of q, k, v (32 bytes each), three pointers, numbers; then more views.
VIEW, NUMBERS, POINTERS = 32, 120, (96, 104, 112)
DIRECTIONS = {"fwd": (1, 184), "bwd": (4, 280)}  # number of these views, and bytes of the struct


@dataclass
class ExtensionLaunch:
    """A launch of a kernel of the CUDA extension."""

    name: str
    registers: int
    shared: int
    warps: int
    programs: int
    multiply_adds: float  # of a block, in tensor cores
    memory: int  # bytes of all blocks
    codes: Counter[str]  # instructions that the warps of a block execute together, as machine code calls them
    stack: int = 0

    @property
    def alone(self) -> float:
        """Instructions of one warp, without products."""
        return sum(n for code, n in self.codes.items() if sass.pipe(code) != "tensor") / self.warps

    def resident(self, architecture: int) -> int:
        return gate.blocks_per_multiprocessor(architecture, self.registers, self.shared, self.warps)

    blocks = resident


def clocks(kernel: ExtensionLaunch, unit: Multiprocessor, rate: Callable[[str], float]) -> dict[str, float]:
    return sass.Part(kernel.codes).clocks(1, unit, rate)


@functools.cache
def built(source: str, architecture: int) -> tuple[str, str]:
    """Returns the PTX and resource usage of a source. Keeps both in build/bound by the contents of all sources."""
    if not shutil.which("nvcc"):
        raise RuntimeError(
            f"{source}: expected nvcc, which compiles the CUDA extension's kernels for sm_{architecture}, got none"
        )
    content = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc" / "cuda").rglob("*.*")))
    name = hashlib.sha256(content).hexdigest()[:16]
    kept = ROOT / "build" / "bound" / f"{Path(source).stem}-sm{architecture}-{name}"
    if not kept.with_suffix(".usage").exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            options = ["-cubin", f"-arch=sm_{architecture}", "-O3", "-std=c++20", "--keep", "--keep-dir", folder]
            cubin = Path(folder) / "out.cubin"
            subprocess.run(["nvcc", *options, SOURCES / source, "-o", cubin], check=True, capture_output=True, cwd=folder)
            usage, _ = gate.disassemble(cubin)
            text = next(Path(folder).glob("*.ptx")).read_text()
        kept.with_suffix(".ptx").write_text(text)
        kept.with_suffix(".usage").write_text(usage)
    return kept.with_suffix(".ptx").read_text(), kept.with_suffix(".usage").read_text()


@functools.cache
def _kernel(source: str, architecture: int, part: str) -> tuple[str, ptx.Kernel, int, int]:
    """Returns symbol, PTX, registers and static shared memory of the kernel whose symbol contains `part`."""
    text, usage = built(source, architecture)
    for entry in re.split(r"(?=\.visible \.entry)", text)[1:]:
        symbol = re.match(r"\.visible \.entry (\w+)", entry)[1]
        if part in symbol:
            found = re.search(rf"Function {symbol}:\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
            return symbol, ptx.Kernel(entry), int(found[1]), int(found[2])
    raise RuntimeError(f"{source}: expected a kernel {part}, got none")


def kernels(step: Step, architecture: int) -> list[ExtensionLaunch]:
    """Returns the launches of a call of shaped_attention."""
    direction, call = step.launch.op.removeprefix("shaped_attention_"), step.launch.call
    if direction not in DIRECTIONS:
        raise NotImplementedError(f"{step.launch.op}: expected shaped_attention_fwd or _bwd of the CUDA extension")
    batch, length, heads, width = call.q.shape
    dtype = TYPES[call.q.dtype]
    plan = backends.cuda_extension.shaped_attention_plan(length, width, dtype == "tf32", direction == "bwd")
    part = f"shaped_attention_{plan['kernel']}_kernelINS0_{len(dtype)}{dtype}E"
    _, program, registers, static = _kernel(f"{dtype}.cu", architecture, part)
    programs = batch * heads
    codes: Counter[str] = Counter()
    parameters = _parameters(call, plan, direction)
    for warp in range(plan["threads"] // 32):
        run = program.run(parameters, (0, 0), 32 * warp, (programs, 1), plan["threads"])
        for at, times in enumerate(run.counts):
            for instruction in program.blocks[at].instructions if times else ():
                if code := sass.of_ptx(instruction):
                    codes[code] += times
    memory = sum(size for _, size in (*step.operands, *step.written))
    name = f"shaped_attention_{plan['kernel']}"
    multiply_adds = sass.Part(codes).multiply_adds
    shared, warps = plan["shared"] + static, plan["threads"] // 32
    out = [ExtensionLaunch(name, registers, shared, warps, programs, multiply_adds, memory, codes)]
    if direction == "bwd":
        sums = Counter({"FADD": -(-batch // 32)})
        out.append(ExtensionLaunch("shaped_attention_gains", 32, 0, 1, 3 * heads, 0, 12 * programs, sums))
    return out


def _parameters(call, plan: dict, direction: str) -> dict[int, int]:
    base = ptx.parameter(0)
    after, size = DIRECTIONS[direction]
    given = ((call.q, call.k, call.v), (call.q,) * after)
    found = {}
    for first, tensors in zip((0, size - after * VIEW - 8), given):
        for n, tensor in enumerate(tensors):
            at = base + first + n * VIEW
            strides = [step * tensor.itemsize for step in tensor.stride()[:3]]
            found |= {at: ptx.pointer(len(found)), **{at + 8 * (k + 1): step for k, step in enumerate(strides)}}
    for n, at in enumerate(POINTERS):
        found[base + at] = 0 if at == 104 and call.lengths is None else ptx.pointer(100 + n)
    batch, length, heads, width = call.q.shape
    found |= {base + NUMBERS + 4 * n: value for n, value in enumerate((batch, length, heads, width, 0))}
    found |= {base + 140: int(call.causal), base + size - 8: plan["slice"] if direction == "fwd" else ptx.pointer(200)}
    return found
