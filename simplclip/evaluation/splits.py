"""Held-out splits in memory, and their features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simplclip import data, models
from simplclip.common import hardware
from simplclip.common.errors import InputError


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
