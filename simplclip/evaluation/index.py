"""Encoded held-out data, and what they answer: R@k, the loss, the pictures of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from simplclip import losses
from simplclip.common import ranks
from simplclip.common.progress import Progress
from simplclip.data.errors import Skipped
from simplclip.data.held_out_loader import HeldOutRow
from simplclip.data.samples import digest_of
from simplclip.data.transforms import finish_on_device
from simplclip.evaluation.results import Retrieval
from simplclip.evaluation.retrieval import recall
from simplclip.evaluation.split import Split, Towers

BATCH_SIZE = 64  # images or captions that are encoded at a time


class Candidates(NamedTuple):
    """The captions that are searched, and the groups of these and of the images."""

    captions: list[str]  # m
    caption_groups: Tensor  # int64 [m]
    groups: Tensor  # int64 [n]


def candidates_of(rows: Sequence[HeldOutRow]) -> Candidates:
    """Returns the captions of n images, and groups by number.

    All images of a group (a concept drawn by several vendors) are right answers for all captions of
    the group, and identical captions of a group are one candidate. An image without a group is one
    of its own, whose captions all count.
    """
    # name of a group, or row of an image without one -> number of the group
    numbers: dict[str | int, int] = {}
    known: set[tuple[int, str]] = set()  # number of a group, and one of its captions
    captions: list[str] = []
    caption_groups: list[int] = []
    groups: list[int] = []
    for row, image in enumerate(rows):
        number = numbers.setdefault(row if image.group is None else image.group, len(numbers))
        texts = image.captions
        if image.group is not None:
            texts = [text for text in dict.fromkeys(texts) if (number, text) not in known]
            known.update((number, text) for text in texts)
        groups.append(number)
        caption_groups += [number] * len(texts)
        captions += texts
    return Candidates(captions, torch.tensor(caption_groups).long(), torch.tensor(groups).long())


@dataclass(frozen=True, eq=False)
class Index:
    """The encoded n images and m captions of a split, as `evaluation.encode` makes it."""

    split: Split
    rows: Sequence[HeldOutRow]  # n
    captions: list[str]  # m
    caption_groups: Tensor  # int64 [m]
    groups: Tensor  # int64 [n]
    image_features: Tensor  # float32 [n, D], L2-normalised
    text_features: Tensor  # float32 [m, D]
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Returns a digest of the images, captions and groups, which tells other samples apart."""
        return digest_of([[row.checksum, row.captions, row.group] for row in self.rows])

    def captioned(self) -> Tensor:
        """Returns whether each image's group has a caption, boolean [n]."""
        return torch.isin(self.groups, self.caption_groups)

    def retrieval(self, device: torch.device | str = "cpu") -> Retrieval | None:
        """Returns R@k in both directions; None without captions.

        R@k is defined as for COCO and Flickr30k: an image is right if any of its captions is among
        the first k; each caption is a query. An image without a caption is a candidate, but no
        query. device: where similarities are computed; the features stay where they are.
        """
        if not self.captions:
            return None
        x, y = self.image_features, self.text_features
        groups, caption_groups = self.groups, self.caption_groups
        captioned = self.captioned()
        return Retrieval(
            image_to_text=recall(x[captioned], y, groups[captioned], caption_groups, device),
            text_to_image=recall(y, x, caption_groups, groups, device),
        )

    def loss(
        self, batch_size: int, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> float | None:
        """Returns the mean contrastive loss; None without captions.

        It is the mean over batches of `batch_size` pairs, an image and the first caption of its
        group, in a fixed random order. The pairs that fill no batch are left out; if there are
        fewer pairs than `batch_size` they are one batch, whose loss is lower. Pairs of a group are
        no negatives. logit_scale: factor [] of the similarities, not its logarithm. logit_bias:
        bias [] of the sigmoid loss; None for the softmax loss.
        """
        if not self.captions:
            return None
        captions: dict[int, int] = {}  # of each group, the first
        for row, group in enumerate(self.caption_groups.tolist()):
            captions.setdefault(group, row)
        rows = []
        for row, group in enumerate(self.groups.tolist()):
            if group in captions:
                rows.append((row, captions[group]))
        pairs = torch.tensor(rows)
        size = min(batch_size, len(pairs))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        loss: Any = losses.ClipLoss()
        bias = {}
        if logit_bias is not None:
            loss = losses.SigLipLoss()
            bias = {"logit_bias": logit_bias}
        values = []
        for batch in order[: len(pairs) // size * size].split(size):
            images, texts = pairs[batch].unbind(1)
            features = self.image_features[images], self.text_features[texts]
            values.append(loss(*features, logit_scale, ids=self.groups[images], **bias))
        return torch.stack(values).mean().item()

    def pictures(self, rows: Sequence[int]) -> dict[int, Image.Image]:
        """Returns the RGB images of these rows, by row, as `Split.pictures`."""
        positions = {row: self.rows[row].position for row in rows}
        images = self.split.pictures(positions.values())
        return {row: images[position] for row, position in positions.items()}

    def report(self) -> str:
        """Returns one line: the number of samples read, and the number skipped by reason."""
        return f"{len(self)} samples read, {self.skipped}"


def encode(
    towers: Towers,
    split: Split,
    batch_size: int = BATCH_SIZE,
    *,
    workers: int = 0,
    progress: str | None = None,
) -> Index:
    """Returns the index of a split; its features are on the CPU.

    They take 4 D bytes for each image and caption; images are not kept. All ranks have to call it:
    they divide the images and captions. The first rank gets the index, others an empty one.

    workers: processes that decode images; 0: this one. progress: title of the progress that is
    shown; None: nothing is shown.

    Raises: InputError if features are not finite, EmptyDataError if no sample is usable; the errors
    of `data.HeldOut.batches`.
    """

    def encoded_batches() -> Iterator[tuple[Tensor, list[HeldOutRow], Skipped]]:
        for batch in split.data.batches(
            split.transform, batch_size, workers, rank=ranks.number(), world_size=ranks.count()
        ):
            features = torch.empty(0)
            if batch.rows:
                pixels = finish_on_device(split.transform, batch.images, towers.device)
                features = towers.features("image", pixels).cpu()
            yield features, batch.rows, batch.skipped

    def text_features(start: int) -> Tensor:
        tokens = split.tokenizer(candidates.captions[start : start + batch_size])
        return towers.features("text", tokens).cpu()

    rows: list[HeldOutRow] = []
    images: list[Tensor] = []
    skipped = Skipped()
    with Progress(progress or "", unit="images", shown=progress is not None) as bar:
        for features, new_rows, new_skipped in ranks.gather_to_first(encoded_batches()):
            skipped.merge(new_skipped)
            rows += new_rows
            if new_rows:
                images.append(features)
            bar.update(len(new_rows))

    def candidates_of_all() -> Candidates:
        if not rows:
            raise split.data.nothing_usable(skipped)
        return candidates_of(rows)

    candidates = ranks.on_first(candidates_of_all)
    starts = range(0, len(candidates.captions), batch_size)
    texts = list(ranks.map_to_first(text_features, starts))
    return Index(split, rows, *candidates, _joined(images), _joined(texts), skipped)


def _joined(features: list[Tensor]) -> Tensor:
    """Returns the features of several batches as one tensor [N, D]; [0, 0] of none."""
    return torch.cat(features) if features else torch.empty(0, 0)
