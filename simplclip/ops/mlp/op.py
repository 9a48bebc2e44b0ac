"""parallel_mlp: two linear layers around an activation that is never stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from simplclip.ops import backends, checks, registry
from simplclip.ops.mlp import reference
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.registry import autocast, call, define, register_autograd, wants_grad

HIDDEN_BYTES = 16 << 20  # size of a chunk of a hidden layer that is not kept
_NATIVE_FWD = "(Tensor h, Tensor weight, Tensor? bias, str act, Tensor(a!) out, bool accumulate) -> ()"
_NATIVE_BWD = "(Tensor grad, Tensor(a!) h, Tensor weight, str act, bool need_weight) -> Tensor"


def to_overwrite(saved: Tensor) -> Tensor:
    """`saved`, or a copy of it if it must not be overwritten: with retain_graph backward may run again; under tracing too."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return saved if (type(saved) is Tensor or registry.counted) and not keeps_graph() else saved.clone()


def keeps_hidden(*tensors: Tensor | None, recompute: bool = False) -> bool:
    """Whether the whole hidden layer is computed: for backward, and in the reference, which autograd differentiates."""
    return backends.forced() == "reference" or (not recompute and wants_grad(*tensors))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:  # [T, C], [F, C], [F]
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def hidden_rows(
    x: Tensor,  # [T, C]
    weight: Tensor,  # [F, C]
    bias: Tensor | None,  # [F]
    out: Tensor,  # [T, *]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Computes the hidden layer before its activation in chunks of rows; yields each chunk with the same rows of `out`."""
    rows = min(max(64, HIDDEN_BYTES // (weight.shape[0] * x.itemsize)), x.shape[0])
    h = x.new_empty(rows, weight.shape[0])
    for first in range(0, x.shape[0], rows):
        some = x[first : first + rows]
        yield linear(some, weight, bias, h[: some.shape[0]]), out[first : first + rows]


def _fwd(function, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, keep):
    out = x.new_empty(x.shape[0], fc2_weight.shape[0])
    fc2_bias = None if fc2_bias is None else fc2_bias.contiguous()  # the kernels read it by a pointer
    if keep:
        h = linear(x, fc1_weight, fc1_bias)
        function(h, fc2_weight, fc2_bias, act, out, False)
        return out, h
    for h, of_out in hidden_rows(x, fc1_weight, fc1_bias, out):
        function(h, fc2_weight, fc2_bias, act, of_out, False)
    return out, x.new_empty(0, fc1_weight.shape[0])


def _fwd_fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, keep, backend):
    rows = x.shape[0]
    return x.new_empty(rows, fc2_weight.shape[0]), x.new_empty(rows if keep else 0, fc1_weight.shape[0])


def _bwd(function, grad, h, x, fc1_weight, fc2_weight, act, need):
    """need: for x, fc1_weight, fc1_bias, fc2_weight, fc2_bias. The others get an empty gradient."""
    grad = grad.contiguous()
    none = x.new_empty(0)
    d_fc2_bias = grad.sum(0) if need[4] else none
    d_fc2_weight = function(grad, h, fc2_weight, act, need[3])
    d_fc1_bias = h.sum(0) if need[2] else none
    return (
        torch.mm(h, fc1_weight) if need[0] else none,
        torch.mm(h.T, x) if need[1] else none,
        d_fc1_bias,
        d_fc2_weight if need[3] else none,
        d_fc2_bias,
    )


def _bwd_fake(grad, h, x, fc1_weight, fc2_weight, act, need, backend):
    c, f = fc2_weight.shape
    shapes = (x.shape, fc1_weight.shape, (f,), (c, f), (c,))
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, need))


def _native_bwd_fake(grad, h, weight, act, need_weight):
    return weight.new_empty(weight.shape if need_weight else (0, weight.shape[1]))


define(
    "parallel_mlp_fwd",
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str act, bool keep",
    "(Tensor, Tensor)",
    _fwd,
    _fwd_fake,
    row=backends.row(reference.parallel_mlp_fwd, module="mlp.op"),
    native=_NATIVE_FWD,
    native_fake=lambda *_: None,
)
define(
    "parallel_mlp_bwd",
    "Tensor grad, Tensor(a!) h, Tensor x, Tensor fc1_weight, Tensor fc2_weight, str act, bool[] need",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
    row=backends.row(reference.parallel_mlp_bwd, module="mlp.op"),
    native=_NATIVE_BWD,
    native_fake=_native_bwd_fake,
)


def _setup_context(ctx, inputs, output):
    x, fc1_weight, _, fc2_weight, _, act, _, backend = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, x, fc1_weight, fc2_weight)
    ctx.mode = (act, backend)


def _autograd(ctx, grad, _):
    if grad is None:
        return (None,) * 8
    h, x, fc1_weight, fc2_weight = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:5])
    act, backend = ctx.mode
    grads = torch.ops.simplclip.parallel_mlp_bwd(grad, to_overwrite(h), x, fc1_weight, fc2_weight, act, need, backend)
    return *(d if wanted else None for d, wanted in zip(grads, need)), None, None, None


register_autograd("parallel_mlp_fwd", _autograd, _setup_context)


def parallel_mlp(
    x: Tensor,  # [..., C]
    fc1_weight: Tensor,  # [F, C]
    fc1_bias: Tensor | None,  # [F]
    fc2_weight: Tensor,  # [C_out, F]
    fc2_bias: Tensor | None,  # [C_out]
    *,
    act: str = "gelu",
) -> Tensor:  # [..., C_out]
    """`act(x fc1_weightᵀ + fc1_bias) fc2_weightᵀ + fc2_bias`: two linear layers with an activation between them.

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; weights and biases have its dtype. Under autocast all are cast
            to its dtype.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: parameters of two nn.Linear; a bias may be None.
        act: "gelu" (erf), "gelu_tanh", "quickgelu" (x sigmoid(1.702 x)), "relu" or "silu".

    Saved for backward: x, the weights, and h = x fc1_weightᵀ + fc1_bias. The activation is applied when the second
    product reads h and is never stored: [T, F] elements are kept instead of twice that. Backward overwrites h with its
    gradient (with retain_graph=True a copy of h). Sums are computed in float32; the result is deterministic. Only first
    derivatives in reverse mode are supported, except by backend "reference".

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.
    """
    tensors = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    checks.choice("act", act, tuple(ACTIVATIONS))
    checks.mlp(x, **tensors)
    x, *cast = autocast(x, *tensors.values())
    for name, t in zip(tensors, cast):
        if t is not None:
            checks.like(name, t, "x", x)
    keep = keeps_hidden(x, *cast)
    flat = x.reshape(-1, x.shape[-1])
    out, _ = call("parallel_mlp_fwd", flat, *cast, act, keep, backends.forced())
    return out.reshape(*x.shape[:-1], out.shape[1])
