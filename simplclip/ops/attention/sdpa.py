"""Forward and backward of torch's scaled_dot_product_attention, as a library's.

On a GPU the kernels behind it are called: FlashAttention for half types, else the memory-efficient
kernel. Both get sequences of several lengths as segments of one sequence: the valid tokens of each,
and its padding, which attends to itself. So no mask [L, L] is made, no length is read back to the
host, and padding does not reach valid tokens.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.ops import backends
from simplclip.ops.attention import library

aten = torch.ops.aten
ROW_BYTES = 16  # heads begin at multiples of 16 bytes, and their width is a multiple of 16 bytes
# the memory-efficient kernel rounds the number of rows of its log-sum-exps up to a multiple of 32
LSE_ROWS = 32


def kernel(q: Tensor) -> str:
    """Returns which of torch's kernels runs for a q [B, L, H, K]: "cpu", "flash" or "efficient"."""
    if q.device.type == "cpu":
        return "cpu"
    capability = backends.capability(q.device)
    before_ampere = capability is not None and capability < (8, 0)
    if before_ampere or q.itemsize != 2 or q.shape[3] > 256:
        return "efficient"
    return "flash"


def aligned(*tensors: Tensor) -> list[Tensor]:
    """Returns tensors [B, L, H, K] as torch's kernels read them; copies where that needs one.

    Each head begins at a multiple of 16 bytes, and K is padded with zeros to such a multiple.
    """
    results = []
    for t in tensors:
        row_elements = ROW_BYTES // t.itemsize
        starts = (t.storage_offset(), *t.stride()[:3])
        if t.shape[3] % row_elements:
            t = F.pad(t, (0, -t.shape[3] % row_elements))
        elif any(start % row_elements for start in starts):
            t = t.clone(memory_format=torch.contiguous_format)
        results.append(t)
    return results


def _segments(q: Tensor, lengths: Tensor) -> Tensor:  # [2 B + 1] int32
    """Returns the offsets in [B L] of each sequence's valid tokens and of its padding, and B L."""
    batch, length = q.shape[:2]
    first = torch.arange(0, batch * length, length, device=q.device, dtype=torch.int32)
    bounds = torch.stack([first, first + lengths], 1).flatten()
    return F.pad(bounds, (0, 1), value=batch * length)


def _packed(call: AttentionCall, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Returns the tensors `aligned`; with lengths, as one sequence [B L, H, K] with its bounds."""
    packed = aligned(*tensors)
    if call.lengths is None:
        return packed, None
    return [t.flatten(0, 1) for t in packed], _segments(call.q, call.lengths)


def _unpacked(t: Tensor, call: AttentionCall) -> Tensor:
    """Returns a kernel's result as [B, L, H, K], without the columns that `aligned` added."""
    return t.view(*call.q.shape[:3], -1)[..., : call.q.shape[3]]


def _flash(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v and its log-sum-exps by FlashAttention, see `library`."""
    batch, length, heads, _ = call.q.shape
    tensors, bounds = _packed(call, call.q, call.k, call.v)
    av, lse, *_ = aten._flash_attention_forward(
        *tensors, bounds, bounds, length, length, 0.0, call.causal, False, scale=call.scale
    )  # fmt: skip
    if bounds is not None:  # [H, B L]
        lse = lse.view(heads, batch, length).transpose(0, 1).contiguous()
    return _unpacked(av, call), lse


def _flash_backward(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv by FlashAttention, see `library`."""
    length = call.q.shape[1]
    tensors, bounds = _packed(call, call.grad, call.q, call.k, call.v, call.av)
    lse = call.lse
    if bounds is not None:
        lse = lse.transpose(0, 1).flatten(1).contiguous()
    # the state of random numbers, unused without dropout
    state = lse.new_empty((), dtype=torch.int64)
    dq, dk, dv, *_ = aten._flash_attention_backward(
        *tensors, lse, bounds, bounds, length, length, 0.0, call.causal, state, state,
        scale=call.scale,
    )  # fmt: skip
    return _unpacked(dq, call), _unpacked(dk, call), _unpacked(dv, call)


def _efficient(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v and its log-sum-exps by the memory-efficient kernel, see `library`."""
    length = call.q.shape[1]
    tensors, bounds = _packed(call, call.q, call.k, call.v)
    longest = None
    if bounds is not None:
        longest = length
        tensors = [t[None] for t in tensors]
    av, lse, *_ = aten._efficient_attention_forward(
        *tensors, None, bounds, bounds, longest, longest, 0.0, int(call.causal), True,
        scale=call.scale,
    )  # fmt: skip
    if bounds is not None:
        lse = lse[::2]  # drops the log-sum-exps of padding
    return _unpacked(av, call), lse[:, :, :length].contiguous()


def _efficient_backward(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv by the memory-efficient kernel, see `library`."""
    length = call.q.shape[1]
    tensors, bounds = _packed(call, call.grad, call.q, call.k, call.v, call.av)
    lse = call.lse
    if call.lengths is not None:
        tensors = [t[None] for t in tensors]
        padded = torch.arange(length, device=lse.device) >= call.lengths[:, None]  # [B, L]
        lse = lse.masked_fill(padded[:, None], torch.inf)
        # padding gets the values of valid rows: its gradients are not used
        lse = lse.repeat_interleave(2, 0)
    lse = F.pad(lse, (0, -length % LSE_ROWS), value=torch.inf)
    # the state of random numbers, unused without dropout
    state = lse.new_empty((), dtype=torch.int64)
    *inputs, av = tensors
    dq, dk, dv, *_ = aten._efficient_attention_backward(
        *inputs, None, av, bounds, bounds, length, length, lse, 0.0, state, state,
        int(call.causal), False, scale=call.scale,
    )  # fmt: skip
    return _unpacked(dq, call), _unpacked(dk, call), _unpacked(dv, call)


def _on_cpu(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v and its log-sum-exps by torch's kernel for the CPU, see `library`."""
    tensors, mask = _heads_and_mask(call, call.q, call.k, call.v)
    av, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *tensors, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )  # fmt: skip
    return av.transpose(1, 2), lse


def _on_cpu_backward(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv by torch's kernel for the CPU, see `library`."""
    tensors, mask = _heads_and_mask(call, call.grad, call.q, call.k, call.v, call.av)
    gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, call.lse, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )  # fmt: skip
    return tuple(t.transpose(1, 2) for t in gradients)


def _heads_and_mask(call: AttentionCall, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Returns tensors as [B, H, L, K], 0 in padding, and a mask [B, 1, 1, L] to add to the logits.

    None without lengths, and if causal: padding comes last, so that a valid query sees none.
    """
    heads = [t.transpose(1, 2) for t in tensors]
    if call.lengths is None:
        return heads, None
    padded = torch.arange(call.q.shape[1], device=call.q.device) >= call.lengths[:, None]  # [B, L]
    heads = [t.masked_fill(padded[:, None, :, None], 0) for t in heads]
    if call.causal:
        return heads, None
    mask = call.q.new_zeros(padded.shape).masked_fill(padded, -torch.inf)
    return heads, mask[:, None, None]


_FORWARD = {"cpu": _on_cpu, "flash": _flash, "efficient": _efficient}
_BACKWARD = {"cpu": _on_cpu_backward, "flash": _flash_backward, "efficient": _efficient_backward}


def _attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns A v and the log-sum-exps, see library.forward."""
    return _FORWARD[kernel(call.q)](call)


def _gradients(call: AttentionInto) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk and dv of ordinary attention, see library.backward."""
    return _BACKWARD[kernel(call.q)](call)


shaped_attention_fwd = partial(library.forward, _attention)
shaped_attention_bwd = partial(library.backward, _attention, _gradients)
