"""shaped_attention: identity, softmax and uniform attention, mixed by three gains per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionGradient, AttentionInto
from simplclip.calls.fields import accumulate_dtype
from simplclip.ops import checks, registry
from simplclip.ops.backends import Facts, select
from simplclip.ops.modes import autocast
from simplclip.ops.registry import define, register_gradient

SHAPES = checks.shapes(q="B L H K", k="B L H K", v="B L H K", alpha="H", beta="H", gamma="H")
KEEP_AV = ("sdpa", "xformers")  # the backends whose forward also returns A v


def facts_of(shape: Sequence[int], lengths: Tensor | None) -> Facts:
    """Returns the facts of a call for the backends' why_not(). shape: [B, L, H, K], of q."""
    return Facts(length=shape[1], width=shape[3], lengths=lengths is not None)


def run_forward(backend: ModuleType, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out, the log-sum-exps and A v, which is empty if the backend returns none."""
    results = backend.shaped_attention_fwd(call)
    if len(results) == 2:
        results = (*results, results[0].new_empty(0))
    return results


def av_shape(shape: Sequence[int], q: Tensor, name: str, lengths: Tensor | None) -> Sequence[int]:
    """Returns the shape of forward's A v on the backend that runs: `shape`, or (0,)."""
    facts = facts_of(shape, lengths)
    name = select("shaped_attention", q.device, q.dtype, name, facts)
    return shape if name in KEEP_AV else (0,)


def _facts(call: AttentionCall) -> Facts:
    """Returns the facts of a call for the backends' why_not(), see `facts_of`."""
    return facts_of(call.q.shape, call.lengths)


def _fwd_empty(call: AttentionCall, names: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns uninitialised out [B, L, H, K], log-sum-exps [B, H, L], and A v of `av_shape`."""
    batch, length, heads, _ = call.q.shape
    lse = call.gains.new_empty(batch, heads, length)
    av = av_shape(call.q.shape, call.q, names, call.lengths)
    return call.q.new_empty(call.q.shape), lse, call.q.new_empty(av)


def _bwd(backend: ModuleType, call: AttentionGradient) -> tuple[Tensor, ...]:
    """Returns the gradients of q, k, v and gains, by a backend."""
    dq, dk, dv = _empty_gradients(call)
    into = AttentionInto(**vars(call), dq=dq, dk=dk, dv=dv)
    return dq, dk, dv, backend.shaped_attention_bwd(into)


def _bwd_empty(call: AttentionGradient, names: str) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients of q, k, v and gains, for fake tensors."""
    return *_empty_gradients(call), torch.empty_like(call.gains)


def _empty_gradients(call: AttentionCall) -> list[Tensor]:
    """Returns uninitialised contiguous memory for the gradients of q, k and v."""
    return [t.new_empty(t.shape) for t in (call.q, call.k, call.v)]


FORWARD = define(
    "shaped_attention_fwd",
    "shaped_attention",
    AttentionCall,
    "(Tensor, Tensor, Tensor)",
    run_forward,
    _fwd_empty,
    facts=_facts,
)
BACKWARD = define(
    "shaped_attention_bwd",
    "shaped_attention",
    AttentionGradient,
    "(Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_empty,
    facts=_facts,
)


def _gradient(
    call: AttentionCall,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Mapping[str, bool],
    names: str,
) -> dict[str, Tensor]:
    """Returns the gradients of q, k, v and gains by name, all of them; see register_gradient."""
    lse, av = kept
    (grad,) = grads
    gradient = AttentionGradient(**vars(call), grad=grad, lse=lse, av=av)
    return dict(zip(("q", "k", "v", "gains"), registry.call(BACKWARD, gradient, names)))


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
    around another library's attention, as "sdpa", also save softmax(q k^T scale) v. No [L, L]
    matrix is stored. On one machine, the same call has the same bits each time, on the CPU kernels
    with any number of threads; with "sdpa" and the like on a GPU only under
    torch.use_deterministic_algorithms(True). Under it torch 2.11 refuses causal attention where
    Triton is missing, since its cumsum is not deterministic. Only first derivatives in reverse mode
    are supported.

    Source: He & Hofmann 2023, arXiv 2311.01906, where C is causal only; C over all valid keys and
    `lengths` are additions of this library.
    """
    tensors = {"q": q, "k": k, "v": v, "alpha": alpha, "beta": beta, "gamma": gamma}
    checks.expect(tensors, SHAPES, "q", {})
    if k.dtype != q.dtype or v.dtype != q.dtype:
        checks.check_all_like("q", q, {"k": k, "v": v})
    checks.check_boolean("causal", causal)
    if lengths is not None:
        lengths = checks.lengths_of_batch(lengths, q.shape[0], q.shape[1], q.device)
    q, k, v = autocast(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else checks.number("scale", scale)
    dtype = accumulate_dtype(q.dtype)
    gains = torch.stack([alpha.to(dtype), beta.to(dtype), gamma.to(dtype)])
    return registry.call(FORWARD, AttentionCall(q, k, v, gains, lengths, scale, causal))[0]
