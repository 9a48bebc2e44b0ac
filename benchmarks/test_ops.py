"""Time and memory of each op, forward and backward, beside other forms of it.

    pytest benchmarks -k "contrastive and 4k and float32"
    pytest benchmarks -k "block or attention" --benchmark-json after.json
    pytest-benchmark compare before.json after.json

The value of each form is compared once with simplclip's. `peak_mib` in a JSON's extra_info is the
peak of torch's allocator in one run, above its level before.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from itertools import accumulate, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import losses
from benchmarks.losses import LOSSES
from benchmarks.modules import MODULES, Shape

OURS = "simplclip"
PEERS = {"memeff": "memeff", "siglip_kernel": "siglip_kernel"}  # packages that need a GPU
DTYPES = ("float32", "bfloat16")
LOSS_SIZES = {"small": 16, "4k": 4096, "8k": 8192}
GPU_LOSS_SIZES = LOSS_SIZES | {"32k": 32768, "64k": 65536}
# By op. Small sizes show what a call takes beside its arithmetic.
SIZES: dict[str, dict[str, Shape]] = {
    "attention": {"small": Shape(1, 4), "clip": Shape(256)},
    "mlp": {"small": Shape(1, 4), "clip": Shape(64)},
    "block": {"small": Shape(1, 4), "clip": Shape(64)},
    "texts": {"small": Shape(4), "clip": Shape(64)},
    "inference": {"small": Shape(1), "pairs": Shape(8)},
    "tiny": {"small": Shape(4), "pairs": Shape(1024)},
    "step": {"small": Shape(2), "pairs": Shape(16)},
}
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2}  # of the largest value
# Other functions by design: another block, models that the SiCLIPs were made from.
OTHERS = {("block", "open_clip"), ("inference", "open_clip"), ("step", "open_clip")}


def cases(device: str) -> Iterator[tuple[str, str, str, str]]:
    """Yields op, form, size and dtype of each benchmark on a device."""
    for op, forms in (LOSSES | MODULES).items():
        for size, dtype, form in product(sizes_of(op, device), DTYPES, forms):
            if form in PEERS and (device == "cpu" or not importlib.util.find_spec(PEERS[form])):
                continue
            if form == "linear_cross_entropy" and not hasattr(F, form):  # torch 2.13 has it
                continue
            yield op, form, size, dtype


def sizes_of(op: str, device: str) -> dict:
    if op in LOSSES:
        return GPU_LOSS_SIZES if device == "cuda" else LOSS_SIZES
    return SIZES[op]


def make(op: str, form: str, size: str, dtype: str, device: str) -> Callable[[], Tensor]:
    """Returns a function that runs a form once, on a GPU to its end, and returns a value of it."""
    shape, torch_dtype = sizes_of(op, device)[size], getattr(torch, dtype)
    if op in LOSSES:
        run = losses.make(op, form, shape, torch_dtype, device)
    else:
        run = MODULES[op][form](shape, torch_dtype, device)
    if device == "cpu":
        return run

    def run_to_its_end() -> Tensor:
        value = run()
        torch.cuda.synchronize()
        return value

    return run_to_its_end


@functools.lru_cache(1)
def expected(op: str, size: str, dtype: str, device: str) -> Tensor:
    """Returns the value of simplclip's form."""
    return make(op, OURS, size, dtype, device)().detach().cpu().float()


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Returns the peak MiB of torch's allocator in a run, above those that were live before."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0)) / 2**20


def pytest_generate_tests(metafunc):
    device, op = (metafunc.config.getoption(name) for name in ("--device", "--op"))
    every = [case for case in cases(device) if op in (None, case[0])]
    metafunc.parametrize(("op", "form", "size", "dtype"), every, ids=map("-".join, every))


def test_op(benchmark, op, form, size, dtype, device):
    torch.compiler.reset()
    benchmark.group = f"{op} {size} {dtype}"
    try:
        value = expected(op, size, dtype, device)
        run = make(op, form, size, dtype, device)
        error = (run().detach().cpu().float() - value).abs().max().item()
        largest = max(1.0, value.abs().max().item()) if op in LOSSES else value.abs().max().item()
        tolerance = TOLERANCES["bfloat16" if form in PEERS else dtype]  # they multiply as TF32
        assert (op, form) in OTHERS or error <= tolerance * largest
        shape = str(sizes_of(op, device)[size])
        peak = round(peak_mib(run, device), 3)
        benchmark.extra_info.update(device=device, shape=shape, peak_mib=peak)
        benchmark(run)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {error}")
