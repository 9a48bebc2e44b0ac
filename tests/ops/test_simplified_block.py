"""The products that backward of simplified_block computes, and the tensors that it keeps."""

import torch
from calls import block_inputs as inputs
from devices import needs_cpu_kernels

from simplclip.memory.measure import cpu_peak_bytes
from simplclip.ops import simplified_block


def test_frozen_tensors_cost_no_products(monkeypatch):
    """If x needs no gradient, none of the three products for it is computed; nor is the product of a frozen weight."""
    calls = []
    for name in ("mm", "addmm", "addmm_"):
        owner = torch.Tensor if name == "addmm_" else torch
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: calls.append(1) or original(*a, **k))
    counts = {}
    for trained in ("x", "qk_weight", "fc1_weight", "fc2_bias", "all"):
        tensors = {name: t.requires_grad_(trained in (name, "all")) for name, t in inputs(projections=False).items()}
        out = simplified_block(**tensors)
        calls.clear()
        out.sum().backward()
        counts[trained] = len(calls)
    # x: two products into the gradient of n; each weight: one product; parallel_mlp_bwd's products are the backend's.
    assert counts == {"x": 2, "qk_weight": 1, "fc1_weight": 1, "fc2_bias": 0, "all": 4}


@needs_cpu_kernels
def test_memory():
    """x, [q|k] and h are saved, or x alone. Without gradients, [q|k] and h are freed after their use."""
    b, length, c, f = 8, 77, 128, 512
    tensors = {name: t.float().requires_grad_() for name, t in inputs(b, length, c, 2, f, projections=False).items()}
    tokens = 4 * b * length * c
    lse = 4 * b * 2 * length

    def saved(recompute):
        held = {}
        parameters = {t.untyped_storage().data_ptr() for t in tensors.values() if t.dim() < 3}

        def pack(t):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            simplified_block(**tensors, recompute=recompute)
        return sum(size for at, size in held.items() if at not in parameters and size > 4 * 3 * 2)

    assert saved(False) == 7 * tokens + lse
    assert saved(True) == tokens + lse
    tensors = {name: t.float() for name, t in inputs(100, length, 128, 2, 2048, projections=False).items()}
    hidden = 4 * 100 * length * 2048
    assert cpu_peak_bytes(lambda: simplified_block(**tensors)) < 0.8 * hidden  # scratch of 24 MiB, and five times x
