"""Proves each op on each backend that a device has, with this machine's torch, Triton and driver.

A row of the proof is an op, a backend and a precision. Its calls have many sizes and options. Their values and gradients are
compared with float64, within the tolerance of `compare`. Unwritten memory is NaN. Inputs and incoming gradients lie between
NaNs, and neither may change. Repeated calls give equal bits, on a GPU also on another stream and from a CUDA graph. One call
of each op is compiled. The rows run in a process of their own, so that a crash is a failure of its row.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simplclip.common.errors import UserError
from simplclip.ops import backends
from simplclip.ops.checks import FLOATS
from simplclip.ops.registry import DISPATCH
from simplclip.selftest.calls import DRAW, LARGE
from simplclip.selftest.compare import TF32, Case, function_of, run

# For ops that have no row of their own in the table of backends: the ops whose backends they run.
PARTS: dict[str, tuple[str, ...]] = {"simplified_block": ("shaped_attention", "parallel_mlp")}
PARTS["similarity_loss"] = ("similarity_loss", "similarity_rows", "similarity_sigmoid", "similarity_terms")
PRECISIONS = {"float32": torch.float32, TF32: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS["float64"] = torch.float64
COMPILED = "torch.compile"  # in a row, in place of a backend
# The seeds of a row's random calls, among which every option occurs; with `full` a row has FULL times as many calls.
DRAWS = dict.fromkeys(DRAW, range(12)) | {"similarity_loss": range(300, 332)}
FULL = 10
REPEATED = 20  # runs of a row's first call (with `full`, of its first four calls); its other calls run twice
MOST = 3  # failures, after which a row ends
PATIENCE = 1800.0  # seconds that a row may take on a GPU
CRASHES = {-getattr(signal, name, 0) for name in ("SIGSEGV", "SIGILL", "SIGBUS", "SIGFPE", "SIGABRT")} - {0}


@dataclass
class Failure:
    what: str
    call: str = ""
    ran: list[str] = field(default_factory=list)  # keys of ops and backends that may be to blame, without the reference


@dataclass
class Row:
    op: str
    backend: str
    precision: str
    calls: int = 0
    worst: float = 0.0  # error in units of the tolerance
    failures: list[Failure] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def keys(self) -> list[str]:
        """The keys by which the ops that the row's backend runs can be taken out."""
        parts = () if self.backend == "reference" else self.parts
        return [backends.key(part, self.backend, self.dtype) for part in parts]

    @property
    def parts(self) -> list[str]:
        """The ops in the table of backends that the row's backend runs."""
        names = (name for part in PARTS.get(self.op, (self.op,)) for name in (part, f"{part}_fwd"))
        return [name for name in names if self.backend in backends.TABLE.get(name, ())]

    def serves(self, device: str, **facts: Any) -> bool:
        with _precision(self):
            missing = [backends.why_not(part, self.backend, device, self.dtype, **facts) for part in self.parts]
        return self.backend == COMPILED or bool(missing) and not any(missing)


def rows_of(device: str, full: bool, ops: Iterable[str]) -> list[Row]:
    """Returns the rows of the proof on this device, without making a call."""
    found = []
    with backends.with_taken_out({}):
        for row in (Row(*each) for each in itertools.product(ops, (*backends.NAMES, COMPILED), PRECISIONS)):
            of_precision = {TF32: device == row.backend == "cuda", "float64": row.backend == "reference"}
            wanted = of_precision.get(row.precision, True)
            if row.backend == COMPILED:
                wanted = row.precision == "float32" and (full or device == "cuda")
            if wanted and row.serves(device):
                found.append(row)
    return found


@contextlib.contextmanager
def _precision(row: Row) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = TF32 if row.precision == TF32 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


class Guarded:
    """A function that copies tensors between guards (NaN, or a number that no call uses), and finds those that changed."""

    def __init__(self, r: random.Random) -> None:
        self.r = r
        self.held: list[tuple[str, Tensor, Tensor]] = []

    def __call__(self, name: str, t: Tensor) -> Tensor:
        at = self.r.choice((3, 64))  # guard elements; 3 misaligns the tensor for vector loads
        rows_apart = t.dim() > 1 and self.r.random() < 0.4
        shape = (*t.shape[:-1], 2 * t.shape[-1]) if rows_apart else (t.numel() + 2 * at,)
        memory = t.new_full(shape, torch.nan if t.is_floating_point() else 987_654_321)
        view = memory[..., : t.shape[-1]] if rows_apart else memory[at:-at].view(t.shape)
        view.copy_(t)
        self.held.append((name, memory, memory.clone()))
        return view

    def changed(self) -> list[str]:
        """Returns the names of changed tensors. Bits are compared, since NaN does not equal NaN."""
        return [name for name, memory, before in self.held if not torch.equal(*(_bits(t) for t in (memory, before)))]


def _bits(t: Tensor) -> Tensor:
    return t.flatten().view(torch.uint8)


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Context of torch's deterministic mode, in which unwritten memory is NaN; its warnings are silenced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def cases(row: Row, device: str, full: bool) -> Iterator[Case]:
    """Yields the calls of a row: large calls, then random calls."""
    backend = "" if row.backend in (COMPILED, "reference") else row.backend
    large = [call for call in (make() for make in LARGE.values()) if call.op == row.op]
    large = large if full or device == "cuda" else large[:2]
    numbers = DRAWS[row.op]
    seeds = range(numbers.start, numbers.start + 10_000)  # many, since a backend may serve few sizes
    drawn = (DRAW[row.op](random.Random(f"{row.op} {seed}"), row.dtype) for seed in seeds)
    served = (call for call in itertools.chain(large, drawn) if row.serves(device, **call.facts()))
    count = 1 if row.backend == COMPILED else len(large) + len(numbers) * (FULL if full else 1)
    for number, call in enumerate(itertools.islice(served, count)):
        r = random.Random(number)
        needed = call.needed()
        need = needed if number < len(large) or r.random() < 0.5 else r.sample(needed, r.randint(0, len(needed)))
        yield Case(call, row.dtype, backend, need, number, device=device, lay_out=Guarded(r))


class Wrong(Exception):
    """The error for a wrong result; the message says which result is wrong and how."""


class WrongAside(Wrong):
    """The error for a use that training does not have (torch.compile, CUDA graphs), after which nothing is taken out."""


def _check_same(found: dict[str, Tensor], again: dict[str, Tensor], what: str) -> None:
    for name, value in found.items():
        if not torch.equal(_bits(value), _bits(again[name])):
            raise Wrong(f"{name}: {what} gave other values")


def _on_another_stream(case: Case) -> dict[str, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = case.run()
    torch.cuda.current_stream().wait_stream(stream)
    return found


@contextlib.contextmanager
def _aside(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise WrongAside(f"{what}: {error}") from error


def _from_a_graph(case: Case) -> dict[str, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run()
    for value in found.values():
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return found


def _compiled(case: Case) -> dict[str, Tensor]:
    """Returns the results of the compiled op; on a CPU without inductor, whose code would need a C++ compiler."""
    how = "inductor" if case.device == "cuda" else "aot_eager"
    function = torch.compile(function_of(case.call), backend=how, fullgraph=True)
    return run(function, case.call, case.tensors, case.need, case.incoming)


def _check_right(row: Row, case: Case, found: dict[str, Tensor]) -> None:
    for name, value in found.items():
        if not value.isfinite().all():
            raise Wrong(f"{name} is not finite")
    for name, of in case.deviations(found):
        row.worst = max(row.worst, min(of.units, 1e9))  # JSON has no infinity
        if not of.units <= 1:
            raise Wrong(f"{name}: {of}")


def _promises_bits(row: Row, device: str) -> bool:
    """Whether repeated calls give equal bits. On a GPU, sdpa and xformers use atomics; a block on Triton may use theirs."""
    return device == "cpu" or row.backend == "cuda" or (row.backend == "triton" and row.op != "simplified_block")


def check(case: Case, row: Row, times: int) -> None:
    """Checks a call. Raises Wrong, or an error of the backend. times: how often the call is run."""
    row.calls += 1
    with _precision(row), _poisoned():
        if row.backend == COMPILED:
            with _aside("compiled"):
                return _check_right(row, case, _compiled(case))
        found = case.run()
        _check_right(row, case, found)
        if _promises_bits(row, case.device):
            for number in range(1, times):
                _check_same(found, case.run(), f"run {number + 1} of the same call")
            if case.device == "cuda" and times == REPEATED:
                _check_same(found, _on_another_stream(case), "another stream")
                with _aside("a CUDA graph"):
                    _check_same(found, _from_a_graph(case), "its replay")
    if changed := case.lay_out.changed():  # type: ignore[attr-defined]
        raise Wrong(f"{changed[0]}: it or the memory around it was changed")


class Ran(TorchDispatchMode):
    """A mode that records which backends ran which ops, apart from the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() not in DISPATCH:
            return function(*args, **(kwargs or {}))
        dtype = next(arg for arg in args if isinstance(arg, Tensor)).dtype

        def through(op: str, backend: str, implementation: Callable) -> Callable:
            if backend != "reference":
                self.found.add(backends.key(op, backend, dtype))
            return implementation

        return DISPATCH[function.name()](*args, through=through)


def _what_runs(case: Case) -> list[str]:
    with contextlib.suppress(Exception), Ran() as mode:
        case.run()
    return sorted(mode.found)


def prove(row: Row, device: str, full: bool) -> Row:
    """Runs the calls of a row, until MOST of them have failed."""
    every = {backends.key(op, name, dtype): "" for op in backends.TABLE for name in backends.NAMES for dtype in FLOATS}
    with backends.with_taken_out(every if row.backend == "reference" else {}):
        for number, case in enumerate(cases(row, device, full)):
            try:
                check(case, row, REPEATED if number < (4 if full else 1) else 2)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                what = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
                ran = [] if isinstance(error, WrongAside) else _what_runs(case) or row.keys
                row.failures.append(Failure(what, str(case.call), ran))
                if len(row.failures) == MOST:
                    break
    return row


def taken_out(rows: Iterable[Row]) -> dict[str, str]:
    """Returns the keys of backends of ops to take out because rows have failed, with the reason.

    A failed call blames every op that it ran on its row's backend. Calls that ran the fewest ops come first. A later failure
    blames nothing if it ran an op that is already blamed in the dtype of its row, e.g. a block whose attention is wrong. Keys
    of other dtypes explain no failure, since calls of every dtype run the parts that compute in float32.
    """
    found: dict[str, str] = {}
    failures = [(failure, row) for row in rows for failure in row.failures]
    for failure, row in sorted(failures, key=lambda of: len(of[0].ran)):
        dtype = row.precision.replace(TF32, "float32")
        if not any(key in found for key in failure.ran if key.endswith(f" {dtype}")):
            blamed = [key for key in failure.ran if f" {row.backend} " in key] or failure.ran
            found |= dict.fromkeys(blamed, " ".join(failure.what.split())[:200])
    return found


def _work(connection: Connection, rows: list[Row], device: str, full: bool, threads: int) -> None:
    """Proves rows and sends each one when it is done. Ends early if the GPU is unusable, as after an illegal access."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the waiting process, which then ends this process
    torch.set_num_threads(threads)
    for row in rows:
        try:
            connection.send(prove(row, device, full))
        except torch.OutOfMemoryError as error:
            return connection.send(UserError(f"selftest: expected some free memory on {device}, got {error}"))
        try:
            torch.cuda.synchronize() if device == "cuda" else None
        except Exception:
            return None


def survey(device: str, *, full: bool = False, ops: Collection[str] = DRAW) -> Iterator[Row]:
    """Proves the rows of a device. If the process that runs them crashes, its current row failed; a new process goes on."""
    rows, spawn = rows_of(device, full, ops), multiprocessing.get_context("spawn")
    while rows:
        here, there = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_work, args=(there, rows, device, full, torch.get_num_threads()), daemon=True)
        process.start()
        there.close()
        told = f"gave no answer for {PATIENCE:.0f} s"
        try:
            while rows and here.poll(PATIENCE if device == "cuda" else None):
                found = here.recv()
                if isinstance(found, UserError):
                    raise found
                rows = rows[1:]
                yield found
        except EOFError:
            process.join()
            if process.exitcode and process.exitcode not in CRASHES:
                raise UserError(f"selftest: the process that runs the ops ended with {process.exitcode}") from None
            told = f"crashed with {signal.Signals(-process.exitcode).name}" if process.exitcode else ""
        finally:
            process.kill()
            process.join(10)
        if rows and told:
            row, rows = rows[0], rows[1:]
            row.failures.append(Failure(told, ran=row.keys))
            yield row
