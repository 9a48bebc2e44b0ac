"""The losses as anyone would write them with the whole matrix, by autograd: independent of simplclip's formulas."""

import torch
import torch.nn.functional as F


def similarity_loss(
    image,
    text,
    logit_scale,
    *,
    plane=None,
    negatives="all",
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
    masked = logits.masked_fill(~(positive | negative), -torch.inf)
    contrastive = F.cross_entropy(masked, labels)
    if symmetric:
        contrastive = (contrastive + F.cross_entropy(masked.T[labels], torch.arange(n))) / 2
    out = {"contrastive": contrastive}
    if plane is None:
        return out
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
        negative_loss = (weight_of * unmatched).sum()
    out["pair_matching"] = (F.softplus(-decision[positive]).mean() + negative_loss) / 2
    return out
