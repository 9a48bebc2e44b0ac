"""What the tests of an op share: backends and dtypes, and the peak on a GPU."""

import importlib.util

import pytest
import torch

from simplclip.ops import backends

needs_cpu_kernels = pytest.mark.skipif(backends.extension is None, reason=f"no CPU kernels: {backends.extension_error}")
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cuda_peak_bytes(run):
    """Returns the highest sum of live bytes of torch's allocator on the GPU during `run`, above what was live before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the package triton is not installed")
