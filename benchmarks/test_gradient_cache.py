"""Gradient caching on siclip-tiny: time against plain accumulation, and resident memory at a large effective batch.

    OMP_NUM_THREADS=1 pytest benchmarks/test_gradient_cache.py --repeats 5 --write

Accumulation runs the same micro-batches, each with a loss of its own, so that the negatives of a pair are in its micro-batch.
One graph, whose gradients gradient caching computes, is measured at a smaller batch. No optimizer.
"""

import resource
import subprocess
import sys

import pytest
import torch

from benchmarks.hardware import ROOT
from benchmarks.measure import clock_of_steps, cpu_peak_bytes, figures, interleaved_times
from simplclip import gradient_cache, models
from simplclip.common import hardware
from simplclip.losses import ClipPMLoss

MICRO = 64
TIMED, PEAK, LARGE = 2048, 1024, 16384
OURS, ACCUMULATION, GRAPH = "gradient caching", "accumulation, a loss for each micro-batch", "one graph"
PRECISION = {"float32": "fp32", "bfloat16": "bf16"}


class Case:
    """siclip-tiny, a loss, and E pairs in micro-batches."""

    def __init__(self, pairs: int, dtype: str):
        torch.manual_seed(0)
        self.model, self.loss = models.create("siclip-tiny").train(), ClipPMLoss()
        image, text = torch.rand(pairs, 3, 48, 48), torch.randint(1, 8000, (pairs, 16))
        self.micro_batches = list(zip(image.split(MICRO), text.split(MICRO)))
        self.autocast = lambda: hardware.autocast(PRECISION[dtype], torch.device("cpu"))

    def encode(self, batch):
        image, text = batch
        return self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True)

    def of(self, image, text):
        return self.loss(image, text, self.model.logit_scale.exp())

    def cached(self) -> None:
        with self.autocast():
            gradient_cache.backward(self.encode, self.micro_batches, self.of, model=self.model)

    def accumulated(self) -> None:
        for batch in self.micro_batches:
            with self.autocast():
                loss = self.of(*self.encode(batch))
            loss.backward()

    def one_graph(self) -> None:
        with self.autocast():
            features = zip(*map(self.encode, self.micro_batches))
            loss = self.of(*map(torch.cat, features))
        loss.backward()


def row(pairs: int, dtype: str, form: str, **columns) -> dict:
    return {
        "op": "gradient_cache",
        "n": pairs,
        "shape": f"siclip-tiny, m={MICRO}",
        "dtype": dtype,
        "pass": "forward + backward",
        "form": form,
        "threads": torch.get_num_threads(),
        **columns,
    }


@pytest.mark.parametrize("dtype", PRECISION)
def test_time(benchmark, rows, request, dtype):
    case, repeats = Case(TIMED, dtype), request.config.getoption("--repeats")
    forms = {OURS: case.cached, ACCUMULATION: case.accumulated}
    name, clock = clock_of_steps()
    times = benchmark.pedantic(interleaved_times, args=(forms, repeats, 1, clock), rounds=1)
    rows += [row(TIMED, dtype, form, clock=name, repeats=repeats, **figures(times, form, OURS)) for form in forms]


@pytest.mark.parametrize("dtype", PRECISION)
def test_allocator_peak(rows, dtype):
    case = Case(PEAK, dtype)
    for form, run in {OURS: case.cached, ACCUMULATION: case.accumulated, GRAPH: case.one_graph}.items():
        run()  # so that gradients exist
        rows.append(row(PEAK, dtype, form, extra_mib=round(cpu_peak_bytes(run) / 2**20)))


@pytest.mark.parametrize("dtype", PRECISION)
def test_resident_memory(rows, dtype):
    """Measures the highest resident set of a process that makes one step, with torch, the model and the pairs' pixels."""
    program = f"from benchmarks import test_gradient_cache as t; t.print_resident({dtype!r})"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    resident = int(run.stdout)
    rows.append(row(LARGE, dtype, OURS, resident_mib=resident))
    assert resident < 4096


def print_resident(dtype: str) -> None:
    Case(LARGE, dtype).cached()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
