"""The losses as anyone would write them with the whole matrix, by autograd: independent of simplclip's formulas."""

import torch
import torch.nn.functional as F


def similarity_loss(
    image,
    text,
    logit_scale,
    *,
    terms=("contrastive", "pair_matching"),
    plane=None,
    negatives="all",
    teacher_image=None,
    teacher_text=None,
    teacher_scale=None,
    interactive="infonce",
    interactive_scale=None,
    projected_image=None,
    projected_text=None,
    divergence="kl",
    ids=None,
    text_ids=None,
    label_offset=0,
    symmetric=True,
    shift=1,
):
    n, m = image.shape[0], text.shape[0]
    labels = torch.arange(n) + label_offset
    similarity = image @ text.T
    logits = logit_scale * similarity
    positive = F.one_hot(labels, m).bool()
    negative = ~positive
    if ids is not None:
        negative &= ids[:, None] != text_ids[None, :]

    def rows(matrix):
        return matrix.masked_fill(~(positive | negative), -torch.inf)

    def columns(matrix):
        return rows(matrix).T[labels]

    def cross_entropy(by_row, by_column):
        loss = F.cross_entropy(rows(by_row), labels)
        return (loss + F.cross_entropy(columns(by_column), torch.arange(n))) / 2 if symmetric else loss

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
        out["contrastive"] = cross_entropy(logits, logits)
    if "pair_matching" in terms:
        weight, bias = plane
        decision = (image * weight) @ text.T + bias
        unmatched = F.softplus(decision)
        if negatives == "all":
            negative_loss = unmatched[negative].sum() / max(int(negative.sum()), 1)
        elif negatives == "shift":
            other = (labels + shift) % m
            valid = negative[torch.arange(n), other]
            negative_loss = unmatched[torch.arange(n), other][valid].sum() / max(int(valid.sum()), 1)
        else:
            only = logits.detach().masked_fill(~negative, -torch.inf)
            weight_of = only.softmax(1).nan_to_num() / n
            if symmetric:
                by_column = torch.zeros_like(only)
                by_column[:, labels] = only.softmax(0).nan_to_num()[:, labels] / n
                weight_of = (weight_of + by_column) / 2
            negative_loss = (weight_of * unmatched.masked_fill(~negative, 0)).sum()
        out["pair_matching"] = (F.softplus(-decision[positive]).mean() + negative_loss) / 2
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
    return {term: out[term] for term in terms}
