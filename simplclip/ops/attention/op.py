"""shaped_attention: identity, softmax and uniform attention, mixed by three gains per head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionGradient, AttentionInto
from simplclip.calls.fields import accumulate_dtype
from simplclip.ops import backends, checks, registry
from simplclip.ops.attention import reference, sdpa, with_library_attention, xformers
from simplclip.ops.attention.with_library_attention import Library
from simplclip.ops.modes import autocast
from simplclip.ops.registry import define, register_gradient


def facts_of(shape: Sequence[int], lengths: Tensor | None) -> backends.Facts:
    """Returns the facts of a call for the backends' predicates. shape: [B, L, H, K], of q."""
    return backends.Facts(length=shape[1], width=shape[3], lengths=lengths is not None)


def run_forward(function: Callable, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a backend's function for forward; returns out, the log-sum-exps and A v.

    function: maps the call to (out, lse) or (out, lse, A v), where A = softmax(q kᵀ scale). Without
    an A v the third result is an empty tensor [0]. Shapes: see AttentionCall and AttentionGradient.
    """
    results = function(call)
    if len(results) == 2:
        results = (*results, results[0].new_empty(0))
    return results


def av_shape(shape: Sequence[int], q: Tensor, spec: str, lengths: Tensor | None) -> Sequence[int]:
    """Returns the shape of A v, the third result of forward, on the backend that runs the call.

    It is `shape`, [B, L, H, K], for "sdpa" and "xformers", else (0,). q: any tensor with the device
    and dtype of q. spec: the forced backends, see backends.forced. Raises RuntimeError if no
    backend, or not the forced one, can run the call.
    """
    op = "shaped_attention_fwd"
    facts = facts_of(shape, lengths)
    backend, _ = backends.select(op, q.device, q.dtype, spec, facts, part=True)
    return shape if backend in LIBRARIES else (0,)


def _facts(call: AttentionCall) -> backends.Facts:
    """Returns the facts of a call for the backends' predicates, see `facts_of`."""
    return facts_of(call.q.shape, call.lengths)


def _fwd(function: Callable, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Runs forward by a backend's function, see `run_forward`."""
    return run_forward(function, call)


def _native_fake(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Returns uninitialised tensors like the results of a C++ forward: out and the log-sum-exps."""
    batch, length, heads, _ = call.q.shape
    lse = call.q.new_empty(batch, heads, length, dtype=call.gains.dtype)
    return call.q.new_empty(call.q.shape), lse


def _fwd_fake(call: AttentionCall, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised results of the op: out [B, L, H, K], log-sum-exps [B, H, L], and A v.

    spec: the forced backends, see backends.forced, on which the shape of A v depends: see
    `av_shape`.
    """
    av = av_shape(call.q.shape, call.q, spec, call.lengths)
    return *_native_fake(call), call.q.new_empty(av)


def _bwd(function: Callable, call: AttentionGradient) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k, v [B, L, H, K] and gains [3, H], by a backend's function.

    function: takes an AttentionInto, whose dq, dk and dv are allocated here.
    """
    dq, dk, dv = _empty_gradients(call)
    return dq, dk, dv, function(AttentionInto(**vars(call), dq=dq, dk=dk, dv=dv))


def _bwd_fake(call: AttentionGradient, spec: str) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients of q, k, v and gains, in this order, for fake tensors."""
    return *_empty_gradients(call), torch.empty_like(call.gains)


def _empty_gradients(call: AttentionCall) -> list[Tensor]:
    """Returns uninitialised contiguous memory for the gradients of q, k and v, in this order."""
    return [t.new_empty(t.shape) for t in (call.q, call.k, call.v)]


def _why_not_cuda(device: torch.device, dtype: torch.dtype, facts: backends.Facts) -> str | None:
    """Returns why the CUDA C++ kernels cannot run shaped attention, or None if they can."""
    if reason := backends.extension_on_cuda(device, dtype):
        return reason
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return (
            "serves float32 only through TF32, which torch does not allow "
            "(torch.backends.cuda.matmul.allow_tf32)"
        )
    reason = backends.cuda_extension.shaped_attention_why_not(
        facts.length, facts.width, dtype == torch.float32
    )
    return reason and f"{reason}; got {facts.length} tokens, width {facts.width}"


def _why_not_sdpa(device: torch.device, dtype: torch.dtype, facts: backends.Facts) -> str | None:
    """Returns why backend "sdpa" cannot run shaped attention, or None; ignores `facts`."""
    if device.type not in ("cuda", "cpu"):
        return f"serves cuda and cpu tensors, not {device.type}"
    return backends.why_not_kernels(device.type, device, dtype)


def _why_not_xformers(
    device: torch.device, dtype: torch.dtype, facts: backends.Facts
) -> str | None:
    """Returns why backend "xformers" cannot run shaped attention, or None if it can."""
    if not backends.installed("xformers"):
        return "the package xformers is not installed"
    if facts.lengths:
        return "takes lengths only as a list on the host"
    return backends.why_not_kernels("cuda", device, dtype)


# The backends that take the softmax attention from another library.
LIBRARIES = {
    "sdpa": Library(sdpa.attention, sdpa.attention_backward, _why_not_sdpa),
    "xformers": Library(xformers.attention, xformers.attention_backward, _why_not_xformers),
}
_FWD = backends.row(reference.shaped_attention_fwd, AttentionCall, cuda=_why_not_cuda)
_BWD = backends.row(reference.shaped_attention_bwd, AttentionInto, cuda=_why_not_cuda)
for _name, _library in LIBRARIES.items():
    _fwd_function = partial(with_library_attention.shaped_attention_fwd, _library)
    _FWD[_name] = backends.Implementation(_fwd_function, _library.why_not)
    _bwd_function = partial(with_library_attention.shaped_attention_bwd, _library)
    _BWD[_name] = backends.Implementation(_bwd_function, _library.why_not)
FORWARD = define(
    "shaped_attention_fwd",
    AttentionCall,
    "(Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    row=_FWD,
    facts=_facts,
    native=(AttentionCall, "(Tensor, Tensor)"),
    native_fake=_native_fake,
)
BACKWARD = define(
    "shaped_attention_bwd",
    AttentionGradient,
    "(Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    row=_BWD,
    facts=_facts,
    native=(AttentionInto, "Tensor"),
    native_fake=lambda call: torch.empty_like(call.gains),
)


def _gradient(
    call: AttentionCall,
    results: Sequence[Tensor],
    grads: Sequence[Any],
    needed: Sequence[bool],
    spec: str,
) -> dict[str, Tensor]:
    """Returns the gradients of q, k, v and gains by name; the `backward` of register_gradient.

    results: the log-sum-exps and A v of forward. grads: the gradient of out alone. needed: ignored,
    since all are computed. spec: the backends that were forced in forward.
    """
    lse, av = results
    (grad,) = grads
    gradient = AttentionGradient(**vars(call), grad=grad, lse=lse, av=av)
    return dict(zip(("q", "k", "v", "gains"), registry.call(BACKWARD, gradient, spec)))


register_gradient(FORWARD, _gradient)


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

    C is uniform over the keys that a query sees: the mean over the valid keys, or the running mean
    when `causal`. With q = 0 and alpha = beta = gamma the softmax equals C and the result is `alpha
    v`: the identity, from which a block without skip connections starts.

    Args:
        q, k, v: [B, L, H, K], float32, bfloat16, float16 or float64. Tensors with any strides are
            read without a copy (e.g. views of one product [q|k]) if their last dimension is
            contiguous. Under autocast they are cast to its dtype.
        alpha, beta, gamma: [H], any floating dtype.
        scale: factor of the logits, `K ** -0.5` when None.
        causal: query i attends to the keys 0..i only.
        lengths: [B] integers, the number of valid leading tokens of each sequence; 0 is allowed.
            Padded tokens are not read (they may contain anything, even NaN); their output and their
            gradients are zero. On a CPU a value below 0 or above L is an error; on other devices,
            where a check would synchronise, it is clamped.

    Returns:
        [B, L, H, K], contiguous, in the dtype of `q`.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.
        RuntimeError: a forced backend does not support the call.

    Softmax, gains and sums are computed in float32 (float64 for float64), products with operands in
    the tensors' dtype. Saved for backward: q, k, v and the log-sum-exps [B, H, L] float32; backends
    "sdpa" and "xformers" also save softmax(q k^T scale) v. No [L, L] matrix is stored. On one
    machine, the same call has the same bits each time, on the CPU kernels with any number of
    threads; with "sdpa" and "xformers" on a GPU only under
    torch.use_deterministic_algorithms(True). Under it torch 2.11 refuses causal attention where
    Triton is missing, since its cumsum is not deterministic. Only first derivatives in reverse mode
    are supported.

    Source: He & Hofmann 2023, arXiv 2311.01906, where C is causal only; C over all valid keys and
    `lengths` are additions of this library.
    """
    checks.check_attention(q, k, v, alpha, beta, gamma)
    checks.check_boolean("causal", causal)
    if lengths is not None:
        lengths = checks.lengths_of_batch(lengths, q.shape[0], q.shape[1], q.device)
    q, k, v = autocast(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else checks.number("scale", scale)
    dtype = accumulate_dtype(q.dtype)
    gains = torch.stack([alpha.to(dtype), beta.to(dtype), gamma.to(dtype)])
    return registry.call(FORWARD, AttentionCall(q, k, v, gains, lengths, scale, causal))[0]
