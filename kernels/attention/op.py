"""Launchers of shaped_attention's Triton kernels, for sequences of any length: no matrix of L×L is stored.

Forward reads the keys once. C v needs no pass over the keys: a small kernel first sums v in each block of rows, and a causal
program multiplies v by zeros and ones only within its own block. Backward runs by rows (the sums of A dP over a row, then dq)
and then by keys, with beta A - gamma C as one matrix, so that terms cancel in float32. Each program writes its own part of
the results, and partial sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from simplclip.kernels import tuning
from simplclip.kernels.attention.backward import _shaped_attention_keys_kernel, _shaped_attention_rows_kernel
from simplclip.kernels.attention.forward import _shaped_attention_fwd_kernel, _shaped_attention_sums_kernel
from simplclip.kernels.launch import COMPILE, architecture_and_processors, device_of, interpreted, precision_of, started
from simplclip.ops.attention.call import AttentionCall, AttentionInto

SUMS = 16  # number of sums of v that are read at a time


def sums_warps(tile: tuning.Tile) -> int:
    """The number of warps of the kernel that sums v: at most 64 elements per thread."""
    return max(4, tile.block_m * tile.block_k // 2048)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of B, L and H by name."""
    return {f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate("blh")}


def _tuned(op: str, q: Tensor) -> tuple[tuning.Tile, dict[str, object]]:
    """A kernel's tile, and the arguments that all kernels take."""
    _, tokens, heads, width = q.shape
    block = max(16, triton.next_power_of_2(width))
    precision = precision_of(q.dtype)
    tile = tuning.of_width(f"shaped_attention_{op}", block, precision, architecture_and_processors(q)[0])
    shared = {
        "tokens": tokens,
        "heads": heads,
        "width": width,
        "EVEN": width == block,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "INTERPRETED": interpreted(),
        **tile.options(),
        **COMPILE,
    }
    return tile, shared


def _inputs(call: AttentionCall) -> dict[str, object]:
    """The arguments that forward and backward take from a call."""
    q, k, v = call.q, call.k, call.v
    tensors = {"q": q, "k": k, "v": v, "gains": call.gains.contiguous(), "lengths": call.lengths}
    return {**tensors, "scale": call.scale, "CAUSAL": call.causal, **_strides(q=q, k=k, v=v)}


def shaped_attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:  # [B, L, H, K], contiguous; [B, H, L] float32
    """The last dimension must be contiguous. Scratch: the sum of v of each block of rows, [B, H, blocks, K] float32."""
    q, v = call.q, call.v
    sequences, tokens, heads, width = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(sequences, heads, tokens, dtype=torch.float32)
    if not q.numel():
        return out, lse
    tile, shared = _tuned("fwd", q)
    blocks = triton.cdiv(tokens, tile.block_m)
    grid = (sequences * heads * blocks,)
    sums = None
    with device_of(q):
        if blocks > 1:
            sums = q.new_empty(sequences, heads, blocks, width, dtype=torch.float32)
            started(_shaped_attention_sums_kernel)[grid](
                v, call.lengths, sums, tokens, heads, width, **_strides(v=v), EVEN=shared["EVEN"], BLOCK_M=tile.block_m,
                BLOCK_K=tile.block_k, num_warps=sums_warps(tile), **COMPILE,
            )  # fmt: skip
        started(_shaped_attention_fwd_kernel)[grid](
            **_inputs(call), sums=sums, out=out, lse=lse, SUMS=SUMS, **shared,
        )  # fmt: skip
    return out, lse


def shaped_attention_bwd(call: AttentionInto) -> Tensor:  # [3, H] float32
    """Writes dq, dk and dv; returns the gains' gradients. Scratch: [B, H, L] float32, and three floats per block of rows."""
    q, dq, dk, dv = call.q, call.dq, call.dk, call.dv
    sequences, tokens, heads, _ = q.shape
    if not q.numel():
        return torch.zeros_like(call.gains)
    delta = torch.empty_like(call.lse)
    inputs = {**_inputs(call), "grad": call.grad.contiguous(), "lse": call.lse, "delta": delta}
    with device_of(q):
        tile, shared = _tuned("rows", q)
        parts = delta.new_empty(3, sequences, heads, triton.cdiv(tokens, tile.block_m))
        started(_shaped_attention_rows_kernel)[(parts[0].numel(),)](**inputs, dq=dq, parts=parts, **_strides(dq=dq), **shared)
        tile, shared = _tuned("keys", q)
        grid = (sequences * heads * triton.cdiv(tokens, tile.block_n),)
        started(_shaped_attention_keys_kernel)[grid](**inputs, dk=dk, dv=dv, **_strides(dk=dk, dv=dv), **shared)
    return parts.sum((1, 3))
