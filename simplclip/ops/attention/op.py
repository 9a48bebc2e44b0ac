"""shaped_attention: identity, softmax and uniform attention, mixed by three gains per head."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends, checks
from simplclip.ops.attention import reference
from simplclip.ops.attention.call import AttentionCall, AttentionGradient, AttentionInto
from simplclip.ops.calls import flat
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.registry import autocast, call, define, register_gradient


def rows_in_memory(call: AttentionCall, *names: str) -> None:
    """Copies tensors whose last dimension is not contiguous; kernels read heads with any other strides."""
    for name in names:
        if getattr(call, name).stride(-1) != 1:
            setattr(call, name, getattr(call, name).contiguous())


def _facts(call):
    return {"width": call.q.shape[3], "length": call.q.shape[1]}


def _fwd(function, call):
    rows_in_memory(call, "q", "k", "v")
    return function(call)


def _fwd_fake(call):
    b, length, h, _ = call.q.shape
    lse = call.q.new_empty(b, h, length, dtype=call.gains.dtype)
    return torch.empty_like(call.q, memory_format=torch.contiguous_format), lse


def _bwd(function, call):
    d = _empty_gradients(call)
    rows_in_memory(call, "grad", "q", "k", "v")
    return *d, function(AttentionInto(*flat(call), *d))


def _bwd_fake(call):
    return *_empty_gradients(call), torch.empty_like(call.gains)


def _empty_gradients(call: AttentionCall) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (call.q, call.k, call.v)]


def _why_not_triton(device: str, dtype: torch.dtype, *, width: int = 0, **call) -> str | None:
    """The rows of a wider head do not fit in registers."""
    most = 128 if dtype == torch.float32 else 256
    if width > most:
        return f"serves heads of at most {most} in {dtype}, not {width}"
    return backends.triton_on_cuda(device, dtype)


def _why_not_cuda(device: str, dtype: torch.dtype, *, length: int = 1, width: int = 16, **call) -> str | None:
    if reason := backends.extension_on_cuda(device, dtype):
        return reason
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "serves float32 only through TF32, which torch does not allow (torch.backends.cuda.matmul.allow_tf32)"
    reason = backends.cuda_extension.shaped_attention_why_not(length, width)
    return reason and f"{reason}; got {length} tokens, width {width}"


_FWD, _BWD = (
    backends.row(function, module="attention.op", triton=_why_not_triton, cuda=_why_not_cuda)
    for function in (reference.shaped_attention_fwd, reference.shaped_attention_bwd)
)
define("shaped_attention_fwd", AttentionCall, "(Tensor, Tensor)", _fwd, _fwd_fake, row=_FWD, facts=_facts)
define(
    "shaped_attention_bwd", AttentionGradient, "(Tensor, Tensor, Tensor, Tensor)", _bwd, _bwd_fake, row=_BWD, facts=_facts,
    native=(AttentionInto, "Tensor"), native_fake=lambda call: torch.empty_like(call.gains),
)  # fmt: skip


def _gradient(call, results, grad, need, backend):
    grads = torch.ops.simplclip.shaped_attention_bwd(*flat(call), grad, *results, backend)
    return dict(zip(("q", "k", "v", "gains"), grads))


register_gradient("shaped_attention_fwd", AttentionCall, _gradient)


def shaped_attention(
    q: Tensor,  # [B, L, H, K]
    k: Tensor,  # [B, L, H, K]
    v: Tensor,  # [B, L, H, K]
    alpha: Tensor,  # [H]
    beta: Tensor,  # [H]
    gamma: Tensor,  # [H]
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,  # [B], integer
) -> Tensor:  # [B, L, H, K]
    """Shaped attention, per head: `out = alpha v + beta softmax(q k^T scale) v - gamma C v`.

    C is uniform over the keys that a query sees: the mean over the valid keys, or the running mean when `causal`.
    With q = 0 and alpha = beta = gamma the softmax equals C and the result is `alpha v`: the identity, from which a
    block without skip connections starts.

    Args:
        q, k, v: [B, L, H, K], float32, bfloat16, float16 or float64. Tensors with any strides are read without a copy (e.g.
            views of one product [q|k]) if their last dimension is contiguous. Under autocast they are cast to its dtype.
        alpha, beta, gamma: [H], any floating dtype.
        scale: factor of the logits, `K ** -0.5` when None.
        causal: query i attends to the keys 0..i only.
        lengths: [B] integers, the number of valid leading tokens of each sequence; 0 is allowed. Padded
            tokens are not read (they may contain anything, even NaN); their output and their gradients are zero. On a CPU
            a value below 0 or above L is an error; on other devices, where a check would synchronise, it is clamped.

    Returns:
        [B, L, H, K], contiguous, in the dtype of `q`.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.

    Softmax, gains and sums are computed in float32 (float64 for float64), products with operands in the tensors' dtype.
    Saved for backward: q, k, v and the log-sum-exps, [B, H, L] float32; kernels store no [L, L] matrix. Sums have a
    fixed order: on one machine, the same call has the same bits each time, by the CPU kernels with any number of threads.
    Only first derivatives in reverse mode are supported, except by backend "reference".

    Source: He & Hofmann 2023, arXiv 2311.01906, where C is causal only; C over all valid keys and `lengths` are additions of
    this library.
    """
    checks.attention(q, k, v, alpha, beta, gamma)
    if lengths is not None:
        lengths = checks.lengths_of_batch(lengths, q.shape[0], q.shape[1], q.device)
    q, k, v = autocast(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else checks.number("scale", scale)
    dtype = accumulate_dtype(q.dtype)
    gains = torch.stack([alpha.to(dtype), beta.to(dtype), gamma.to(dtype)])
    of_call = AttentionCall(q, k, v, gains, lengths, scale, bool(causal))
    return call("shaped_attention_fwd", *flat(of_call), backends.forced())[0]
