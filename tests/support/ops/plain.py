"""The ops as anyone would write them in plain torch, by autograd: independent of simplclip's own
formulas.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quickgelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": F.relu,
    "silu": F.silu,
}


def softplus(x):
    return -F.logsigmoid(-x)  # F.softplus is exact to e^-20 only


def similarity_loss(
    image,
    text,
    logit_scale,
    *,
    logit_bias=0.0,
    terms=("contrastive", "pair_matching"),
    plane=None,
    teacher_image=None,
    teacher_text=None,
    teacher_scale=None,
    divergence="kl",
    weights=None,
    ids=None,
    text_ids=None,
    label_offset=0,
    symmetric=True,
):
    n, m = image.shape[0], text.shape[0]
    positive, negative = pairs(n, m, ids, text_ids, label_offset)
    similarity = image @ text.T
    logits = logit_scale * similarity

    def of_sides(distance, *matrices):
        """Returns a function of the rows of some matrices, averaged over rows and columns if
        symmetric.
        """
        matrices = [matrix.masked_fill(~(positive | negative), -torch.inf) for matrix in matrices]
        loss = distance(positive, *matrices)
        if not symmetric:
            return loss
        window = slice(label_offset, label_offset + n)
        return (loss + distance(*(matrix.T[window] for matrix in (positive, *matrices)))) / 2

    out = {}
    if "contrastive" in terms:
        out["contrastive"] = of_sides(cross_entropy, logits)
    if "sigmoid" in terms:
        biased = logits + logit_bias
        out["sigmoid"] = (softplus(-biased)[positive].sum() + softplus(biased)[negative].sum()) / n
    if "pair_matching" in terms:
        weight, bias = plane
        decision = (image * weight) @ text.T + bias
        of_negatives = softplus(decision)[negative].sum() / max(int(negative.sum()), 1)
        out["pair_matching"] = (softplus(-decision)[positive].mean() + of_negatives) / 2
    if "relational" in terms:
        teacher = teacher_scale * (teacher_image @ teacher_text.T)
        out["relational"] = of_sides(
            functools.partial(distance_to_teacher, divergence), teacher, logits
        )
    out = {term: out[term] for term in terms}
    if weights is not None:
        loss = sum(weights[term] * value for term, value in out.items())
        out = {term: value.detach() for term, value in out.items()} | {"loss": loss}
    return out


def pairs(n, m, ids=None, text_ids=None, label_offset=0):
    """Returns the positives and the negatives, [N, M] bool; pairs with equal ids that are not the
    positive are neither.
    """
    positive = F.one_hot(torch.arange(n) + label_offset, m).bool()
    negative = ~positive
    return positive, negative if ids is None else negative & (ids[:, None] != text_ids[None, :])


def cross_entropy(positive, logits):
    return (logits.logsumexp(1) - logits[positive]).mean()


def distance_to_teacher(divergence, positive, teacher, student):
    p = teacher.softmax(1)
    log_q = student.log_softmax(1).masked_fill(p == 0, 0)
    entropy = torch.special.entr(p).sum(1) if divergence == "kl" else 0
    return (-(p * log_q).sum(1) - entropy).mean()


def interactive(
    image,
    text,
    logit_scale,
    teacher_image,
    teacher_text,
    teacher_scale=None,
    *,
    form="infonce",
    divergence="kl",
    ids=None,
):
    """The interactive term of WIKDLoss: image and text are the student's features, or their
    projections, [N, D̂].
    """
    positive, negative = pairs(len(image), len(text), ids, ids)
    across = logit_scale * image @ teacher_text.T, logit_scale * text @ teacher_image.T
    teacher = None if form == "infonce" else teacher_scale * teacher_image @ teacher_text.T
    loss = 0.0
    for student, of_teacher in zip(across, (teacher, teacher if teacher is None else teacher.T)):
        student, *rest = (
            matrix.masked_fill(~(positive | negative), -torch.inf)
            for matrix in (student, of_teacher)
            if matrix is not None
        )
        of_side = (
            distance_to_teacher(divergence, positive, *rest, student)
            if rest
            else cross_entropy(positive, student)
        )
        loss = loss + of_side / 2
    return loss


def loss_terms(
    loss, terms, image, text, logit_scale, *, bias=None, teacher=(None, None, None), ids=None
):
    """Returns terms of a loss module before weighting; narrower features use the first columns of
    its parameters.
    """
    width, plane = image.shape[1], None
    if "pair_matching" in terms:
        weight = loss.plane_weight[:width] if loss.plane == "hadamard" else loss.plane_weight
        plane = weight, loss.plane_bias
    out = similarity_loss(
        image,
        text,
        logit_scale,
        logit_bias=0.0 if bias is None else bias,
        plane=plane,
        ids=ids,
        text_ids=ids,
        terms=[term for term in terms if term not in ("interactive", "feature")],
        **dict(zip(("teacher_image", "teacher_text", "teacher_scale"), teacher)),
        divergence=loss.divergence,
    )
    if "interactive" not in terms:
        return out
    if loss.image_projection is not None:
        projections = zip((image, text), (loss.image_projection, loss.text_projection))
        image, text = (
            F.normalize(F.linear(features, weight[:, :width]), dim=1)
            for features, weight in projections
        )
    form = {"form": loss.interactive, "divergence": loss.divergence, "ids": ids}
    out["interactive"] = interactive(image, text, logit_scale, *teacher, **form)
    out["feature"] = (feature_loss(image, teacher[0]) + feature_loss(text, teacher[1])) / 2
    return out


def shaped_attention(q, k, v, alpha, beta, gamma, *, scale=None, causal=False, lengths=None):
    """Computes the formula: products in the dtype of q, softmax and mixing weights in float32, one
    product with v.
    """
    length = q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.transpose(-2, -1)).to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if lengths is not None:
        valid = torch.arange(length, device=q.device) < lengths[:, None]
        visible = (visible & valid[:, None, :] & valid[:, :, None])[:, None]
        logits = logits.masked_fill(~visible, torch.finfo(wide).min)
    elif causal:
        logits = logits.masked_fill(~visible, -torch.inf)
    uniform = visible.to(wide) / visible.sum(-1, keepdim=True).clamp(min=1)
    weights = logits.softmax(-1) if lengths is None else logits.softmax(-1).masked_fill(~visible, 0)
    identity = torch.eye(length, dtype=wide, device=q.device)
    if lengths is not None:
        identity = identity * visible.any(-1, keepdim=True)
    alpha, beta, gamma = (t.to(wide)[:, None, None] for t in (alpha, beta, gamma))
    return ((alpha * identity + beta * weights - gamma * uniform).to(v.dtype) @ v).transpose(1, 2)


def attention_by_loops(q, k, v, alpha, beta, gamma, *, scale=None, causal=False, lengths=None):
    """Computes the definition token by token.

    It reads only visible tokens, where the form above multiplies others by 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        n = q.shape[1] if lengths is None else int(lengths[b])
        for h in range(q.shape[2]):
            for i in range(n):
                keys = i + 1 if causal else n
                a = (k[b, :keys, h] @ q[b, i, h] * scale).softmax(0)
                seen = v[b, :keys, h]
                out[b, i, h] = (
                    alpha[h] * v[b, i, h] + beta[h] * (a @ seen) - gamma[h] * seen.mean(0)
                )
    return out


def parallel_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, act="gelu"):
    return F.linear(ACTIVATIONS[act](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def simplified_block(
    x,
    qk_weight,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    alpha,
    beta,
    gamma,
    *,
    norm_weight,
    norm_bias=None,
    norm="layernorm",
    eps=1e-5,
    act="gelu",
    attention_gain=1.0,
    mlp_gain=1.0,
    value_weight=None,
    output_weight=None,
    causal=False,
    lengths=None,
    attention=shaped_attention,
):
    width = x.shape[-1]
    weight = norm_weight.to(x.dtype)
    if norm == "layernorm":
        n = F.layer_norm(
            x, (width,), weight, None if norm_bias is None else norm_bias.to(x.dtype), eps
        )
    else:
        n = F.rms_norm(x, (width,), weight, eps)
    q, k = (n @ qk_weight.T).chunk(2, dim=-1)
    v = n if value_weight is None else n @ value_weight.T
    heads = [t.reshape(*x.shape[:2], alpha.shape[0], -1) for t in (q, k, v)]
    mixed = attention(*heads, alpha, beta, gamma, causal=causal, lengths=lengths).reshape(x.shape)
    if output_weight is not None:
        mixed = mixed @ output_weight.T
    mlp = parallel_mlp(n, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act=act)
    as_x = lambda g: g.to(x.dtype) if isinstance(g, torch.Tensor) else g  # noqa: E731
    return as_x(attention_gain) * mixed + as_x(mlp_gain) * mlp


def feature_loss(student, teacher, *, distance="mse", beta=1.0, normalize=True, projection=None):
    if projection is not None:
        student = F.linear(student, projection)
    teacher = teacher.to(student.dtype)
    if normalize:
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    options = {"reduction": "none"}
    if distance == "mse":
        return F.mse_loss(student, teacher, **options).sum(1).mean()
    return F.smooth_l1_loss(student, teacher, beta=beta, **options).sum(1).mean()


# The operands of a matrix product -> where they begin among its arguments.
MATRIX_PRODUCTS = {
    getattr(torch.ops.aten, name).default: first
    for name, first in (("mm", 0), ("bmm", 0), ("addmm", 1))
}


def rounded_to_tf32(t: Tensor) -> Tensor:
    """Rounds float32 to 10 bits of mantissa, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class ProductsInTF32(TorchDispatchMode):
    """A mode that rounds the operands of products of float32 matrices, in backward too."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = MATRIX_PRODUCTS.get(function)
        if first is not None and args[first].dtype == torch.float32:
            args = (
                *args[:first],
                *map(rounded_to_tf32, args[first : first + 2]),
                *args[first + 2 :],
            )
        return function(*args, **(kwargs or {}))
