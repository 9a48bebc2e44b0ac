"""simplified_block: the whole SAS-P block as one op, which saves 7C elements per token.

A standard block saves 16C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from simplclip.calls.attention import AttentionCall, AttentionInto
from simplclip.calls.block import BlockCall, BlockGradient, Needed
from simplclip.calls.fields import accumulate_dtype
from simplclip.calls.mlp import HiddenGradient
from simplclip.ops import checks, registry
from simplclip.ops.attention.op import av_shape, facts_of, run_forward
from simplclip.ops.backends import Facts
from simplclip.ops.block.norm import NORMS, norm_bwd, norm_fwd
from simplclip.ops.mlp.op import keeps_hidden, to_overwrite, write_mlp
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.modes import autocast
from simplclip.ops.registry import define, register_gradient

HEADS = checks.shapes(x="B L C", alpha="H")
SHAPES = checks.shapes(
    qk_weight="2C C",
    fc1_weight="F C",
    fc1_bias="F",
    fc2_weight="C F",
    fc2_bias="C",
    value_weight="C C?",
    output_weight="C C?",
    norm_weight="C",
    norm_bias="C?",
    beta="H",
    gamma="H",
)
MATRICES = list(SHAPES)[:7]


def heads_of(call: BlockCall) -> tuple[int, int, int, int]:
    """Returns (B, L, H, K), the shape of q, k and v."""
    batch, length, width = call.x.shape
    heads = call.alpha.shape[0]
    return batch, length, heads, width // heads


def _facts(call: BlockCall) -> Facts:
    """Returns the facts of the attention for the backends' why_not()."""
    return facts_of(heads_of(call), call.lengths)


def gains_of(call: BlockCall) -> Tensor:  # [3, H], in the dtype of sums
    """Returns alpha, beta, gamma stacked; the attention's gains are attention_gain times these."""
    wide = call.attention_gain.dtype
    return torch.stack([call.alpha.to(wide), call.beta.to(wide), call.gamma.to(wide)])


def _split(qk: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns q and k [B, L, H, K], views of [q|k] [T, 2C]; shape: that of q."""
    batch, length, heads, width = shape
    q, k = qk.view(batch, length, 2, heads, width).unbind(2)
    return q, k


def _attention_call(
    call: BlockCall,
    shape: tuple[int, int, int, int],
    n: Tensor,  # [T, C], the normalised x
    qk: Tensor,  # [T, 2C]
    gains: Tensor,  # [3, H]
) -> AttentionCall:
    """Returns the call of the block's attention, whose v is n or its projection by value_weight."""
    v = n if call.value_weight is None else F.linear(n, call.value_weight)
    q, k = _split(qk, shape)
    gains = gains * call.attention_gain
    return AttentionCall(q, k, v.view(shape), gains, call.lengths, call.scale, call.causal)


def _fwd(attention: ModuleType, mlp: ModuleType, call: BlockCall) -> tuple[Tensor, ...]:
    """Returns the results of BlockCall; [q|k], h and A v are empty unless call.keep.

    attention, mlp: the modules of the backends of shaped_attention and of parallel_mlp.
    """
    x = call.x.view(-1, call.x.shape[2])
    shape = heads_of(call)
    n, _ = norm_fwd(x, call)
    qk = F.linear(n, call.qk_weight)
    # a call that had a name would keep qk while the MLP runs
    out, lse, av = run_forward(attention, _attention_call(call, shape, n, qk, gains_of(call)))
    out = out.view(x.shape)
    if not call.keep:
        qk = x.new_empty(0)
        av = x.new_empty(0)
    if call.output_weight is not None:
        out = F.linear(out, call.output_weight)
    weight = call.fc2_weight * call.mlp_gain
    bias = call.fc2_bias * call.mlp_gain
    h = write_mlp(mlp, n, call, weight, bias, out, accumulate=True)
    # autograd lets no view that an op returns be changed in place
    out = torch.ops.aten._unsafe_view(out, call.x.shape)
    return out, qk, h, lse, av


def _fwd_empty(call: BlockCall, names: str) -> tuple[Tensor, ...]:
    """Returns uninitialised results of the op; the shape of A v depends on the attention's."""
    x = call.x
    shape = heads_of(call)
    batch, length, heads, _ = shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    lse = x.new_empty(batch, heads, length, dtype=call.attention_gain.dtype)
    if not call.keep:
        h = x.new_empty(0, call.fc1_weight.shape[0])
        return out, x.new_empty(0), h, lse, x.new_empty(0)
    qk = x.new_empty(batch * length, 2 * x.shape[2])
    h = x.new_empty(batch * length, call.fc1_weight.shape[0])
    av = av_shape(shape, x, names.partition(",")[0], call.lengths)
    return out, qk, h, lse, x.new_empty(av)


def _mlp_bwd(
    mlp: ModuleType, call: BlockGradient, n: Tensor, grad: Tensor, need: Needed, need_n: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the gradient of h, which overwrites h, and those of fc1, fc2, mlp_gain by name."""
    gradients = {}
    h = call.h
    gain = call.mlp_gain
    need_w = need.fc2_weight or need.mlp_gain
    if need_n or need_w or need.fc1_weight or need.fc1_bias:
        if not h.numel():
            h = F.linear(n, call.fc1_weight, call.fc1_bias)
        # with w = gain fc2_weight: d gain = <dw, fc2_weight>, d fc2_weight = gain dw
        hidden = HiddenGradient(grad, h, call.fc2_weight * gain, call.act, need_w)
        dw = mlp.parallel_mlp_bwd(hidden)
        if need.mlp_gain:
            weight = call.fc2_weight.flatten().to(gain.dtype)
            gradients["mlp_gain"] = torch.dot(dw.flatten().to(gain.dtype), weight)
        gradients["fc2_weight"] = dw.mul_(gain)
    if need.fc2_bias or need.mlp_gain:
        db = grad.sum(0)
        if need.mlp_gain:
            gradients["mlp_gain"] += torch.dot(db.to(gain.dtype), call.fc2_bias.to(gain.dtype))
        gradients["fc2_bias"] = db.mul_(gain)
    if need.fc1_weight:
        gradients["fc1_weight"] = torch.mm(h.t(), n)
    if need.fc1_bias:
        gradients["fc1_bias"] = h.sum(0)
    return h, gradients


def _bwd(attention: ModuleType, mlp: ModuleType, call: BlockGradient) -> tuple[Tensor, ...]:
    """Returns the gradients in the order of Needed, empty where not needed; overwrites call.h."""
    x = call.x.view(-1, call.x.shape[2])
    need = Needed(*call.need)
    n, stats = norm_fwd(x, call)
    grad = call.grad.view(x.shape)
    need_n = need.x or need.norm_weight or need.norm_bias
    d_h, gradients = _mlp_bwd(mlp, call, n, grad, need, need_n)

    need_gains = need.alpha or need.beta or need.gamma or need.attention_gain
    need_attention = need_n or need.qk_weight or need_gains or need.value_weight
    if need_attention or need.output_weight:
        qk = call.qk if call.qk.numel() else F.linear(n, call.qk_weight)
        gains = gains_of(call)
        forward = _attention_call(call, heads_of(call), n, qk, gains)
    if need.output_weight:
        out, *_ = attention.shaped_attention_fwd(forward)
        gradients["output_weight"] = torch.mm(grad.t(), out.view(x.shape))
    if need_attention:
        d_out = grad if call.output_weight is None else torch.mm(grad, call.output_weight)
        dqk, dv, d_gains = _attention_bwd(attention, call, forward, d_out)
        if need.attention_gain:
            gradients["attention_gain"] = torch.dot(d_gains.flatten(), gains.flatten())
        # one kernel on a GPU
        d_alpha, d_beta, d_gamma = torch._foreach_mul(d_gains.unbind(), call.attention_gain)
        gradients["alpha"] = d_alpha.to(call.alpha.dtype)
        gradients["beta"] = d_beta.to(call.beta.dtype)
        gradients["gamma"] = d_gamma.to(call.gamma.dtype)
        if need.qk_weight:
            gradients["qk_weight"] = torch.mm(dqk.t(), n)
        if need.value_weight:
            gradients["value_weight"] = torch.mm(dv.t(), n)
        if need_n:
            dn = dv if call.value_weight is None else torch.mm(dv, call.value_weight)
            dn.addmm_(dqk, call.qk_weight).addmm_(d_h, call.fc1_weight)
            gradients |= norm_bwd(dn, x, call, stats, need)
    results = []
    for name, needed in zip(Needed._fields, need):
        results.append(gradients[name] if needed else x.new_empty(0))
    return tuple(results)


def _attention_bwd(
    attention: ModuleType, call: BlockGradient, forward: AttentionCall, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of [q|k] [T, 2C], of v [T, C] and of the attention's gains [3, H]."""
    shape = heads_of(call)
    rows, width = d_out.shape
    dqk = d_out.new_empty(rows, 2 * width)
    dv = d_out.new_empty(rows, width)
    dq, dk = _split(dqk, shape)
    gradient = AttentionInto(
        **vars(forward),
        grad=d_out.view(shape),
        lse=call.lse,
        av=call.av,
        dq=dq,
        dk=dk,
        dv=dv.view(shape),
    )
    return dqk, dv, attention.shaped_attention_bwd(gradient)


def _bwd_empty(call: BlockGradient, names: str) -> tuple[Tensor, ...]:
    """Returns uninitialised gradients in the order of Needed, empty where not needed."""
    results = []
    for name, needed in zip(Needed._fields, call.need):
        like = getattr(call, name) if needed else call.grad.new_empty(0)
        results.append(torch.empty_like(like, memory_format=torch.contiguous_format))
    return tuple(results)


_GRADIENTS = f"({', '.join(['Tensor'] * len(Needed._fields))})"
FORWARD = define(
    "simplified_block_fwd",
    "simplified_block",
    BlockCall,
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_empty,
    facts=_facts,
)
BACKWARD = define(
    "simplified_block_bwd",
    "simplified_block",
    BlockGradient,
    _GRADIENTS,
    _bwd,
    _bwd_empty,
    facts=_facts,
)


def _gradient(
    call: BlockCall,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needed: Mapping[str, bool],
    names: str,
) -> dict[str, Tensor]:
    """Returns gradients of the call's tensors by name, empty where not needed; may overwrite h."""
    qk, h, lse, av = kept
    (grad,) = grads
    need = [needed[name] for name in Needed._fields]
    gradient = BlockGradient(
        **vars(call), grad=grad, qk=qk, h=to_overwrite(h), lse=lse, av=av, need=need
    )
    return dict(zip(Needed._fields, registry.call(BACKWARD, gradient, names)))


register_gradient(FORWARD, _gradient)


def simplified_block(
    x: Tensor,  # [B, L, C]
    qk_weight: Tensor,  # [2C, C]
    fc1_weight: Tensor,  # [F, C]
    fc1_bias: Tensor,  # [F]
    fc2_weight: Tensor,  # [C, F]
    fc2_bias: Tensor,  # [C]
    *,
    alpha: Tensor,  # [H]
    beta: Tensor,  # [H]
    gamma: Tensor,  # [H]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor | None = None,  # [C]
    norm: str = "layernorm",
    eps: float = 1e-5,
    act: str = "gelu",
    attention_gain: Tensor | float = 1.0,
    mlp_gain: Tensor | float = 1.0,
    value_weight: Tensor | None = None,  # [C, C]
    output_weight: Tensor | None = None,  # [C, C]
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,  # [B]
    recompute: bool = False,
) -> Tensor:  # [B, L, C]
    """The simplified parallel block (SAS-P), which has no skip connections and no value and output
    projections:

        n = norm(x);  [q|k] = n qk_weightᵀ;  v = n, split into heads
        out = attention_gain (alpha v + beta softmax(q kᵀ scale) v − gamma C v) + mlp_gain MLP(n)

    with the attention of `shaped_attention` and the MLP of `parallel_mlp`.

    Args:
        x: [B, L, C] float32, bfloat16, float16 or float64. The matrices and the MLP's biases have
            its dtype; under autocast all of them are cast to autocast's dtype.
        norm_weight, norm_bias, alpha, beta, gamma, attention_gain, mlp_gain: any floating dtype. H,
            the number of heads, is the length of alpha, a divisor of C.
        norm: "layernorm", or "rmsnorm" (without norm_bias).
        eps: is added to the variance, or to the mean square (He & Hofmann's code adds it to the
            root: see nn.SimplifiedBlock).
        act: as in `parallel_mlp`.
        value_weight: v = n value_weightᵀ; output_weight: applied to the attention's result. The
            authors keep them in the first and in the last block.
        scale, causal, lengths: as in `shaped_attention`.
        recompute: keep only x and the log-sum-exps for backward, which then computes the block
            again.

    Saved for backward: x, [q|k] [T, 2C], h [T, F] and the log-sum-exps [B, H, L]: 7C elements per
    token with F = 4C (C with `recompute`), where a standard block keeps 16C; C more if a backend
    around another library's attention runs, as "sdpa". Norm and activation are computed again.
    Backward overwrites h with its gradient (with retain_graph=True a copy of h). Gradients of
    frozen tensors are not computed. On one machine, the same call has the same bits each time (see
    `shaped_attention`); on a CPU, with the same number of threads. Only first derivatives in
    reverse mode are supported.

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and
            what it got.
        RuntimeError: a forced backend does not support the call.

    Source: He & Hofmann 2023, arXiv 2311.01906; SiCLIP, arXiv 2411.14789.
    """
    checks.check_choice("norm", norm, NORMS)
    checks.check_choice("act", act, tuple(ACTIVATIONS))
    checks.check_boolean("causal", causal)
    checks.check_boolean("recompute", recompute)
    matrices = (qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, value_weight, output_weight)
    tensors = {
        "x": x,
        **dict(zip(MATRICES, matrices)),
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
    }
    sizes: dict[str, int] = {}
    checks.expect(tensors, HEADS, "x", sizes)
    if sizes["C"] % sizes["H"]:
        raise ValueError(
            f"alpha: expected one value per head, [H] with H a divisor of C = {sizes['C']}, got "
            f"{checks.shape_of(alpha)}"
        )
    if norm == "rmsnorm" and norm_bias is not None:
        raise ValueError("norm_bias: expected None, since RMSNorm has no bias, got a tensor")
    checks.expect(tensors, SHAPES, "x", sizes)
    if lengths is not None:
        lengths = checks.lengths_of_batch(lengths, x.shape[0], x.shape[1], x.device)
    x, *cast = autocast(x, *matrices)
    checks.check_all_like("x", x, dict(zip(MATRICES, cast)))
    qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, value_weight, output_weight = cast
    wide = accumulate_dtype(x.dtype)
    attention_gain = checks.scalar("attention_gain", attention_gain, x.device, wide, of="x")
    mlp_gain = checks.scalar("mlp_gain", mlp_gain, x.device, wide, of="x")
    eps = checks.number("eps", eps, positive=True)
    if scale is None:
        scale = (x.shape[2] // alpha.shape[0]) ** -0.5
    else:
        scale = checks.number("scale", scale)
    gains = (alpha, beta, gamma, attention_gain, mlp_gain)
    keep = keeps_hidden(x, *cast, norm_weight, norm_bias, *gains, recompute=recompute)
    call = BlockCall(
        x, norm_weight, norm_bias, qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        alpha, beta, gamma, attention_gain, mlp_gain, value_weight, output_weight,
        lengths, norm, eps, act, scale, causal, keep,
    )  # fmt: skip
    return registry.call(FORWARD, call)[0]
