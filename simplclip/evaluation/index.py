"""Encoded held-out data, and what they answer: the nearest candidates, R@k, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simplclip import losses
from simplclip.common import ranks
from simplclip.common.progress import Progress
from simplclip.data import HeldOut
from simplclip.data.errors import Skipped
from simplclip.data.held_out_loader import HeldOutBatch, HeldOutRow
from simplclip.data.samples import digest_of
from simplclip.data.transforms import finish_on_device
from simplclip.evaluation.encoder import Encoder
from simplclip.evaluation.results import KS, Recall

BATCH_SIZE = 64  # images or captions that are encoded at a time
TILE_BYTES = 64 * 2**20  # of a tile of similarities
TILE_COLUMNS = 16384


def nearest(
    queries: Tensor, candidates: Tensor, k: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the k most similar candidates of each query, for a part of the queries at a time.

    queries: [n, D], candidates: [m, D], compared by their dot products.
    A part of q queries is the number of its first query, the similarities [q, k] and the rows [q,
    k] of the candidates, the most similar first (min(k, m) of them), both on `device`. The
    similarities are computed there in tiles of at most 64 MiB.
    """
    width = min(len(candidates), TILE_COLUMNS)
    height = max(1, TILE_BYTES // (4 * width))
    for start in range(0, len(queries), height):
        part = queries[start : start + height].to(device)
        similarities = part.new_empty(len(part), 0)
        rows = similarities.long()
        for first in range(0, len(candidates), width):
            tile = part @ candidates[first : first + width].to(device).T
            values, columns = tile.topk(min(k, tile.shape[1]))
            similarities = torch.cat([similarities, values], 1)
            rows = torch.cat([rows, columns + first], 1)
            similarities, order = similarities.topk(min(k, similarities.shape[1]))
            rows = rows.gather(1, order)
        yield start, similarities, rows


def recall(
    queries: Tensor,
    candidates: Tensor,
    query_groups: Tensor,
    candidate_groups: Tensor,
    device: torch.device | str = "cpu",
) -> Recall:
    """Returns, for each k of KS, the share of queries with a right answer among the k nearest.

    A candidate is right if it is of the query's group.
    queries: [n, D], candidates: [m, D], groups: int64 [n] and [m], from 0, on the CPU.
    device: where similarities are computed.
    With as many groups as pairs this is the usual R@k. Its chance is the share if candidates are
    ranked at random: 1 - C(m-r, k)/C(m, k), with binomial coefficients C, for r right candidates of
    m, averaged over the queries. Extra memory: a tile of similarities, 64 MiB; never [n, m].
    """
    m = len(candidates)
    hits = torch.zeros(len(KS), dtype=torch.int64)
    for start, _, rows in nearest(queries, candidates, max(KS), device):
        right = candidate_groups[rows.cpu()] == query_groups[start : start + len(rows), None]
        hits += torch.stack([right[:, :k].any(1).sum() for k in KS])
    sizes = candidate_groups.bincount(minlength=int(query_groups.max()) + 1)
    right_answers = sizes[query_groups].double()
    figures: Recall = {}
    for k, count in zip(KS, hits.tolist()):
        tries = torch.arange(min(k, m))
        miss = ((m - right_answers[:, None] - tries).clamp(min=0) / (m - tries)).prod(1)
        chance = (1 - miss).mean().item()
        figures[f"R@{k}"] = {"value": count / len(queries), "chance": chance}
    return figures


def candidates_of(rows: Sequence[HeldOutRow]) -> tuple[list[str], Tensor, Tensor]:
    """Returns the m captions of n images, and the numbers of their groups, int64 [m] and [n].

    All images of a group (a concept drawn by several vendors) are right answers for all captions of
    the group, and identical captions of a group are one candidate. An image without a group is one
    of its own, whose captions all count.
    """
    # name of a group, or row of an image without one -> number of the group
    numbers: dict[str | int, int] = {}
    groups: list[int] = []
    # (number of a group, caption, its place if it has no equals): those that count, in order
    counted: dict[tuple[int, str, int], None] = {}
    for row, image in enumerate(rows):
        number = numbers.setdefault(row if image.group is None else image.group, len(numbers))
        groups.append(number)
        for place, text in enumerate(image.captions):
            counted[number, text, place if image.group is None else 0] = None
    captions = [text for _, text, _ in counted]
    caption_groups = torch.tensor([number for number, _, _ in counted])
    return captions, caption_groups.long(), torch.tensor(groups).long()


@dataclass(frozen=True, eq=False)
class Index:
    """The encoded n images and m captions of held-out data, as `evaluation.encode` makes it."""

    data: HeldOut
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

    def retrieval(self, device: torch.device | str = "cpu") -> dict[str, Recall]:
        """Returns R@k by direction, "image_to_text" and "text_to_image"; {} without captions.

        R@k is defined as for COCO and Flickr30k: an image is right if any of its captions is among
        the first k; each caption is a query. An image without a caption is a candidate, but no
        query. device: where similarities are computed; the features stay where they are.
        """
        if not self.captions:
            return {}
        x, y = self.image_features, self.text_features
        groups, caption_groups = self.groups, self.caption_groups
        captioned = self.captioned()
        return {
            "image_to_text": recall(x[captioned], y, groups[captioned], caption_groups, device),
            "text_to_image": recall(y, x, caption_groups, groups, device),
        }

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
        images = self.captioned().nonzero()[:, 0]
        # the first caption of each image's group
        ordered, order = self.caption_groups.sort(stable=True)
        pairs = torch.stack([images, order[torch.searchsorted(ordered, self.groups[images])]], 1)
        size = min(batch_size, len(pairs))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
        loss: Any = losses.ClipLoss()
        if logit_bias is not None:
            loss = partial(losses.SigLipLoss(), logit_bias=logit_bias)
        values = []
        for batch in order[: len(pairs) // size * size].split(size):
            images, texts = pairs[batch].unbind(1)
            features = self.image_features[images], self.text_features[texts]
            values.append(loss(*features, logit_scale, ids=self.groups[images]))
        return torch.stack(values).mean().item()

    def report(self) -> str:
        """Returns one line: the number of samples read, and the number skipped by reason."""
        return f"{len(self)} samples read, {self.skipped}"


def encode(
    encoder: Encoder,
    data: HeldOut,
    batch_size: int = BATCH_SIZE,
    *,
    workers: int = 0,
    progress: str | None = None,
) -> Index:
    """Returns the index of held-out data; its features are on the CPU.

    They take 4 D bytes for each image and caption; images are not kept. All ranks have to call it:
    they divide the images and captions. The first rank gets the index, others an empty one.

    workers: processes that decode images; 0: this one. progress: title of the progress that is
    shown; None: nothing is shown.

    Raises: InputError if features are not finite, EmptyDataError if no sample is usable; the errors
    of `data.HeldOut.batches`.
    """

    def image_features(batch: HeldOutBatch) -> HeldOutBatch:
        if not batch.rows:
            return batch
        pixels = finish_on_device(encoder.preprocess, batch.images, encoder.device)
        return batch._replace(images=encoder.features("image", pixels).cpu())

    def text_features(start: int) -> Tensor:
        tokens = encoder.tokenizer(captions[start : start + batch_size])
        return encoder.features("text", tokens).cpu()

    part = {"rank": ranks.number(), "world_size": ranks.count()}
    batches = data.batches(encoder.preprocess, batch_size, workers, **part)
    rows: list[HeldOutRow] = []
    # ranks but the first get none
    images, texts, skipped = [torch.empty(0)], [torch.empty(0)], Skipped()
    with Progress(progress or "", unit="images", shown=progress is not None) as bar:
        for batch in ranks.gather_to_first(map(image_features, batches)):
            skipped.merge(batch.skipped)
            rows += batch.rows
            images.append(batch.images)
            bar.update(len(batch.rows))
    if ranks.first() and not rows:
        raise data.nothing_usable(skipped)
    captions, caption_groups, groups = ranks.on_first(candidates_of, rows)
    starts = range(0, len(captions), batch_size)[ranks.number() :: ranks.count()]
    texts += ranks.gather_to_first(map(text_features, starts))
    features = torch.cat(images), torch.cat(texts)
    return Index(data, rows, captions, caption_groups, groups, *features, skipped)
