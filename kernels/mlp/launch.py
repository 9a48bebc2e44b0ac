"""Launchers of parallel_mlp's Triton kernels, hidden.py.

act(h) lies in scratch, some rows at a time, and cuBLAS multiplies it; dh overwrites h.

A kernel that applied the activation to the operand it loads would do so once for each block of
columns, and more often than it multiplies: its tensor cores would wait. The derivative is needed
once for each element, so that a kernel computes dh.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from simplclip.calls.mlp import HiddenCall, HiddenGradient
from simplclip.kernels import tuning
from simplclip.kernels.mlp.hidden import _parallel_mlp_activate_kernel, _parallel_mlp_hidden_kernel
from simplclip.kernels.runtime import card, launch, precision_of, product

BLOCK = 2048  # elements that a program activates
SCRATCH_BYTES = 16 << 20  # of the rows of act(h) that exist at a time


def _chunks(h: Tensor) -> list[slice]:
    """Returns nearly equal ranges of the rows of h, of which act(h) fits 16 MiB, or of 64 rows."""
    tokens = h.shape[0]
    limit = max(64, SCRATCH_BYTES // (h.shape[1] * h.itemsize))
    step = -(-tokens // -(-tokens // limit))
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def _write_activated(h: Tensor, act: str, scratch: Tensor) -> Tensor:  # [rows, F], contiguous
    """Writes act(h) to the first rows of the scratch and returns these rows, a view."""
    out = scratch[: h.shape[0]]
    programs = triton.cdiv(h.numel(), BLOCK)
    launch(_parallel_mlp_activate_kernel, programs, h, out, h.numel(), ACT=act, BLOCK=BLOCK)
    return out


def parallel_mlp_fwd(call: HiddenCall) -> None:
    """Writes act(h) weightᵀ + bias to call.out [T, C], or adds it if call.accumulate.

    Scratch: 16 MiB (SCRATCH_BYTES), or more if 64 rows of act(h) need more.
    """
    h = call.h
    out = call.out
    bias = call.bias
    weight = call.weight.T  # [F, C]
    if not out.numel():
        return
    chunks = _chunks(h)
    scratch = torch.empty_like(h[chunks[0]])  # the first chunk is the largest
    if call.accumulate and bias is not None:
        out += bias
    with torch.cuda.device_of(h):
        for rows in chunks:
            activated = _write_activated(h[rows], call.act, scratch)
            before = out[rows] if call.accumulate else bias
            if before is None:
                torch.mm(activated, weight, out=out[rows])
            else:
                torch.addmm(before, activated, weight, out=out[rows])


def parallel_mlp_bwd(call: HiddenGradient) -> Tensor:  # [C, F], [0, F] if not needed
    """Overwrites h by dh = (grad weight) ∘ act'(h); returns dweight = gradᵀ act(h), of the old h.

    Scratch: that of forward, and if it does not hold all of act(h), also dweight in float32.
    """
    with torch.cuda.device_of(call.h):
        if call.need_weight:
            d_weight = _weight_gradient(call.grad, call.h, call.act)
        else:
            d_weight = call.weight.new_empty(0, call.weight.shape[1])
        if call.h.numel():
            _overwrite_hidden(call.grad, call.weight, call.h, call.act)
    return d_weight


def _overwrite_hidden(grad: Tensor, weight: Tensor, h: Tensor, act: str) -> None:
    """Overwrites h [T, F] by (grad weight) ∘ act'(h); grad [T, C], weight [C, F]."""
    precision = precision_of(h.dtype)
    tile = tuning.lookup(precision, card(h).architecture, "parallel_mlp")
    tokens, width = grad.shape
    hidden = h.shape[1]
    launch(
        _parallel_mlp_hidden_kernel,
        triton.cdiv(tokens, tile.block_m) * triton.cdiv(hidden, tile.block_n),
        *(grad, weight, h, tokens, width, hidden),
        *(grad.stride(0), weight.stride(0), h.stride(0)),
        ACT=act,
        **vars(tile.tiling(precision, width)),
        **tile.options(),
    )


def _weight_gradient(grad: Tensor, h: Tensor, act: str) -> Tensor:  # [C, F]
    """Returns gradᵀ act(h) in the dtype of h; grad [T, C], h [T, F], act: the activation's name."""
    if not h.numel():
        return h.new_zeros(grad.shape[1], h.shape[1])
    chunks = _chunks(h)
    scratch = torch.empty_like(h[chunks[0]])  # the first chunk is the largest
    if len(chunks) == 1:
        return grad.T @ _write_activated(h, act, scratch)
    total = h.new_zeros(grad.shape[1], h.shape[1], dtype=torch.float32)
    for rows in chunks:
        product(total, grad[rows].T, _write_activated(h[rows], act, scratch), add=True)
    return total.to(h.dtype)
