"""The ops as anyone would write them in plain torch, by autograd: independent of simplclip's own
formulas.
"""

import functools
from collections.abc import Callable, Sequence
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

Number = Tensor | float


def softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # F.softplus is exact to e^-20 only


def similarity_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    *,
    logit_bias: Number = 0.0,
    terms: Sequence[str] = ("contrastive", "pair_matching"),
    plane: tuple[Tensor, Number] | None = None,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    teacher_scale: Number | None = None,
    divergence: str = "kl",
    weights: dict[str, float] | None = None,
    ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_offset: int = 0,
    symmetric: bool = True,
) -> dict[str, Tensor]:
    n, m = image.shape[0], text.shape[0]
    positive, negative = pairs(n, m, ids, text_ids, label_offset)
    similarity = image @ text.T
    logits = logit_scale * similarity

    def both_sides(distance: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        """Returns a distance of matrices' rows; if symmetric, its mean with that of the columns."""
        matrices = [matrix.masked_fill(~(positive | negative), -torch.inf) for matrix in matrices]
        loss = distance(positive, *matrices)
        if not symmetric:
            return loss
        window = slice(label_offset, label_offset + n)
        return (loss + distance(*(matrix.T[window] for matrix in (positive, *matrices)))) / 2

    out = {}
    if "contrastive" in terms:
        out["contrastive"] = both_sides(cross_entropy, logits)
    if "sigmoid" in terms:
        biased = logits + logit_bias
        out["sigmoid"] = (softplus(-biased)[positive].sum() + softplus(biased)[negative].sum()) / n
    if "pair_matching" in terms:
        weight, bias = plane
        decision = weight * similarity + bias
        negatives_mean = softplus(decision)[negative].sum() / max(int(negative.sum()), 1)
        out["pair_matching"] = (softplus(-decision)[positive].mean() + negatives_mean) / 2
    if "relational" in terms:
        teacher = teacher_scale * (teacher_image @ teacher_text.T)
        distance = functools.partial(distance_to_teacher, divergence)
        out["relational"] = both_sides(distance, teacher, logits)
    out = {term: out[term] for term in terms}
    if weights is not None:
        loss = sum(weights[term] * value for term, value in out.items())
        out = {term: value.detach() for term, value in out.items()} | {"loss": loss}
    return out


def pairs(
    n: int, m: int, ids: Tensor | None = None, text_ids: Tensor | None = None, label_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Returns positives and negatives, [N, M] bool; other pairs with equal ids are neither."""
    positive = F.one_hot(torch.arange(n) + label_offset, m).bool()
    negative = ~positive
    if ids is not None:
        negative = negative & (ids[:, None] != text_ids[None, :])
    return positive, negative


def cross_entropy(positive: Tensor, logits: Tensor) -> Tensor:
    return (logits.logsumexp(1) - logits[positive]).mean()


def distance_to_teacher(
    divergence: str, positive: Tensor, teacher: Tensor, student: Tensor
) -> Tensor:
    """Returns the mean divergence of rows of logits; `positive` is not used."""
    p = teacher.softmax(1)
    log_q = student.log_softmax(1).masked_fill(p == 0, 0)
    entropy = torch.special.entr(p).sum(1) if divergence == "kl" else 0
    return (-(p * log_q).sum(1) - entropy).mean()


def interactive(
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Number | None = None,
    *,
    form: str = "infonce",
    divergence: str = "kl",
    ids: Tensor | None = None,
) -> Tensor:
    """The interactive term of WIKDLoss: image and text are the student's features, or their
    projections, [N, D̂].
    """
    positive, negative = pairs(len(image), len(text), ids, ids)
    ignored = ~(positive | negative)
    by_image = (logit_scale * image @ teacher_text.T).masked_fill(ignored, -torch.inf)
    by_text = (logit_scale * text @ teacher_image.T).masked_fill(ignored, -torch.inf)
    if form == "infonce":
        image_loss = cross_entropy(positive, by_image)
        text_loss = cross_entropy(positive, by_text)
    else:
        teacher = teacher_scale * teacher_image @ teacher_text.T
        distance = functools.partial(distance_to_teacher, divergence, positive)
        image_loss = distance(teacher.masked_fill(ignored, -torch.inf), by_image)
        text_loss = distance(teacher.T.masked_fill(ignored, -torch.inf), by_text)
    return image_loss / 2 + text_loss / 2


def loss_terms(
    loss: Any,
    terms: Sequence[str],
    image: Tensor,
    text: Tensor,
    logit_scale: Number,
    *,
    bias: Number = 0.0,
    teacher: Sequence = (None, None, None),
    ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns terms of a loss module before weighting; narrow features use its first columns."""
    width, plane = image.shape[1], None
    if "pair_matching" in terms:
        plane = loss.plane_weight, loss.plane_bias
    teacher_image, teacher_text, teacher_scale = teacher
    out = similarity_loss(
        image,
        text,
        logit_scale,
        logit_bias=bias,
        plane=plane,
        ids=ids,
        text_ids=ids,
        terms=[term for term in terms if term not in ("interactive", "feature")],
        teacher_image=teacher_image,
        teacher_text=teacher_text,
        teacher_scale=teacher_scale,
        divergence=loss.divergence,
    )
    if "interactive" not in terms:
        return out
    if loss.image_projection is not None:
        image = F.normalize(F.linear(image, loss.image_projection[:, :width]), dim=1)
        text = F.normalize(F.linear(text, loss.text_projection[:, :width]), dim=1)
    form = {"form": loss.interactive, "divergence": loss.divergence, "ids": ids}
    out["interactive"] = interactive(image, text, logit_scale, *teacher, **form)
    out["feature"] = (feature_loss(image, teacher_image) + feature_loss(text, teacher_text)) / 2
    return out


def shaped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Computes the formula: products in the dtype of q, softmax and mixing weights in float32."""
    length = q.shape[1]
    if scale is None:
        scale = q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    logits = (q @ k.transpose(-2, -1)).to(wide) * scale
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
    weights = logits.softmax(-1)
    identity = torch.eye(length, dtype=wide, device=q.device)
    if lengths is not None:
        weights = weights.masked_fill(~visible, 0)
        identity = identity * visible.any(-1, keepdim=True)
    alpha, beta, gamma = (t.to(wide)[:, None, None] for t in (alpha, beta, gamma))
    return ((alpha * identity + beta * weights - gamma * uniform).to(v.dtype) @ v).transpose(1, 2)


def attention_by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Computes the definition token by token, of which it reads only visible ones."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        n = int(lengths[b]) if lengths is not None else q.shape[1]
        for h in range(q.shape[2]):
            for i in range(n):
                keys = n
                if causal:
                    keys = i + 1
                weights = (k[b, :keys, h] @ q[b, i, h] * scale).softmax(0)
                values = v[b, :keys, h]
                attended, mean = weights @ values, values.mean(0)
                out[b, i, h] = alpha[h] * v[b, i, h] + beta[h] * attended - gamma[h] * mean
    return out


def parallel_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    act: str = "gelu",
) -> Tensor:
    return F.linear(ACTIVATIONS[act](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def simplified_block(
    x: Tensor,
    qk_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    *,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    norm: str = "layernorm",
    eps: float = 1e-5,
    act: str = "gelu",
    attention_gain: Number = 1.0,
    mlp_gain: Number = 1.0,
    value_weight: Tensor | None = None,
    output_weight: Tensor | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    attention: Callable[..., Tensor] = shaped_attention,
) -> Tensor:
    def typed(value: Any) -> Any:
        return value.to(x.dtype) if isinstance(value, Tensor) else value

    width = x.shape[-1]
    if norm == "layernorm":
        n = F.layer_norm(x, (width,), typed(norm_weight), typed(norm_bias), eps)
    else:
        n = F.rms_norm(x, (width,), typed(norm_weight), eps)
    q, k = (n @ qk_weight.T).chunk(2, dim=-1)
    v = n if value_weight is None else n @ value_weight.T
    heads = [t.reshape(*x.shape[:2], alpha.shape[0], -1) for t in (q, k, v)]
    mixed = attention(*heads, alpha, beta, gamma, causal=causal, lengths=lengths).reshape(x.shape)
    if output_weight is not None:
        mixed = mixed @ output_weight.T
    mlp = parallel_mlp(n, fc1_weight, fc1_bias, fc2_weight, fc2_bias, act=act)
    return typed(attention_gain) * mixed + typed(mlp_gain) * mlp


def feature_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance: str = "mse",
    beta: float = 1.0,
    normalize: bool = True,
    projection: Tensor | None = None,
) -> Tensor:
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
    """A mode that rounds the operands of products of float32 matrices to TF32, in backward too.

    A GPU computes so with torch.backends.cuda.matmul.fp32_precision = "tf32".
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        first = MATRIX_PRODUCTS.get(function)
        if first is not None and args[first].dtype == torch.float32:
            operands = map(rounded_to_tf32, args[first : first + 2])
            args = (*args[:first], *operands, *args[first + 2 :])
        return function(*args, **(kwargs or {}))
