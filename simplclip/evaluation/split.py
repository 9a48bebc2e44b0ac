"""Held-out splits.

`encode` fills a split with features, captions, groups and labels; images are not kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from simplclip.common import hardware, ranks
from simplclip.common.errors import InputError, UserError
from simplclip.common.progress import Progress
from simplclip.data import HeldOut, held_out
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.transforms import ImageTransform, finish_on_device, to_tensor

BATCH_SIZE = 64  # images or captions that are encoded at a time
LEAST_SAMPLES = 2  # of a run's held-out data: of one, R@1 is 100 % with any weights


class Split:
    """A held-out split, read by `encode`.

    It has n images and m captions. An image has any number of captions. All images of a group (a
    concept drawn by several vendors) are right answers for all captions of the group, and identical
    captions of a group are one candidate.
    """

    def __init__(
        self, data: HeldOut, tokenizer: Callable[[list[str]], Tensor], transform: Any
    ) -> None:
        """Makes an empty split; nothing is read yet.

        tokenizer: texts -> int64 [N, L]. transform: the model's image transform, an ImageTransform
        or a function of an RGB image -> float32 [3, S, S].
        """
        self.data = data
        self.tokenizer = tokenizer
        self.transform = transform
        self.clear()

    def clear(self) -> None:
        """Forgets what was read and encoded: samples, groups, features, counts of skipped ones."""
        self.keys: list[str] = []  # n
        self.captions: list[str] = []  # m
        self.labels: list[str | int | None] = []  # n
        self.groups = torch.empty(0, dtype=torch.int64)  # [n]
        self.caption_groups = torch.empty(0, dtype=torch.int64)  # [m]
        self.image_features: Tensor | None = None  # float32 [n, D], L2-normalised
        self.text_features: Tensor | None = None  # float32 [m, D]
        self.skipped = Skipped()
        self._positions: list[int] = []  # n, numbers of the images in the data

    def read(
        self, batch_size: int, workers: int = 0, use: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yields the images in batches, and collects their keys, captions, labels and groups.

        What the split had is cleared first. The images are uint8 or float32 [N, 3, S, S], N <=
        batch_size, and are not kept. `groups` and `caption_groups` are set after the last batch.
        workers: processes that decode images; 0: this one.
        use: as in `data.HeldOut.batches`; its results, e.g. features, are then yielded in place of
        the images, on the first rank, while the ranks divide the batches.
        """
        self.clear()
        # name of a group, or row of an image without one -> number of the group
        numbers: dict[str | int, int] = {}
        known: set[tuple[int, str]] = set()  # number of a group, and one of its captions
        groups: list[int] = []
        caption_groups: list[int] = []
        batches = self.data.batches(self.transform, batch_size, self.skipped, workers, use)
        for images, positions, samples in batches:
            for sample in samples:
                captions = sample.captions
                if sample.group is None:
                    number = numbers.setdefault(len(self.keys), len(numbers))
                else:
                    number = numbers.setdefault(sample.group, len(numbers))
                    captions = [text for text in captions if (number, text) not in known]
                    captions = list(dict.fromkeys(captions))
                    known.update((number, text) for text in captions)
                groups.append(number)
                caption_groups += [number] * len(captions)
                self.captions += captions
                self.keys.append(sample.key)
                self.labels.append(sample.label)
            self._positions += positions
            yield images
        self.groups = torch.tensor(groups, dtype=torch.int64)
        self.caption_groups = torch.tensor(caption_groups, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def captioned(self) -> Tensor:
        """Returns whether each image's group has a caption, boolean [n]."""
        return torch.isin(self.groups, self.caption_groups)

    def pictures(self, rows: list[int]) -> dict[int, Image.Image]:
        """Returns the RGB images of these rows, by row, cropped as the model sees them.

        The data are read again, up to the last of the rows.
        """
        images = self.data.pictures([self._positions[row] for row in rows])
        return {row: cropped(self.transform, images[self._positions[row]]) for row in rows}

    def report(self) -> str:
        """Returns one line: the number of samples read, and the number skipped by reason."""
        return f"{len(self)} samples read, {self.skipped}"


def cropped(transform: Any, image: Image.Image) -> Image.Image:
    """Returns the part of an image that a model sees, as a PIL image to look at.

    transform: the model's. Of an ImageTransform the picture has the smallest multiple of the
    model's size with at least 160 pixels a side; of others, and of a very long image, it has the
    model's size. A transform without steps leaves the image whole.
    """
    if isinstance(transform, ImageTransform):
        larger = copy.copy(transform)
        factor = max(1, -(-160 // min(transform.size)))
        larger.size = (factor * transform.size[0], factor * transform.size[1])
        try:
            pixels = larger.apply_decoded(to_tensor(image), {})
        except BrokenSample:  # before it is cropped, the image would have too many pixels
            pixels = transform.apply_decoded(to_tensor(image), {})
        return to_pil_image(pixels)
    # the steps of a transform of open_clip, up to the conversion to a tensor
    for step in getattr(transform, "transforms", ()):
        changed = step(image)
        if not isinstance(changed, Image.Image):
            break
        image = changed
    return image


def load_splits(splits: Mapping[str, Any], tokenizer: Any, transform: Any) -> dict[str, Split]:
    """Returns the eval.splits of a run whose model has this tokenizer and image transform.

    splits: name -> data as `data.held_out` takes them. The result has the same names; its splits
    are not encoded yet. The first samples of each are read as a check.
    Raises InputError, which names the split's key, for data that `data.held_out` rejects or that
    have less than LEAST_SAMPLES usable samples.
    """
    loaded = {
        name: Split(held_out(source, name=f"eval.splits.{name}"), tokenizer, transform)
        for name, source in splits.items()
    }
    for name, split in loaded.items():
        skipped = Skipped()
        try:
            batches = split.data.batches(transform, 1, skipped)
            samples = sum(1 for _ in islice(batches, LEAST_SAMPLES))
        except UserError as error:
            raise InputError(f"eval.splits.{name}: {error}") from None
        if samples < LEAST_SAMPLES:
            raise InputError(
                f"eval.splits.{name}: expected at least {LEAST_SAMPLES} usable samples, got "
                f"{samples}; {skipped}"
            )
    return loaded


@dataclass(frozen=True)
class Towers:
    """The towers of a model, which encode images and texts on a device in a precision."""

    model: nn.Module
    device: torch.device
    precision: str  # "fp32", "bf16" or "fp16"
    source: str = "checkpoint"  # of the model, for errors

    @torch.no_grad()
    def features(self, tower: str, inputs: Tensor) -> Tensor:
        """Returns features float32 [N, D], L2-normalised, of inputs of one tower.

        tower: "image", for images [N, 3, S, S], or "text", for token ids [N, L]; they are moved to
        the device.
        Raises InputError, which names the source, if a feature is not finite.
        """
        encode: Any = self.model.encode_image if tower == "image" else self.model.encode_text
        with hardware.autocast(self.precision, self.device):
            features = encode(inputs.to(self.device, non_blocking=True), normalize=True).float()
        if not features.isfinite().all():
            raise InputError(
                f"{self.source}: expected finite features, got {tower} features that are not "
                f"finite in {self.precision}"
            )
        return nn.functional.normalize(features, dim=-1)


def encode(
    towers: Towers,
    split: Split,
    batch_size: int = BATCH_SIZE,
    *,
    workers: int = 0,
    progress: str | None = None,
) -> None:
    """Reads a split and stores its features in it, on the CPU, in place of what it had.

    The features take 4 D bytes for each image and caption. All ranks have to call it: they divide
    the images and captions. The first rank gets all features, other ranks none.

    workers: processes that decode images; 0: this one. progress: title of the progress that is
    shown; None: nothing is shown. Raises: InputError if features are not finite; the errors of
    `data.HeldOut.batches`.
    """

    def image_features(batch: Tensor) -> Tensor:
        pixels = finish_on_device(split.transform, batch, towers.device)
        return towers.features("image", pixels).cpu()

    def text_features(start: int) -> Tensor:
        tokens = split.tokenizer(captions[start : start + batch_size])
        return towers.features("text", tokens).cpu()

    images = []
    with Progress(progress or "", unit="images", shown=progress is not None) as bar:
        for features in split.read(batch_size, workers, image_features):
            images.append(features)
            bar.update(len(features))
    captions = ranks.on_first(lambda: split.captions)
    texts = list(ranks.map_to_first(text_features, range(0, len(captions), batch_size)))
    if images:
        split.image_features = torch.cat(images)
    if texts:
        split.text_features = torch.cat(texts)
