"""Predicted times, never measured: a kernel takes the time of its slowest pipe, a call the sum over its kernels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.bound import machine, native
from benchmarks.bound.assumed import (
    CUBLAS_DEPTH,
    CUBLAS_TILE,
    DEPENDENT,
    FLASH,
    FLASH_BLOCK,
    HOST_US,
    LAUNCH_US,
    MMA_SYNC_SM90,
    MULTIPROCESSORS,
    SUSTAINED,
)
from benchmarks.bound.cards import CARDS, Card
from benchmarks.bound.trace import Stand, Step


@dataclass
class Estimate:
    """The predicted cost of one kernel."""

    ms: float
    pipe: str
    flops: float = 0
    bytes: int = 0  # of memory, without operands and blocks
    operands: int = 0  # bytes that products read
    blocks: int = 0  # bytes that kernels write for later products: blocks of a similarity matrix, a hidden layer
    l2: int = 0
    exact: bool = True

    @property
    def moved(self) -> int:
        """Bytes from and to memory."""
        return self.bytes + self.operands + self.blocks


@dataclass
class Clocks:
    """Clocks of one block on a multiprocessor, by pipe."""

    total: dict[str, float]
    sequence: float  # its parts one after the other
    largest: tuple[str, ...]  # the pipes of its two longest parts

    @classmethod
    def of(cls, parts: Iterable[tuple[dict[str, float], float]]) -> Clocks:
        """Sums parts, each with its clocks by pipe and the clocks that one warp alone takes for it."""
        total: Counter[str] = Counter()
        longest = []
        for part, alone in parts:
            total.update(part)
            longest.append(max((alone, "latency"), *((clocks, pipe) for pipe, clocks in part.items())))
        longest.sort(reverse=True)
        return cls(dict(total), sum(clocks for clocks, _ in longest), tuple(dict.fromkeys(pipe for _, pipe in longest[:2])))

    def together(self, blocks: int) -> tuple[float, str]:
        """Returns the clocks of some blocks that share a multiprocessor, and the pipe that bounds them.

        The parts of one block follow each other; parts of different blocks overlap.
        """
        clocks, pipe = max((blocks * clocks, pipe) for pipe, clocks in self.total.items())
        return (clocks, pipe) if clocks >= self.sequence else (self.sequence, " then ".join(self.largest))


def peak(card: Card, dtype: torch.dtype | None) -> float:
    """Returns the peak TFLOP/s of products; for float32 in the precision that torch is set to."""
    if dtype == torch.float32:
        return card.tf32 if torch.backends.cuda.matmul.fp32_precision == "tf32" else card.float32
    return card.half


def _up(count: int, of: int) -> int:
    return -(-count // of) * of


class Predictor:
    """Predicts the cost of kernels on one card."""

    def __init__(self, name: str) -> None:
        self.card, self.unit = CARDS[name], MULTIPROCESSORS[CARDS[name].architecture]
        product, self.memory, self.l2 = SUSTAINED[name]
        self.share = product / self.card.half
        self.case = ""  # name of the predicted call
        self._known: dict[tuple, tuple] = {}
        self.kernels: dict[
            tuple, tuple
        ] = {}  # by name, registers, shared memory and dtype: case, name, machine code, work, clocks, estimate

    def rate(self, code: str) -> float:
        """Returns the multiply-adds of a multiprocessor's tensor cores in a clock, for an instruction."""
        card = self.card
        tflops = card.tf32 if "TF32" in code else card.half
        share = MMA_SYNC_SM90 if card.architecture == 90 and not code.startswith(("HGMMA", "QGMMA")) else 1.0
        return tflops * 1e3 / 2 / card.multiprocessors / card.ghz * self.share * share

    def on_multiprocessors(self, clocks: Clocks, programs: int, resident: int) -> tuple[float, str]:
        """Returns the milliseconds of a grid, and the pipe that bounds it."""
        at_once = self.card.multiprocessors * max(resident, 1)
        full, rest = divmod(programs, at_once)
        time, pipe = clocks.together(max(resident, 1))
        last, of_last = clocks.together(-(-rest // self.card.multiprocessors)) if rest else (0.0, pipe)
        return (full * time + last) / self.card.ghz / 1e6, pipe if full else of_last

    def torch(self, step: Step) -> Estimate:
        moved = sum(size for _, size in (*step.read, *step.written))
        operands = sum(size for _, size in step.operands)
        memory = (moved + operands) / self.memory / 1e9
        ms, flops = 0.0, 2.0 * step.multiply_adds
        if flops:
            tflops = peak(self.card, step.dtype) * self.share
            m, n, k = step.shape
            if step.name.startswith(("_scaled", "_flash", "_efficient")):
                padded = _up(m, FLASH_BLOCK) * _up(n, FLASH_BLOCK) / (m * n)
                ms = flops * padded / (FLASH * tflops) / 1e9
            else:
                batch = step.multiply_adds // (m * n * k)
                units = batch * (_up(m, CUBLAS_TILE) // CUBLAS_TILE) * (_up(n, CUBLAS_TILE) // CUBLAS_TILE)
                units *= max(1, k // CUBLAS_DEPTH)
                ms = flops / tflops / 1e9 * _up(units, self.card.multiprocessors) / units
        times = {"tensor": ms, "memory": memory, "launch": LAUNCH_US / 1e3}
        pipe = max(times, key=lambda name: times[name])
        return Estimate(times[pipe], pipe, flops, moved, operands)

    def _analysed(self, step: Step) -> tuple[machine.Machine, machine.Work, Clocks, list]:
        launch = step.launch
        tensors = machine.tensors_of(launch)
        shapes = tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)
        options = repr([v for v in launch.options.values() if not isinstance(v, (Stand, tuple, int))])
        key = (step.name, launch.grid, shapes, options)
        if key not in self._known:
            made = machine.compiled(launch, self.card.architecture)
            work = machine.work(made, launch)
            parts = []
            for part in work.executed:
                alone = 0 if part.products else DEPENDENT * part.codes.total()
                parts.append((part.clocks(made.warps, self.unit, self.rate), alone))
            clocks = Clocks.of(parts)
            self._known[key] = made, work, clocks
        made, work, clocks = self._known[key]
        return made, work, clocks, machine.values(launch, made.signature)[1]

    def own(self, step: Step, later: set[int]) -> Estimate:
        """Returns the estimate of a launch of Triton. later: storages that torch's products read."""
        made, work, clocks, tensors = self._analysed(step)
        programs = math.prod(step.launch.grid)
        resident = made.blocks(self.card.architecture)
        ms, pipe = self.on_multiprocessors(clocks, programs, resident)
        multiplies = sum(part.multiply_adds for part in work.executed) * made.warps
        out = Estimate(0, "", 2 * multiplies * programs, l2=sum(sum(side.values()) for side in work.asked.values()))
        out.exact = work.exact
        for place, size in work.reached["read"].items():
            if multiplies and tensors[place].dim() > 1:
                out.operands += size
            else:
                out.bytes += size
        for place, size in work.reached["written"].items():
            if multiplies and tensors[place].storage in later:
                out.blocks += size
            else:
                out.bytes += size
        self._finish(out, ms, pipe)
        key = step.name, made.registers, made.shared, str(step.dtype)
        self.kernels.setdefault(key, (self.case, step.name, made, work, clocks, out))
        return out

    def extension(self, step: Step) -> list[tuple[str, Estimate]]:
        """Returns the kernels of a call of the CUDA extension, with their estimates."""
        found = []
        for kernel in native.kernels(step, self.card.architecture):
            clocks = Clocks.of([(native.clocks(kernel, self.unit, self.rate), DEPENDENT * kernel.alone)])
            ms, pipe = self.on_multiprocessors(clocks, kernel.programs, kernel.resident(self.card.architecture))
            out = Estimate(0, "", 2.0 * kernel.multiply_adds * kernel.programs, l2=kernel.memory)
            out.operands, out.bytes = (kernel.memory, 0) if kernel.multiply_adds else (0, kernel.memory)
            self._finish(out, ms, pipe)
            found.append((kernel.name, out))
            key = kernel.name, kernel.registers, kernel.shared, str(step.dtype)
            self.kernels.setdefault(key, (self.case, kernel.name, kernel, None, clocks, out))
        return found

    def _finish(self, out: Estimate, ms: float, pipe: str) -> None:
        times = {pipe: ms, "memory": out.moved / self.memory / 1e9, "l2": out.l2 / self.l2 / 1e9, "launch": LAUNCH_US / 1e3}
        out.pipe = max(times, key=lambda name: times[name])
        out.ms = times[out.pipe]


@dataclass
class Row:
    """All kernels of a call that have one name."""

    name: str
    kind: str
    launches: int = 0
    sum: Estimate = field(default_factory=lambda: Estimate(0, ""))
    pipes: Counter[str] = field(default_factory=Counter)

    def add(self, each: Estimate) -> None:
        self.launches += 1
        self.pipes[each.pipe] += each.ms  # type: ignore[assignment]
        for name in ("ms", "flops", "bytes", "operands", "blocks", "l2"):
            setattr(self.sum, name, getattr(self.sum, name) + getattr(each, name))
        self.sum.exact &= each.exact

    @property
    def pipe(self) -> str:
        return max(self.pipes, key=lambda name: self.pipes[name]) if self.pipes else ""


def predict(steps: Sequence[Step], predictor: Predictor) -> list[Row]:
    """Returns a row for each name of a kernel, the slowest first."""
    later = {storage for step in steps if step.kind == "torch" and step.operands for storage, _ in step.operands}
    rows: dict[tuple[str, str], Row] = {}
    for step in steps:
        if step.kind == "host":
            continue
        if step.kind == "torch":
            found = [(step.name, predictor.torch(step))]
        elif step.kind == "triton":
            found = [(step.name, predictor.own(step, later))]
        else:
            found = predictor.extension(step)
        for name, each in found:
            rows.setdefault((step.kind, name), Row(name, step.kind)).add(each)
    return sorted(rows.values(), key=lambda row: -row.sum.ms)


def summary(rows: Sequence[Row], steps: Sequence[Step], card: Card, dtype: torch.dtype) -> dict:
    """Returns the columns of a whole call: time, bounds, bytes and numbers of kernels."""
    total = Row("", "")
    for row in rows:
        for name in ("ms", "flops", "bytes", "operands", "blocks", "l2"):
            setattr(total.sum, name, getattr(total.sum, name) + getattr(row.sum, name))
        total.launches += row.launches
        total.pipes.update(row.pipes)
    own = sum(row.launches for row in rows if row.kind != "torch")
    moved = total.sum.moved
    rates = {"products": total.sum.flops / peak(card, dtype) / 1e9,
             "memory": moved / card.bandwidth / 1e6}  # fmt: skip
    of = max(rates, key=lambda name: rates[name])
    return {
        "predicted_ms": round(total.sum.ms, 4),
        "pipe": total.pipe,
        "share_of_peak": round(rates[of] / total.sum.ms, 3) if total.sum.ms else 0.0,
        "of": of,
        "host_ms": round(total.launches * HOST_US / 1e3, 3),
        "tflop": round(total.sum.flops / 1e12, 4),
        "bytes": total.sum.bytes,
        "operand_bytes": total.sum.operands,
        "block_bytes": total.sum.blocks,
        "all_bytes": moved,
        "l2_bytes": total.sum.l2,
        "launches": total.launches,
        "own_kernels": own,
        "torch_kernels": total.launches - own,
        "host_copies": sum(step.kind == "host" for step in steps),
        "exact": all(row.sum.exact for row in rows),
    }
