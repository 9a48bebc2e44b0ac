"""The ops as users call them, on a CUDA device, each on the first backend that serves it there.

Values: test_triton.py.
"""

import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from simplclip import selftest
from simplclip.losses import WIKDLoss
from simplclip.nn import SimplifiedBlock
from simplclip.ops import backends
from support.devices import DTYPES
from support.losses import loss_inputs
from support.ops.compare import Case
from support.paths import PYTHONPATH

pytestmark = pytest.mark.gpu
WHOLE = {
    "relational_weight": 0.8,
    "interactive_weight": 0.6,
    "pm_weight": 0.5,
    "feature_weight": 0.4,
}


@pytest.fixture(params=itertools.product(selftest.CALLS, backends.NAMES[:-1], DTYPES), ids=str)
def both(request):
    """Two calls of each op on each backend but the reference, if it serves them, in each dtype."""
    op, backend, dtype = request.param
    calls = [make() for make in selftest.CALLS[op][:2]]
    row = selftest.Row(op, backend, dtype)
    if not row.parts or not all(row.serves(call, torch.device("cuda")) for call in calls):
        pytest.skip(f"{backend} does not serve {op} in {dtype} here")
    return [Case(call, dtype, backend, call.needed(), device="cuda") for call in calls]


def check_same(case, results, expected):
    """Compares bits, except where atomics add in any order: in sdpa, xformers and blocks."""
    inexact = case.backend in ("sdpa", "xformers") or case.call.op == "simplified_block"
    torch.testing.assert_close(results, expected, **({} if inexact else {"rtol": 0, "atol": 0}))


def test_two_streams_at_once(both):
    """Two calls that the device may run at the same time do not share scratch."""
    expected = [case.run() for case in both]
    streams = [torch.cuda.Stream() for _ in both]
    results = [[] for _ in both]
    torch.cuda.synchronize()
    for _ in range(20):
        for case, stream, of_case in zip(both, streams, results):
            with torch.cuda.stream(stream):
                of_case.append(case.run())
    torch.cuda.synchronize()
    for case, first, of_case in zip(both, expected, results):
        for again in of_case:
            check_same(case, again, first)


def test_a_cuda_graph(both):
    case, graph = both[0], torch.cuda.CUDAGraph()
    expected = case.run()
    with torch.cuda.graph(graph):
        results = case.run()
    for value in results.values():
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    check_same(case, results, expected)


def test_a_thousand_calls_keep_no_memory(both):
    case = both[0]
    for _ in range(3):
        case.run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(1000):
        case.run()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.prove
@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    watch = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": PYTHONPATH}
    command = [*watch, sys.executable, "-m", "simplclip", "selftest", "--device", "cuda"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]


def batch(n, d, dtype):
    """Returns image, text, logit_scale and the teacher's tensors, and the leaves among them."""
    student, teacher = loss_inputs(n, d, dtype=dtype)
    tensors = [t.detach().cuda().requires_grad_(t.requires_grad) for t in (*student[:3], *teacher)]
    return tensors, tensors[:3]


def of_a_loss():
    return WIKDLoss(**WHOLE).cuda(), batch(64, 32, torch.float32)[0]


def of_a_block():
    """Attention runs in CUDA C++, the MLP in Triton."""
    x = torch.randn(4, 77, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.tensor([77, 0, 50, 1], device="cuda")
    return SimplifiedBlock(512, 8, causal=True).cuda().bfloat16(), (x, lengths)


@pytest.mark.parametrize("make", [of_a_loss, of_a_block])
def test_nothing_waits_for_the_device_and_the_full_graph_compiles(make):
    module, args = make()

    def step():
        out = module(*args)
        (sum(out) if isinstance(out, tuple) else out.sum()).backward()
        return out

    expected = step()  # the first call compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5}
        if isinstance(module, WIKDLoss)
        else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(*args), expected, **tolerance)
