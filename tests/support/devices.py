"""What the tests of an op share: backends and dtypes, the instruction sets of the C++ kernels, and the peak on a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from paths import PYTHONPATH, ROOT

from simplclip.ops import backends

needs_cpu_kernels = pytest.mark.skipif(backends.extension is None, reason=f"no CPU kernels: {backends.extension_error}")
BACKENDS = [pytest.param("cpu", marks=needs_cpu_kernels), "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run_with_instruction_set(isa, module, code="t.check_everything('cpu')"):
    """Runs code on a test module `t` in a process of its own, since the instruction set is chosen once."""
    env = {**os.environ, "SIMPLCLIP_CPU_ISA": isa, "PYTHONPATH": PYTHONPATH}
    code = f"import {module} as t\n{code}\nfrom simplclip.ops import backends\nprint(backends.extension.cpu_isa())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    if "SIMPLCLIP_CPU_ISA: expected one of" in done.stderr:
        pytest.skip(f"this CPU has no {isa}: {done.stderr.strip().splitlines()[-1]}")
    assert done.stdout.strip() == isa, done.stderr


def cuda_peak_bytes(run):
    """Highest sum of live bytes of torch's allocator on the GPU during `run`, above what was live before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
