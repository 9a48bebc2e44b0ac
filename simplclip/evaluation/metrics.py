"""Zero-shot metrics of an encoded split, each with its chance: retrieval by groups, and classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn

from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.evaluation.splits import Split

KS = (1, 5, 10)
_CHUNK_BYTES = 64 * 2**20


def retrieval(split: Split) -> dict[str, dict[str, dict[str, float]]]:
    """R@k of an encoded split in both directions: direction -> "R@k" -> {"value", "chance"}, as fractions."""
    x, y = split.image_features, split.text_features
    x_groups, y_groups = split.data.groups, split.caption_groups
    return {
        "image_to_text": recall(x, y, x_groups, y_groups),
        "text_to_image": recall(y, x, y_groups, x_groups),
    }


def recall(
    queries: Tensor, candidates: Tensor, query_groups: Tensor, candidate_groups: Tensor
) -> dict[str, dict[str, float]]:
    """Fraction of queries that have a candidate of their own group among the k nearest, for each k of KS.

    queries: [n, D], candidates: [m, D], groups: int64 [n] and [m]. With as many groups as pairs this is the usual R@k.
    "chance" is the fraction if candidates are ranked at random: for r right ones of m, 1 - C(m-r, k)/C(m, k), averaged over
    the queries. Extra memory: a chunk of queries against all candidates, 64 MiB; never [n, m].
    """
    query_groups, candidate_groups = query_groups.to(queries.device), candidate_groups.to(queries.device)
    m, top = len(candidates), min(max(KS), len(candidates))
    chunk = max(1, _CHUNK_BYTES // (4 * m))
    hits = torch.cat(
        [
            candidate_groups[(q @ candidates.T).topk(top).indices] == g[:, None]
            for q, g in zip(queries.split(chunk), query_groups.split(chunk))
        ]
    )
    names, counts = candidate_groups.unique(return_counts=True)
    place = torch.searchsorted(names, query_groups).clamp(max=len(names) - 1)
    right = torch.where(names[place] == query_groups, counts[place], 0).double()
    answer = {}
    for k in KS:
        tries = torch.arange(min(k, m), device=right.device)
        miss = ((m - right[:, None] - tries).clamp(min=0) / (m - tries)).prod(1)
        answer[f"R@{k}"] = {"value": hits[:, :k].any(1).double().mean().item(), "chance": (1 - miss).mean().item()}
    return answer


@torch.no_grad()
def zero_shot(
    model: nn.Module, split: Split, tokenizer: Any, templates: Sequence[str], device: torch.device, precision: str
) -> dict[str, Any] | None:
    """Accuracy over the labels of the split, or None if it has fewer than two.

    Each label's weight is the mean of its features over `templates` (open_clip's build_zero_shot_classifier). Images
    without a label are skipped; "images" is the number of the others.
    """
    bad = [t for t in templates if t.count("{}") != 1]
    if bad:
        raise InputError(f"template: expected a phrase with one {{}} for the label, got {bad[0]!r}")
    labels = split.data.labels
    classes = sorted({label for label in labels if label})
    if len(classes) < 2:
        return None
    rows = [i for i, label in enumerate(labels) if label]
    truth = torch.tensor([classes.index(labels[i]) for i in rows], device=device)
    with hardware.autocast(precision, device):
        weights = build_zero_shot_classifier(model, tokenizer, classes, list(templates), device=device)
    ranked = (split.image_features[rows] @ weights.float()).topk(min(5, len(classes))).indices == truth[:, None]
    return {"classes": classes, "images": len(rows), "templates": list(templates)} | {
        f"top{k}": {"value": ranked[:, :k].any(1).double().mean().item(), "chance": min(1.0, k / len(classes))}
        for k in (1, 5)
    }
