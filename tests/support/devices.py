"""Backends and dtypes that tests run on, marks for what a machine lacks, the peak on a GPU."""

import importlib.util
import os
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from simplclip.common import hardware
from simplclip.ops import backends

needs_cpu_kernels = pytest.mark.skipif(
    backends.extension is None, reason=f"no CPU kernels: {backends.extension_error}"
)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Without bfloat16 instructions, and as a lesser CPU than it runs on, oneDNN copies operands of half
# types to float32.
ONEDNN = os.environ.get("ONEDNN_MAX_CPU_ISA", "BF16")
NATIVE_BF16 = hardware.native_bf16(torch.device("cpu")) and "BF16" in ONEDNN
NATIVE_FP16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
needs_native_bf16 = pytest.mark.skipif(
    not NATIVE_BF16, reason="oneDNN copies bfloat16 to float32 on this CPU"
)
needs_uncopied_fp16 = pytest.mark.skipif(
    NATIVE_FP16 and "ONEDNN_MAX_CPU_ISA" in os.environ,
    reason="oneDNN may copy float16 to float32 by ONEDNN_MAX_CPU_ISA",
)
UNCOPIED_DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=needs_native_bf16),
    pytest.param(torch.float16, marks=needs_uncopied_fp16),
]


def cuda_peak_bytes(run: Callable[[], object]) -> int:
    """Returns the highest sum of live bytes of torch's allocator on the GPU during `run`, above
    what was live before.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_bytes(run: Callable[[], object]) -> int:
    """Calls `run` in torch's profiler; returns the peak bytes of torch's CPU allocator in it.

    Bytes that were live before do not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(accumulate(changes, initial=0))
