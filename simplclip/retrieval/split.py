"""Held-out splits. `encode` fills a split with features, captions, groups and labels; images are not kept."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, UserError
from simplclip.common.files import write_atomically
from simplclip.common.progress import Progress
from simplclip.data import HeldOut, held_out
from simplclip.data.errors import Skipped
from simplclip.data.samples import Pair
from simplclip.data.transforms import finished
from simplclip.retrieval.features import Features

BATCH_SIZE = 64  # images or captions that are encoded at a time


class Split:
    """A held-out split, read by `encode`.

    It has n images and m captions. An image has any number of captions. All images of a group (a concept drawn by several
    vendors) are right answers for all captions of the group, and identical captions of a group are one candidate.
    """

    def __init__(self, data: HeldOut, tokenizer: Callable[[list[str]], Tensor], transform: Any) -> None:
        self.data, self.tokenizer, self.transform = data, tokenizer, transform
        self.clear()

    def read(self, batch_size: int, workers: int = 0, use: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """Yields the images in batches, uint8 or float32 [N, 3, S, S], and collects their keys, captions, labels and groups.

        use: as in `data.HeldOut.batches`; its results are then yielded in place of the images.
        """
        self.clear()
        for images, positions, samples in self.data.batches(self.transform, batch_size, self.skipped, workers, use):
            for position, sample in zip(positions, samples):
                self._add(position, sample)
            yield images
        self._seen.clear()

    def clear(self) -> None:
        self.keys: list[str] = []  # n
        self.captions: list[str] = []  # m
        self.labels: list[str | int | None] = []  # n
        self.skipped = Skipped()
        self.image_features: Tensor | Features | None = None  # float32 [n, D], L2-normalised
        self.text_features: Tensor | Features | None = None  # float32 [m, D]
        self._positions, self._groups, self._caption_groups = array("q"), array("q"), array("q")
        self._numbers: dict[str, int] = {}  # name of a group -> its number
        self._seen: set[tuple[int, str]] = set()
        self._count = 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def groups(self) -> Tensor:
        """int64 [n]"""
        return torch.tensor(self._groups, dtype=torch.int64)

    @property
    def caption_groups(self) -> Tensor:
        """int64 [m]"""
        return torch.tensor(self._caption_groups, dtype=torch.int64)

    def _add(self, position: int, sample: Pair) -> None:
        number = self._count if sample.group is None else self._numbers.setdefault(sample.group, self._count)
        self._count += number == self._count
        self.keys.append(sample.key)
        self.labels.append(sample.label)
        self._positions.append(position)
        self._groups.append(number)
        for caption in sample.captions:
            if sample.group is not None:
                if (number, caption) in self._seen:
                    continue
                self._seen.add((number, caption))
            self.captions.append(caption)
            self._caption_groups.append(number)

    def pictures(self, rows: list[int]) -> dict[int, Image.Image]:
        """Reads the images of these rows again, as they are stored, RGB; no other image is read."""
        found = self.data.pictures([self._positions[row] for row in rows])
        return {row: found[self._positions[row]] for row in rows}

    def report(self) -> str:
        """Returns one line: the number of samples read, and the number skipped by reason."""
        return f"{len(self)} samples read, {self.skipped}"


def load_splits(splits: Mapping[str, Any], tokenizer: Any, transform: Any) -> dict[str, Split]:
    """Returns the eval.splits of a run whose model has this tokenizer and image transform.

    Raises InputError, which names the split's key, for data that `data.held_out` rejects or that have no usable sample.
    """
    found = {name: Split(held_out(what, name=f"eval.splits.{name}"), tokenizer, transform) for name, what in splits.items()}
    for name, split in found.items():
        try:
            next(split.data.batches(transform, 1, Skipped()))
        except UserError as error:
            raise InputError(f"eval.splits.{name}: {error}") from None
    return found


@torch.no_grad()
def features_of(model: nn.Module, tower: str, inputs: Tensor, device: torch.device, precision: str, who: str) -> Tensor:
    """Returns features float32 [N, D], L2-normalised, of images [N, 3, S, S] (tower "image") or token ids [N, L] ("text").

    Raises InputError, which names `who`, if a feature is not finite.
    """
    encode: Any = model.encode_image if tower == "image" else model.encode_text
    with hardware.autocast(precision, device):
        found = encode(inputs.to(device, non_blocking=True), normalize=True).float()
    if not found.isfinite().all():
        raise InputError(f"{who}: expected finite features, got {tower} features that are not finite in {precision}")
    return nn.functional.normalize(found, dim=-1)


def encode(
    model: nn.Module,
    split: Split,
    batch_size: int,
    device: torch.device,
    precision: str,
    *,
    workers: int = 0,
    folder: str | Path | None = None,
    keep: Path | None = None,
    progress: str | None = None,
    who: str = "checkpoint",
) -> None:
    """Reads a split and computes its features into a file, as float32 if `precision` is fp32, else as float16.

    Ranks divide the images and captions. The first rank gets all of them; on other ranks `split` stays empty.

    workers: processes that decode images. folder: folder of the file, by default the system's folder for temporary files.
    keep: KEEP.image.npy and KEEP.text.npy keep the features, KEEP.json the keys, captions and groups of their rows.
    progress: title of the progress that is shown. who: name of the model in errors.
    Raises: InputError if features are not finite; the errors of `data.HeldOut.batches`.
    """
    half = precision != "fp32"
    keep = keep if ranks.first() else None
    files = [keep and keep.with_name(f"{keep.name}.{tower}.npy") for tower in ("image", "text")]
    images, texts = (Features(file, folder, half) for file in files)

    def of_images(batch: Tensor) -> Tensor:
        return features_of(model, "image", finished(split.transform, batch, device), device, precision, who).cpu()

    def of_texts(start: int) -> Tensor:
        tokens = split.tokenizer(captions[start : start + batch_size])
        return features_of(model, "text", tokens, device, precision, who).cpu()

    with Progress(progress or "", unit="images", shown=progress is not None) as bar:
        for features in split.read(batch_size, workers, of_images):
            images.append(features)
            bar.update(len(features))
    captions = ranks.on_first(lambda: split.captions)
    for features in ranks.mapped(of_texts, range(0, len(captions), batch_size)):
        texts.append(features)
    split.image_features, split.text_features = images.finish(), texts.finish()
    if keep:
        about = {"keys": split.keys, "captions": split.captions, "caption_groups": split.caption_groups.tolist()}
        write_atomically(keep.with_name(f"{keep.name}.json"), json.dumps(about | {"groups": split.groups.tolist()}))
