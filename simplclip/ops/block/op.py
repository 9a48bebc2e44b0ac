"""simplified_block: the whole SAS-P block as one op, which keeps a third of the activations of a transformer block."""

from __future__ import annotations

import torch
from torch import Tensor

from simplclip.ops import backends, checks
from simplclip.ops.block.norm import NORMS, norm_bwd, norm_fwd
from simplclip.ops.dtypes import accumulate_dtype
from simplclip.ops.mlp.op import hidden_rows, keeps_hidden, linear, to_overwrite
from simplclip.ops.mlp.reference import ACTIVATIONS
from simplclip.ops.registry import autocast, call, define, register_autograd

TENSORS = (
    "x",  # [B, L, C]
    "norm_weight",  # [C]
    "norm_bias",  # [C] or None
    "qk_weight",  # [2C, C]
    "fc1_weight",  # [F, C]
    "fc1_bias",  # [F]
    "fc2_weight",  # [C, F]
    "fc2_bias",  # [C]
    "gains",  # [3, H]: attention_gain times alpha, beta, gamma
    "mlp_gain",  # []
    "value_weight",  # [C, C] or None
    "output_weight",  # [C, C] or None
)
_ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor qk_weight, Tensor fc1_weight, Tensor fc1_bias, "
    "Tensor fc2_weight, Tensor fc2_bias, Tensor gains, Tensor mlp_gain, Tensor? value_weight, Tensor? output_weight, "
    "Tensor? lengths, str norm, float eps, str act, float scale, bool causal"
)


def _split(qk: Tensor, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[T, 2C] -> q, k [B, L, H, K]: views."""
    q, k = qk.view(*x.shape[:2], 2, heads, x.shape[2] // heads).unbind(2)
    return q, k


def _fwd(
    pick, x, norm_weight, norm_bias, qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gains, mlp_gain, value_weight,
    output_weight, lengths, norm, eps, act, scale, causal, keep,
):  # fmt: skip
    x = x.contiguous()
    b, length, c = x.shape
    heads = gains.shape[1]
    attend = pick("shaped_attention_fwd", width=c // heads, length=length)
    n, _ = norm_fwd(x.view(-1, c), norm, norm_weight, norm_bias, eps)
    qk = linear(n, qk_weight, None)
    v = n if value_weight is None else linear(n, value_weight, None)
    q, k = _split(qk, x, heads)
    out, lse = attend(q, k, v.view(q.shape), gains, lengths, scale, causal)
    out = out.view(-1, c)
    if output_weight is not None:
        out = linear(out, output_weight, None)
    project = pick("parallel_mlp_fwd")
    weight, bias = fc2_weight * mlp_gain.to(x.dtype), fc2_bias * mlp_gain.to(x.dtype)
    if keep:
        h = linear(n, fc1_weight, fc1_bias)
        project(h, weight, bias, act, out, True)
    else:
        qk, h = x.new_empty(0), x.new_empty(0)
        for some, of_out in hidden_rows(n, fc1_weight, fc1_bias, out):
            project(some, weight, bias, act, of_out, True)
    return out.view(x.shape), qk, h, lse


def _fwd_fake(x, *args):
    tensors, keep = dict(zip(TENSORS, (x, *args))), args[-2]
    b, length, c = x.shape
    qk, h = ((b * length, 2 * c), (b * length, tensors["fc1_weight"].shape[0])) if keep else ((0,), (0,))
    gains = tensors["gains"]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(qk),
        x.new_empty(h),
        x.new_empty(b, gains.shape[1], length, dtype=gains.dtype),
    )


def _bwd(
    pick, grad, qk, h, lse, x, norm_weight, norm_bias, qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gains, mlp_gain,
    value_weight, output_weight, lengths, norm, eps, act, scale, causal, need,
):  # fmt: skip
    d = {}
    wanted = dict(zip(TENSORS, need))
    x, grad = x.contiguous(), grad.contiguous()
    c, heads = x.shape[2], gains.shape[1]
    flat = grad.view(-1, c)
    n, stats = norm_fwd(x.view(-1, c), norm, norm_weight, norm_bias, eps)
    need_n = wanted["x"] or wanted["norm_weight"] or wanted["norm_bias"]
    recompute = not qk.numel()

    # MLP. With w = mlp_gain fc2_weight: d mlp_gain = <dw, fc2_weight>, d fc2_weight = mlp_gain dw, likewise the bias.
    gain = mlp_gain.to(x.dtype)
    need_w = wanted["fc2_weight"] or wanted["mlp_gain"]
    if need_n or need_w or wanted["fc1_weight"] or wanted["fc1_bias"]:
        h = linear(n, fc1_weight, fc1_bias) if recompute else h
        dw = pick("parallel_mlp_bwd")(flat, h, fc2_weight * gain, act, need_w)
        if wanted["mlp_gain"]:
            d["mlp_gain"] = torch.linalg.vecdot(dw.flatten().to(gains.dtype), fc2_weight.flatten().to(gains.dtype))
        d["fc2_weight"] = dw.mul_(gain)
    if wanted["fc2_bias"] or wanted["mlp_gain"]:
        db = flat.sum(0)
        if wanted["mlp_gain"]:
            d["mlp_gain"] = d["mlp_gain"] + db.to(gains.dtype) @ fc2_bias.to(gains.dtype)
        d["fc2_bias"] = db.mul_(gain)
    if wanted["fc1_weight"]:
        d["fc1_weight"] = torch.mm(h.T, n)
    if wanted["fc1_bias"]:
        d["fc1_bias"] = h.sum(0)

    need_attention = need_n or wanted["qk_weight"] or wanted["gains"] or wanted["value_weight"]
    if need_attention or wanted["output_weight"]:
        qk = linear(n, qk_weight, None) if recompute else qk
        q, k = _split(qk, x, heads)
        v = (n if value_weight is None else linear(n, value_weight, None)).view(q.shape)
    if wanted["output_weight"]:
        attend = pick("shaped_attention_fwd", width=c // heads, length=x.shape[1])
        d["output_weight"] = torch.mm(flat.T, attend(q, k, v, gains, lengths, scale, causal)[0].view(-1, c))
    if need_attention:
        attend_bwd = pick("shaped_attention_bwd", width=c // heads, length=x.shape[1])
        d_attention = flat if output_weight is None else torch.mm(flat, output_weight)
        dqk, dv = torch.empty_like(qk), torch.empty_like(n)
        into = (*_split(dqk, x, heads), dv.view(q.shape))
        d["gains"] = attend_bwd(d_attention.view(q.shape), q, k, v, gains, lse, lengths, scale, causal, *into)
        if wanted["qk_weight"]:
            d["qk_weight"] = torch.mm(dqk.T, n)
        if wanted["value_weight"]:
            d["value_weight"] = torch.mm(dv.T, n)
        if need_n:
            dn = dv if value_weight is None else torch.mm(dv, value_weight)
            dn.addmm_(dqk, qk_weight).addmm_(h, fc1_weight)
            of_norm = norm_bwd(dn, x.view(-1, c), norm, norm_weight, norm_bias, stats, need[:3])
            d |= dict(zip(TENSORS, of_norm))
            d["x"] = d["x"].view(x.shape) if wanted["x"] else None
    return tuple(d[name] if wanted[name] else x.new_empty(0) for name in TENSORS)


def _bwd_fake(grad, qk, h, lse, *args):
    tensors, need = args[: len(TENSORS)], args[-2]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else grad.new_empty(0)
        for t, wanted in zip(tensors, need)
    )


define("simplified_block_fwd", f"{_ARGUMENTS}, bool keep", "(Tensor, Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
define(
    "simplified_block_bwd",
    f"Tensor grad, Tensor qk, Tensor(a!) h, Tensor lse, {_ARGUMENTS}, bool[] need",
    f"({', '.join(['Tensor'] * len(TENSORS))})",
    _bwd,
    _bwd_fake,
)


def _setup_context(ctx, inputs, output):
    *_, keep, backend = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    lengths = inputs[len(TENSORS)]
    ctx.save_for_backward(*kept, *inputs[: len(TENSORS)], lengths)
    ctx.mode = inputs[len(TENSORS) + 1 : -2]
    ctx.backend = backend


def _autograd(ctx, grad, *_):
    none = (None,) * 8
    if grad is None:
        return (None,) * len(TENSORS) + none
    qk, h, lse, *tensors, lengths = ctx.saved_tensors
    need = list(ctx.needs_input_grad[: len(TENSORS)])
    op = torch.ops.simplclip.simplified_block_bwd
    grads = op(grad, qk, to_overwrite(h), lse, *tensors, lengths, *ctx.mode, need, ctx.backend)
    return *(d if wanted else None for d, wanted in zip(grads, need)), *none


register_autograd("simplified_block_fwd", _autograd, _setup_context)


def simplified_block(
    x: Tensor,  # [B, L, C]
    qk_weight: Tensor,  # [2C, C]
    fc1_weight: Tensor,  # [F, C]
    fc1_bias: Tensor,  # [F]
    fc2_weight: Tensor,  # [C, F]
    fc2_bias: Tensor,  # [C]
    alpha: Tensor,  # [H]
    beta: Tensor,  # [H]
    gamma: Tensor,  # [H]
    *,
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
    """The simplified parallel block (SAS-P), which has no skip connections, value and output projections:

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
    `recompute`), where a standard block keeps 16C. Norm and activation are computed again. Backward overwrites h with its
    gradient (with retain_graph=True a copy of h). Gradients of frozen tensors are not computed. The result is deterministic.
    Only first derivatives in reverse mode are supported, except by backend "reference".

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
    return call(
        "simplified_block_fwd",
        *(tensors[name] for name in TENSORS), lengths, norm, eps, act, scale, bool(causal), keep, backends.forced()
    )[0]  # fmt: skip
