"""Held-out splits in memory, and their zero-shot metrics, each with its chance: retrieval by groups, and classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn

from simplclip import data, models
from simplclip.common import hardware
from simplclip.common.errors import InputError

KS = (1, 5, 10)
_CHUNK_BYTES = 64 * 2**20


@dataclass
class Split:
    """A held-out split in memory, with its features after `encode`.

    Identical captions of one group (a concept drawn by several vendors) are one candidate: m <= n captions.
    """

    data: data.EvalSet  # images [n, 3, S, S], groups int64 [n], ...
    captions: list[str]  # m
    tokens: Tensor  # int64 [m, L]
    caption_groups: Tensor  # int64 [m]
    image_features: Tensor | None = None  # float32 [n, D]
    text_features: Tensor | None = None  # float32 [m, D]

    @classmethod
    def of(cls, found: data.EvalSet) -> Split:
        first: dict[tuple[int, str], int] = {}
        for i, key in enumerate(zip(found.groups.tolist(), found.captions)):
            first.setdefault(key, i)
        rows = list(first.values())
        return cls(found, [found.captions[i] for i in rows], found.text[rows], found.groups[rows])


def load_splits(splits: Mapping[str, str | list[str]], model: str, image_size: int | None = None) -> dict[str, Split]:
    """Read splits for the model called `model`. image_size: None for the model's default."""
    tokenizer, transform = models.tokenizer(model), models.transforms(model, train=False, image_size=image_size)
    return {name: Split.of(data.load_eval(shards, tokenizer, transform)) for name, shards in splits.items()}


@torch.no_grad()
def encode(model: nn.Module, split: Split, batch_size: int, device: torch.device, precision: str) -> None:
    """Compute the features of a split: normalised, float32, on `device`."""
    with hardware.autocast(precision, device):
        for name, encoder, inputs in (
            ("image_features", model.encode_image, split.data.images),
            ("text_features", model.encode_text, split.tokens),
        ):
            parts = [encoder(part.to(device), normalize=True).float() for part in inputs.split(batch_size)]
            features = torch.cat(parts)
            if not features.isfinite().all():
                raise InputError(f"checkpoint: expected finite features, got {name.replace('_', ' ')} that are not finite")
            setattr(split, name, features)


def retrieval(split: Split) -> dict[str, dict[str, dict[str, float]]]:
    """R@k of an encoded split in both directions: direction -> "R@k" -> {"value", "chance"}, as fractions."""
    x, y = split.image_features, split.text_features
    x_groups, y_groups = split.data.groups, split.caption_groups
    return {"image_to_text": recall(x, y, x_groups, y_groups), "text_to_image": recall(y, x, y_groups, x_groups)}


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
