"""The ops as anyone would write them in plain torch, by autograd: independent of simplclip's own formulas."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quickgelu": lambda h: h * torch.sigmoid(1.702 * h),
    "relu": F.relu,
    "silu": F.silu,
}


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
    interactive="infonce",
    interactive_scale=None,
    projected_image=None,
    projected_text=None,
    divergence="kl",
    label_smoothing=0.0,
    decoupled=False,
    prior=None,
    margin=0.0,
    positives="drop",
    weights=None,
    ids=None,
    text_ids=None,
    label_offset=0,
    symmetric=True,
):
    n, m = image.shape[0], text.shape[0]
    labels = torch.arange(n) + label_offset
    similarity = image @ text.T
    logits = logit_scale * similarity
    positive = F.one_hot(labels, m).bool()
    negative, matched = ~positive, positive
    if ids is not None:
        negative &= ids[:, None] != text_ids[None, :]
        matched = ~negative if positives != "drop" else positive

    def rows(matrix):
        return matrix.masked_fill(~(positive | negative), -torch.inf)

    def columns(matrix):
        return rows(matrix).T[labels]

    def cross_entropy(by_row, by_column):
        loss = F.cross_entropy(rows(by_row), labels)
        return (loss + F.cross_entropy(columns(by_column), torch.arange(n))) / 2 if symmetric else loss

    def contrast(logits, pair, matched, negative):
        """Returns the cross-entropy of rows with their pairs or, by options, with a distribution over the candidates."""
        seen = matched | negative
        logits = torch.where(pair, logits - margin, logits)
        target = (1 - label_smoothing) * matched.to(logits.dtype) / matched.sum(1, keepdim=True)
        target = target + label_smoothing * seen.to(logits.dtype) / seen.sum(1, keepdim=True)
        others = logits.masked_fill(~(negative if decoupled else seen & ~pair), -torch.inf).logsumexp(1)
        if prior is not None:
            count = negative.sum(1)
            top = torch.maximum(others, logits[pair]).detach()
            g = ((others - top).exp() / count.clamp(min=1) - prior * (logits[pair] - top).exp()) / (1 - prior)
            tiny = torch.finfo(g.dtype).tiny
            others = torch.where(g < tiny, -torch.inf, top + g.clamp(min=tiny).log())
            others = torch.maximum(others, -torch.as_tensor(logit_scale, dtype=g.dtype)) + count.to(g.dtype).log()
            others = others.masked_fill(count == 0, -torch.inf)
        denominator = others if decoupled else torch.logaddexp(others, logits[pair])
        loss = denominator - (target * logits.masked_fill(target == 0, 0)).sum(1)
        return loss.masked_fill(denominator == -torch.inf, 0).mean()

    def of_positives(loss):  # [N, M] losses of each pair as a positive
        if positives == "sum" or not matched.any():
            return loss[matched].sum() / n
        loss = loss.masked_fill(~matched, 0)
        by_row = (loss / matched.sum(1, keepdim=True)).sum()
        by_column = (loss / matched.sum(0).clamp(min=1)).sum()
        return (by_row + by_column) / 2 / n if symmetric else by_row / n

    def distance(teacher, student):
        p = teacher.softmax(1)
        log_q = student.log_softmax(1).masked_fill(p == 0, 0)
        entropy = torch.special.entr(p).sum(1) if divergence == "kl" else 0
        return (-(p * log_q).sum(1) - entropy).mean()

    def distil(teacher, by_row, by_column):
        loss = distance(rows(teacher), rows(by_row))
        return (loss + distance(columns(teacher), columns(by_column))) / 2 if symmetric else loss

    out = {}
    if "contrastive" in terms:
        out["contrastive"] = contrast(logits, positive, matched, negative)
        if symmetric:
            turned = (matrix.T[labels] for matrix in (logits, positive, matched, negative))
            out["contrastive"] = (out["contrastive"] + contrast(*turned)) / 2
    if "sigmoid" in terms:
        biased = logits + logit_bias
        out["sigmoid"] = of_positives(-F.logsigmoid(biased)) - F.logsigmoid(-biased)[negative].sum() / n
    if "pair_matching" in terms:
        weight, bias = plane
        decision = (image * weight) @ text.T + bias
        unmatched = F.softplus(decision)
        negative_loss = unmatched[negative].sum() / max(int(negative.sum()), 1)
        out["pair_matching"] = (of_positives(F.softplus(-decision)) + negative_loss) / 2
    if teacher_image is not None:
        teacher = teacher_scale * (teacher_image @ teacher_text.T)
    if "relational" in terms:
        out["relational"] = distil(teacher, logits, logits)
    if "interactive" in terms:
        scale = logit_scale if interactive_scale is None else interactive_scale
        by_row = scale * ((image if projected_image is None else projected_image) @ teacher_text.T)
        by_column = scale * (teacher_image @ (text if projected_text is None else projected_text).T)
        if interactive == "infonce":
            out["interactive"] = cross_entropy(by_row, by_column)
        else:
            out["interactive"] = distil(teacher, by_row, by_column)
    out = {term: out[term] for term in terms}
    if weights is not None:
        loss = sum(weights[term] * value for term, value in out.items())
        out = {term: value.detach() for term, value in out.items()} | {"loss": loss}
    return out


def shaped_attention(q, k, v, alpha, beta, gamma, *, scale=None, causal=False, lengths=None):
    """Computes the formula: products in the dtype of q, softmax and mixing weights in float32, one product with v."""
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
    """Computes the definition token by token. It reads only visible tokens, where the form above multiplies others by 0."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        n = q.shape[1] if lengths is None else int(lengths[b])
        for h in range(q.shape[2]):
            for i in range(n):
                keys = i + 1 if causal else n
                a = (k[b, :keys, h] @ q[b, i, h] * scale).softmax(0)
                seen = v[b, :keys, h]
                out[b, i, h] = alpha[h] * v[b, i, h] + beta[h] * (a @ seen) - gamma[h] * seen.mean(0)
    return out


def parallel_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, act="gelu"):
    return F.linear(ACTIVATIONS[act](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def simplified_block(
    x, qk_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, alpha, beta, gamma, *, norm_weight, norm_bias=None,
    norm="layernorm", eps=1e-5, act="gelu", attention_gain=1.0, mlp_gain=1.0, value_weight=None, output_weight=None,
    causal=False, lengths=None, attention=shaped_attention,
):  # fmt: skip
    width = x.shape[-1]
    weight = norm_weight.to(x.dtype)
    if norm == "layernorm":
        n = F.layer_norm(x, (width,), weight, None if norm_bias is None else norm_bias.to(x.dtype), eps)
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
