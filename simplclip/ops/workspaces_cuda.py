"""Workspaces of the CUDA C++ functions (csrc/cuda); see workspaces."""

from __future__ import annotations

from torch import Tensor

_GRAIN = 512  # bytes that CUDA's allocator rounds to


def _rounded(size: int) -> int:
    return -(-size // _GRAIN) * _GRAIN


def _copies(*tensors: Tensor) -> int:
    """Bytes of copies of tensors [B, L, H, K] whose rows do not begin at multiples of 16 bytes."""

    def is_aligned(t: Tensor) -> bool:
        steps = [t.stride(i) for i in range(3) if t.shape[i] != 1] + [t.storage_offset()]
        return t.stride(3) == 1 and all(step * t.itemsize % 16 == 0 for step in steps)

    return sum(_rounded(t.numel() * t.itemsize) for t in tensors if not is_aligned(t))


def _shaped_attention_fwd(q: Tensor, k: Tensor, v: Tensor, *_args) -> int:
    return _copies(q, k, v)


def _shaped_attention_bwd(grad, q, k, v, _gains, _lse, _lengths, _scale, _causal, dq, dk, dv) -> int:
    gains = q.shape[0] * 3 * q.shape[2] * 4  # the float32 gradients of the gains, by sequence
    return _rounded(gains) + _copies(q, k, v, grad, dq, dk, dv)


STATED = {"shaped_attention_fwd": _shaped_attention_fwd, "shaped_attention_bwd": _shaped_attention_bwd}
