"""parallel_mlp and simplified_block as users call them, on a CUDA device: each part by the backend that comes first there."""

import pytest
import torch
from devices import cuda_peak_bytes

from simplclip.nn import SimplifiedBlock
from simplclip.ops import backends

pytestmark = pytest.mark.gpu


def test_triton_serves_the_mlp():
    for op in ("parallel_mlp_fwd", "parallel_mlp_bwd"):
        assert backends.select(op, "cuda", torch.bfloat16)[0] == "triton"


def test_a_block_is_served_without_a_forced_backend():
    """The attention by CUDA C++, the MLP by Triton; nothing waits for the device, and a full graph compiles."""
    block = SimplifiedBlock(512, 8, causal=True).cuda().bfloat16()
    x = torch.randn(4, 77, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.tensor([77, 0, 50, 1], device="cuda")
    block(x, lengths).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        block(x, lengths).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(compiled, block(x), rtol=2e-2, atol=2e-2)


def test_memory_kept_for_backward():
    """x is the caller's: kept beside it are [q|k], h and the log-sum-exps, with recompute those alone."""
    x = torch.randn(64, 77, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for recompute, most in ((False, 7.2), (True, 1.2)):  # in units of x, the result among them
        block = SimplifiedBlock(512, 8, causal=True, recompute=recompute).cuda().bfloat16()
        block(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = block(x)
        assert torch.cuda.memory_allocated() - before <= most * x.nbytes
        del out
    with torch.no_grad():
        block(x)
        assert cuda_peak_bytes(lambda: block(x)) < 12 * x.nbytes
