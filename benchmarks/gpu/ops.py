"""The ops of this library on a GPU beside their peers: losses, single kernels, attention, blocks, a step of a small model.

A form that fails, does not fit in memory or has a wrong value becomes a row with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import attention_forms, block_forms, similarity_forms, training_forms
from benchmarks.bound import calls
from benchmarks.bound.cards import CARDS
from benchmarks.measure import PASSES, interleaved_times, quantiles, reason

WHOLE = "the whole call"
OURS = re.compile(r"(similarity_\w+?|shaped_attention_\w+?|parallel_mlp_\w+?)(?:_kernel\b|$)")


@dataclass
class Case:
    """A measurement that is done or left as a whole; `op` is a key of OPS in __main__.py."""

    op: str
    name: str
    run: Callable[[], list[dict]]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def losses(o: argparse.Namespace) -> Iterator[Case]:
    sizes = [int(n) for n in o.sizes.split(",")]
    for n, dtype, objective in itertools.product(sizes, o.dtypes.split(","), similarity_forms.OBJECTIVES):
        run = partial(similarity_forms.measure, objective, n, o.width, dtype, o.repeats, o.device, strict=False)
        yield Case("losses", f"{objective}, N={n} D={o.width} {dtype}", run)


def kernels(o: argparse.Namespace) -> Iterator[Case]:
    sizes = [int(n) for n in o.sizes.split(",")]
    cases = calls.losses((sizes[0], sizes[-1]), o.width) + calls.others(o.sequences)
    for dtype, case in itertools.product(o.dtypes.split(","), cases):
        yield Case("kernels", f"{case} {dtype}", partial(of_kernels, o, case, dtype))


def card(device: str) -> str:
    """Returns the name of the card whose data sheet is nearest; without a GPU the first card, to try this program."""
    if device == "cpu":
        return next(iter(CARDS))
    found = torch.cuda.get_device_properties(0)
    near = lambda name: (abs(CARDS[name].architecture - 10 * found.major - found.minor),  # noqa: E731
                         abs(CARDS[name].multiprocessors - found.multi_processor_count))  # fmt: skip
    return min(CARDS, key=near)


def of_kernels(o: argparse.Namespace, case: calls.Case, dtype: str) -> list[dict]:
    """Measures each kernel of a call, forward and backward, and the sum with torch's: ms, TFLOP/s, predicted ms, cuBLAS's."""
    rows, beside = {}, blas(case.product, getattr(torch, dtype), o)
    expected = predicted(case, dtype, card(o.device))
    with calls.real(o.device):
        case.run(getattr(torch, dtype), True)
        activities = [ProfilerActivity.CUDA] if o.device == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiled:
            for _ in range(o.repeats):
                case.run(getattr(torch, dtype), True)
    for event in profiled.key_averages():
        time_us = event.self_device_time_total if o.device == "cuda" else event.self_cpu_time_total
        found = OURS.search(event.key)
        for name in (WHOLE, *([found[1]] if found else [])) if time_us else ():
            row = rows.setdefault(name, {"launches": 0, "ms": 0.0})
            row["launches"] += event.count / o.repeats
            row["ms"] += time_us / 1e3 / o.repeats
    out = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ms"]):
        flops, ms = expected.get(name, (0, 0))
        tflops = {"tflops": round(flops / row["ms"] / 1e9, 1), "predicted_ms": round(ms, 4)} if ms else {}
        row = {"op": "kernels", "objective": case.name, "shape": case.shape, "dtype": dtype, "form": name, **row, **tflops}
        out.append({**row, "ms": round(row["ms"], 4), "cublas_tflops": round(beside, 1), "note": ""})
    return out


def predicted(case: calls.Case, dtype: str, name: str) -> dict[str, tuple[float, float]]:
    """Returns operations and milliseconds by kernel as benchmarks.bound predicts them; none if it cannot predict the call."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from benchmarks.bound import predict, trace

    predictor = predict.Predictor(name)
    try:
        with trace.on_card(predictor.card) as found:
            case.run(getattr(torch, dtype), True)
        sums = {row.name: (row.sum.flops, row.sum.ms) for row in predict.predict(found.steps, predictor)}
        return sums | {WHOLE: tuple(map(sum, zip(*sums.values())))}
    except Exception as error:
        print(f"{case}: not predicted, {reason(error)}")
        return {}


def blas(product: tuple[int, int, int], dtype: torch.dtype, o: argparse.Namespace) -> float:
    """Measures the TFLOP/s of a plain product. Cuts the first matrix to at most 8,192 rows."""
    m, n, k = product
    m = min(m, 8192)
    left, right = (torch.randn(*shape, device=o.device).to(dtype) for shape in ((m, k), (k, n)))
    out = left.new_empty(m, n)
    times = interleaved_times({"cuBLAS": lambda: torch.mm(left, right, out=out)}, o.repeats)
    return 2e-12 * m * n * k / quantiles(times.device["cuBLAS"])[1]


def blocks(o: argparse.Namespace) -> Iterator[Case]:
    batch = max(1, int(block_forms.BATCH * o.sequences))
    for dtype, backward in itertools.product(o.dtypes.split(","), PASSES):
        run = partial(block_forms.measure, dtype, backward, o.repeats, o.device, batch=batch, strict=False)
        yield Case("block", f"B={batch} {dtype} {PASSES[backward]}", run)


def attention(o: argparse.Namespace) -> Iterator[Case]:
    for dtype, backward, shape in itertools.product(o.dtypes.split(","), PASSES, attention_forms.SHAPES):
        shape = dataclasses.replace(shape, b=max(1, int(shape.b * o.sequences)))
        run = partial(attention_forms.measure, shape, dtype, backward, o.repeats, o.device, strict=False)
        yield Case("attention", f"{shape} {dtype} {PASSES[backward]}", run)


def training(o: argparse.Namespace) -> Iterator[Case]:
    batch = max(2, int(1024 * o.sequences))
    for dtype, objective in itertools.product(o.dtypes.split(","), training_forms.OBJECTIVES):
        run = partial(training_forms.measure, objective, batch, dtype, o.repeats, o.device, strict=False)
        yield Case("training", f"{objective}, N={batch} {dtype}", run)
