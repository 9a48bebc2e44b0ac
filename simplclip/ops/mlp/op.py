"""parallel_mlp: two linear layers around an activation that is never stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.block import BlockCall
from simplclip.calls.mlp import HiddenCall, HiddenGradient, MlpCall, MlpGradient
from simplclip.ops import checks, registry
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.modes import autocast, wants_grad
from simplclip.ops.registry import define, register_gradient

SHAPES = checks.shapes(fc1_weight="F C", fc2_weight="O F", x="... C", fc1_bias="F?", fc2_bias="O?")
WEIGHTS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
HIDDEN_BYTES = 16 << 20  # of a chunk of the hidden layer, if forward does not keep it


def to_overwrite(saved: Tensor) -> Tensor:
    """Returns `saved`, or with retain_graph, where backward may run again, a copy of it."""
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return saved.clone() if keeps_graph() else saved


def keeps_hidden(*tensors: Tensor | None, recompute: bool = False) -> bool:
    """Whether forward returns the whole hidden layer: a backward may follow, which reads it."""
    return not recompute and wants_grad(*tensors)


def write_mlp(
    backend: ModuleType,
    x: Tensor,  # [T, C]
    call: MlpCall | BlockCall,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    out: Tensor,  # [T, C_out]
    *,
    accumulate: bool,
) -> Tensor:
    """Writes or adds the MLP of x to `out`; returns h [T, F], or [0, F] unless call.keep."""
    fc1 = (x, call.fc1_weight, call.fc1_bias)
    chunks: Iterable[tuple[Tensor, Tensor]]
    if call.keep:
        h = F.linear(*fc1)
        chunks = [(h, out)]
    else:
        h = x.new_empty(0, call.fc1_weight.shape[0])
        chunks = _hidden_rows(*fc1, out)
    for h_chunk, out_chunk in chunks:
        backend.parallel_mlp_fwd(
            HiddenCall(h_chunk, fc2_weight, fc2_bias, call.act, out_chunk, accumulate)
        )
    return h


def _hidden_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields chunks of h = x weightᵀ + bias in one buffer of 16 MiB, with those rows of `out`."""
    rows = min(max(64, HIDDEN_BYTES // (weight.shape[0] * x.itemsize)), x.shape[0])
    h = x.new_empty(rows, weight.shape[0])
    for first in range(0, x.shape[0], rows):
        x_chunk = x[first : first + rows]
        h_chunk = F.linear(x_chunk, weight, bias, out=h[: x_chunk.shape[0]])  # type: ignore[call-arg]
        yield h_chunk, out[first : first + rows]


def _fwd(backend: ModuleType, call: MlpCall) -> tuple[Tensor, Tensor]:
    """Returns out [T, C_out] by a backend, and h [T, F], or [0, F] unless call.keep."""
    out = call.x.new_empty(call.x.shape[0], call.fc2_weight.shape[0])
    h = write_mlp(backend, call.x, call, call.fc2_weight, call.fc2_bias, out, accumulate=False)
    return out, h


def _fwd_empty(call: MlpCall, names: str) -> tuple[Tensor, Tensor]:
    """Returns uninitialised out [T, C_out], and h [T, F], or [0, F] unless call.keep."""
    rows = call.x.shape[0]
    out = call.x.new_empty(rows, call.fc2_weight.shape[0])
    h = call.x.new_empty(rows if call.keep else 0, call.fc1_weight.shape[0])
    return out, h


def _bwd(backend: ModuleType, call: MlpGradient) -> tuple[Tensor, ...]:
    """Returns the gradients of MlpGradient by a backend; those not needed are empty."""
    need_x, need_fc1_weight, need_fc1_bias, need_fc2_weight, need_fc2_bias = call.need
    grad = call.grad
    h = call.h
    d_x = d_fc1_weight = d_fc1_bias = d_fc2_weight = d_fc2_bias = h.new_empty(0)
    if need_fc2_bias:
        d_fc2_bias = grad.sum(0)
    # overwrites h by its gradient
    hidden = HiddenGradient(grad, h, call.fc2_weight, call.act, need_fc2_weight)
    d_weight = backend.parallel_mlp_bwd(hidden)
    if need_fc2_weight:
        d_fc2_weight = d_weight
    if need_fc1_bias:
        d_fc1_bias = h.sum(0)
    if need_x:
        d_x = torch.mm(h, call.fc1_weight)
    if need_fc1_weight:
        d_fc1_weight = torch.mm(h.T, call.x)
    return d_x, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias


def _bwd_empty(call: MlpGradient, names: str) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients of x and both layers' weight and bias, [0] if not needed."""
    c, f = call.fc2_weight.shape
    shapes = (call.x.shape, call.fc1_weight.shape, (f,), (c, f), (c,))
    return tuple(
        call.x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, call.need)
    )


FORWARD = define("parallel_mlp_fwd", "parallel_mlp", MlpCall, "(Tensor, Tensor)", _fwd, _fwd_empty)
BACKWARD = define(
    "parallel_mlp_bwd",
    "parallel_mlp",
    MlpGradient,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_empty,
)


def _gradient(
    call: MlpCall,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Mapping[str, bool],
    names: str,
) -> dict[str, Tensor]:
    """Returns the gradients by name, empty where not needed; may overwrite h."""
    (h,) = kept
    (grad,) = grads
    need = list(needed.values())
    gradient = MlpGradient(
        grad, to_overwrite(h), call.x, call.fc1_weight, call.fc2_weight, call.act, need
    )
    return dict(zip(FORWARD.names, registry.call(BACKWARD, gradient, names)))


register_gradient(FORWARD, _gradient)


def parallel_mlp(
    x: Tensor,  # [..., C]
    fc1_weight: Tensor,  # [F, C]
    fc1_bias: Tensor | None,  # [F]
    fc2_weight: Tensor,  # [C_out, F]
    fc2_bias: Tensor | None,  # [C_out]
    *,
    act: str = "gelu",
) -> Tensor:  # [..., C_out]
    """`act(x fc1_weightᵀ + fc1_bias) fc2_weightᵀ + fc2_bias`: two linear layers with an activation
    between them.

    Args:
        x: [..., C] float32, bfloat16, float16 or float64; weights and biases have its dtype. Under
            autocast all are cast to its dtype.
        fc1_weight, fc1_bias, fc2_weight, fc2_bias: parameters of two nn.Linear; a bias may be None.
        act: "gelu" (erf), "gelu_tanh", "quickgelu" (x sigmoid(1.702 x)), "relu" or "silu".

    Saved for backward: x, the weights, and h = x fc1_weightᵀ + fc1_bias. The activation of h exists
    for some rows at a time, in 8 or 16 MiB: [T, F] elements are kept instead of twice that.
    Backward overwrites h with its gradient (with retain_graph=True a copy of h). Sums are computed
    in float32. On one machine, the same call has the same bits each time; on a CPU, with the same
    number of threads. Only first derivatives in reverse mode are supported.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.
        RuntimeError: a forced backend does not support the call.
    """
    checks.check_choice("act", act, tuple(ACTIVATIONS))
    tensors = dict(zip(WEIGHTS, (fc1_weight, fc1_bias, fc2_weight, fc2_bias)))
    checks.expect({"x": x, **tensors}, SHAPES, "x", {})
    x, *weights = autocast(x, *tensors.values())
    checks.check_all_like("x", x, dict(zip(WEIGHTS, weights)))
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    keep = keeps_hidden(x, *weights)
    rows = x.reshape(-1, x.shape[-1])
    call = MlpCall(rows, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act, keep)
    out = registry.call(FORWARD, call)[0]
    return out.reshape(*x.shape[:-1], out.shape[1])
