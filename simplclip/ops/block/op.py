"""simplified_block: the whole SAS-P block as one op, which saves 7C elements per token (a standard block: 16C)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simplclip.ops import checks, registry
from simplclip.ops.attention.call import AttentionCall, AttentionInto
from simplclip.ops.attention.op import av_shape
from simplclip.ops.attention.op import forward as attention_forward
from simplclip.ops.block.call import DIFFERENTIABLE, BlockCall, BlockGradient
from simplclip.ops.block.norm import NORMS, norm_bwd, norm_fwd
from simplclip.ops.calls import accumulate_dtype, flat
from simplclip.ops.mlp.call import HiddenCall, HiddenGradient
from simplclip.ops.mlp.op import hidden_rows, keeps_hidden, linear, to_overwrite
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.registry import autocast, define, register_gradient


def _split(qk: Tensor, call: BlockCall) -> tuple[Tensor, Tensor]:
    """Returns q and k [B, L, H, K], views of [q|k] [T, 2C]."""
    b, length, *head = call.heads
    q, k = qk.view(b, length, 2, *head).unbind(2)
    return q, k


def _facts(call: BlockCall) -> dict:
    """Returns the facts of the block's attention, for the predicates of backends."""
    return {"length": call.heads[1], "width": call.heads[3], "lengths": call.lengths is not None}


def _attention(pick, name: str, call: BlockCall) -> Callable:
    return pick(f"shaped_attention_{name}", **_facts(call))


def _attention_call(call: BlockCall, n: Tensor, qk: Tensor) -> AttentionCall:
    v = n if call.value_weight is None else linear(n, call.value_weight, None)
    return AttentionCall(*_split(qk, call), v.view(call.heads), call.gains, call.lengths, call.scale, call.causal)


def _norm(call: BlockCall) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Returns x and the normalised x, [T, C], and the statistics that norm_bwd needs."""
    x = call.x.contiguous().view(-1, call.x.shape[2])
    return x, *norm_fwd(x, call)


def _fwd(pick, call):
    x, n, _ = _norm(call)
    qk = linear(n, call.qk_weight, None)
    out, lse, av = attention_forward(_attention(pick, "fwd", call), _attention_call(call, n, qk))
    out, av = out.view(x.shape), av if call.keep else x.new_empty(0)
    if call.output_weight is not None:
        out = linear(out, call.output_weight, None)
    project, gain = pick("parallel_mlp_fwd"), call.mlp_gain.to(x.dtype)
    weight, bias = call.fc2_weight * gain, call.fc2_bias * gain
    first = n, call.fc1_weight, call.fc1_bias
    h = linear(*first) if call.keep else x.new_empty(0)
    qk = qk if call.keep else x.new_empty(0)
    for some, of_out in [(h, out)] if call.keep else hidden_rows(*first, out):
        project(HiddenCall(some, weight, bias, call.act, of_out, accumulate=True))
    return out.view(call.x.shape), qk, h, lse, av


def _fwd_fake(call, backend):
    x, (b, length, heads, _) = call.x, call.heads
    widths = (2 * x.shape[2], call.fc1_weight.shape[0])
    qk, h = (x.new_empty((b * length, width) if call.keep else (0,)) for width in widths)
    lse = x.new_empty(b, heads, length, dtype=call.gains.dtype)
    av = x.new_empty(av_shape(call.heads, x, backend, **_facts(call)) if call.keep else (0,))
    return torch.empty_like(x, memory_format=torch.contiguous_format), qk, h, lse, av


def _bwd(pick, call):
    d = {}
    wanted = dict(zip(DIFFERENTIABLE, call.need))
    x, n, stats = _norm(call)
    grad, qk, h, wide = call.grad.contiguous().view(x.shape), call.qk, call.h, call.gains.dtype
    need_n = wanted["x"] or wanted["norm_weight"] or wanted["norm_bias"]
    recompute = not qk.numel()

    # MLP. With w = mlp_gain fc2_weight: d mlp_gain = <dw, fc2_weight>, d fc2_weight = mlp_gain dw, likewise the bias.
    gain = call.mlp_gain.to(x.dtype)
    need_w = wanted["fc2_weight"] or wanted["mlp_gain"]
    if need_n or need_w or wanted["fc1_weight"] or wanted["fc1_bias"]:
        h = linear(n, call.fc1_weight, call.fc1_bias) if recompute else h
        dw = pick("parallel_mlp_bwd")(HiddenGradient(grad, h, call.fc2_weight * gain, call.act, need_w))
        if wanted["mlp_gain"]:
            d["mlp_gain"] = torch.linalg.vecdot(dw.flatten().to(wide), call.fc2_weight.flatten().to(wide))
        d["fc2_weight"] = dw.mul_(gain)
    if wanted["fc2_bias"] or wanted["mlp_gain"]:
        db = grad.sum(0)
        if wanted["mlp_gain"]:
            d["mlp_gain"] = d["mlp_gain"] + db.to(wide) @ call.fc2_bias.to(wide)
        d["fc2_bias"] = db.mul_(gain)
    if wanted["fc1_weight"]:
        d["fc1_weight"] = torch.mm(h.T, n)
    if wanted["fc1_bias"]:
        d["fc1_bias"] = h.sum(0)

    need_attention = need_n or wanted["qk_weight"] or wanted["gains"] or wanted["value_weight"]
    if need_attention or wanted["output_weight"]:
        qk = linear(n, call.qk_weight, None) if recompute else qk
        attention = _attention_call(call, n, qk)
    if wanted["output_weight"]:
        out, *_ = _attention(pick, "fwd", call)(attention)
        d["output_weight"] = torch.mm(grad.T, out.view(x.shape))
    if need_attention:
        d_attention = grad if call.output_weight is None else torch.mm(grad, call.output_weight)
        dqk, dv = torch.empty_like(qk), torch.empty_like(n)
        given = *flat(attention), d_attention.view(call.heads), call.lse, call.av
        into = AttentionInto(*given, *_split(dqk, call), dv.view(call.heads))
        d["gains"] = _attention(pick, "bwd", call)(into)
        if wanted["qk_weight"]:
            d["qk_weight"] = torch.mm(dqk.T, n)
        if wanted["value_weight"]:
            d["value_weight"] = torch.mm(dv.T, n)
        if need_n:
            dn = dv if call.value_weight is None else torch.mm(dv, call.value_weight)
            dn.addmm_(dqk, call.qk_weight).addmm_(h, call.fc1_weight)
            d |= norm_bwd(dn, x, call, stats, wanted)
            d["x"] = d["x"].view(call.x.shape) if wanted["x"] else None
    return tuple(d[name] if wanted[name] else x.new_empty(0) for name in DIFFERENTIABLE)


def _bwd_fake(call, backend):
    return tuple(
        torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) if wanted else call.grad.new_empty(0)
        for name, wanted in zip(DIFFERENTIABLE, call.need)
    )


_GRADIENTS = f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
FORWARD = define("simplified_block_fwd", BlockCall, "(Tensor, Tensor, Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
BACKWARD = define("simplified_block_bwd", BlockGradient, _GRADIENTS, _bwd, _bwd_fake)


def _gradient(call, results, grads, needed, spec):
    (qk, h, lse, av), (grad,) = results, grads
    gradient = BlockGradient(*flat(call), grad, qk, to_overwrite(h), lse, av, list(needed[:-1]))
    gradients = registry.call(BACKWARD, gradient, spec)
    return *[gradient if need else None for gradient, need in zip(gradients, needed)], None


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
    """The simplified parallel block (SAS-P), which has no skip connections and no value and output projections:

        n = norm(x);  [q|k] = n qk_weightᵀ;  v = n, split into heads
        out = attention_gain (alpha v + beta softmax(q kᵀ scale) v − gamma C v) + mlp_gain MLP(n)

    with the attention of `shaped_attention` and the MLP of `parallel_mlp`.

    Args:
        x: [B, L, C] float32, bfloat16, float16 or float64. The matrices and the MLP's biases have its dtype; under
            autocast all of them are cast to autocast's dtype.
        norm_weight, norm_bias, alpha, beta, gamma, attention_gain, mlp_gain: any floating dtype. H, the number of heads, is
            the length of alpha, a divisor of C.
        norm: "layernorm", or "rmsnorm" (without norm_bias).
        eps: is added to the variance, or to the mean square (He & Hofmann's code adds it to the root: see
            nn.SimplifiedBlock).
        act: as in `parallel_mlp`.
        value_weight: v = n value_weightᵀ; output_weight: applied to the attention's result. The authors keep them in the
            first and in the last block.
        scale, causal, lengths: as in `shaped_attention`.
        recompute: keep only x and the log-sum-exps for backward, which then computes the block again.

    Saved for backward: x, [q|k] [T, 2C], h [T, F] and the log-sum-exps [B, H, L]: 7C elements per token with F = 4C (C with
    `recompute`), where a standard block keeps 16C; C more if backend "sdpa" or "xformers" computes the attention. Norm and
    activation are computed again. Backward overwrites h with its gradient (with retain_graph=True a copy of h). Gradients of
    frozen tensors are not computed. On one machine, the same call has the same bits each time (see `shaped_attention`); on
    a CPU, with the same number of threads. Only first derivatives in reverse mode are supported, except by backend
    "reference".

    Raises:
        TypeError, ValueError: an argument is not valid; the message names it, what was expected and what it got.
        RuntimeError: a forced backend does not support the call.

    Source: He & Hofmann 2023, arXiv 2311.01906; SiCLIP, arXiv 2411.14789.
    """
    checks.choice("norm", norm, NORMS)
    checks.choice("act", act, tuple(ACTIVATIONS))
    matrices = {"qk_weight": qk_weight, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight}
    matrices |= {"fc2_bias": fc2_bias, "value_weight": value_weight, "output_weight": output_weight}
    vectors = {"norm_weight": norm_weight, "norm_bias": norm_bias, "alpha": alpha, "beta": beta, "gamma": gamma}
    checks.block(x, norm, **matrices, **vectors)
    if lengths is not None:
        lengths = checks.lengths_of_batch(lengths, x.shape[0], x.shape[1], x.device)
    x, *cast = autocast(x, *matrices.values())
    matrices = dict(zip(matrices, cast))
    for name, t in matrices.items():
        if t is not None:
            checks.like(name, t, "x", x)
    wide = accumulate_dtype(x.dtype)
    gains = torch.stack([alpha.to(wide), beta.to(wide), gamma.to(wide)])
    gains = gains * checks.scalar("attention_gain", attention_gain, x.device, wide, of="x")
    tensors = {"x": x, **matrices, "norm_weight": norm_weight, "norm_bias": norm_bias, "gains": gains}
    tensors["mlp_gain"] = checks.scalar("mlp_gain", mlp_gain, x.device, wide, of="x")
    eps = checks.number("eps", eps, positive=True)
    scale = (x.shape[2] // alpha.shape[0]) ** -0.5 if scale is None else checks.number("scale", scale)
    keep = keeps_hidden(*tensors.values(), recompute=recompute)
    of_call = BlockCall(**tensors, lengths=lengths, norm=norm, eps=eps, act=act, scale=scale, causal=bool(causal), keep=keep)
    return registry.call(FORWARD, of_call)[0]
