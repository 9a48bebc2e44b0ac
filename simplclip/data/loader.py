"""Image-text pairs from WebDataset shards, for training: `make_loader`. heldout.py reads held-out data.

Two fields of a sample's json are used: "group" (samples of one group show the same thing and are not each other's
negatives) and "label" (the class, for zero-shot classification). simplclip/data/shards.py defines shards and samples.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from simplclip.common.errors import InputError, UserError
from simplclip.data.broken import Skipped
from simplclip.data.epoch import Batch, Epoch, Position, Share, WorkerItem
from simplclip.data.pairs import check_sidecars, epoch_size, parts_of
from simplclip.data.parts import in_words
from simplclip.data.shards import check_count
from simplclip.data.sidecars import Folders
from simplclip.data.tar import MAX_BYTES
from simplclip.data.transforms import ImageTransform
from simplclip.data.workers import WorkerError, from_workers

RESTARTS = 3  # most restarts of loader processes in an epoch


class EmptyEpochError(UserError, RuntimeError):
    """An epoch has no batch; the message says why."""


class Loader:
    """Loader of training batches, made by `make_loader`, which documents it.

    parts: the parts of the shards, by `parts_of`. restarts: why loader processes were started again, one line for each time.
    """

    def __init__(self, dataset: Epoch, drop_last: bool, workers: int, pin_memory: bool) -> None:
        self._dataset, self.parts, self._drop_last = dataset, dataset.parts, drop_last
        self._workers, self._pin_memory = workers, pin_memory
        self.restarts: list[str] = []
        self._start(0)

    def _start(self, epoch: int) -> None:
        self._epoch = epoch
        self._skipped = Skipped()
        self._used = self._left_over = self._batches_done = 0
        self._positions = [Position() for _ in range(max(1, self._workers))]

    @property
    def skipped(self) -> dict[str, int]:
        """Numbers of broken samples by reason, in the current or last epoch, up to the last batch."""
        return dict(self._skipped.counts)

    def report(self) -> str:
        """Returns a line on the current or last epoch: samples used, and samples skipped by reason with the first of each.

        The line does not contain the epoch's number, so that equal epochs have equal reports.
        """
        left = f", {self._left_over} left over (drop_last)" if self._left_over else ""
        return f"{self._used} samples used{left}, {self._skipped}"

    @cached_property
    def samples_per_epoch(self) -> int | None:
        """Samples of an epoch if none is broken; None if the shards are streams, or too large to count."""
        return epoch_size(self.parts)

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch if no sample is broken; None as for `samples_per_epoch`."""
        samples, size = self.samples_per_epoch, self._dataset.batch_size
        if samples is None:
            return None
        return samples // size if self._drop_last else -(-samples // size)

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch, for `epoch`: plain values and tensors. O(broken samples)."""
        workers = [{"items": at.items, "lost": torch.tensor(sorted(at.lost), dtype=torch.int64)} for at in self._positions]
        skipped = {"counts": dict(self._skipped.counts), "examples": dict(self._skipped.examples)}
        about = {"epoch": self._epoch, "batches": self._batches_done, "batch_size": self._dataset.batch_size}
        return about | {"skipped": skipped, "workers": workers}

    def epoch(self, epoch: int, skip_batches: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[Batch]:
        """Yields the batches of an epoch without the first `skip_batches`.

        state: what `state` returned after these batches. With it they are skipped without being decoded. A state of another
            position, batch size or number of workers is ignored.
        """
        check_count("epoch", epoch, 0)
        check_count("skip_batches", skip_batches, 0)
        return self._restarted(epoch, skip_batches, state)

    def _restarted(self, epoch: int, skip_batches: int, state: Mapping[str, Any] | None) -> Iterator[Batch]:
        """Yields the batches. If a loader process dies, loading restarts after the last batch, at most RESTARTS times."""
        for left in reversed(range(RESTARTS + 1)):
            try:
                yield from self._batches(epoch, skip_batches, state)
                return
            except WorkerError as error:
                if not left:
                    raise
                if self._batches_done >= skip_batches:
                    skip_batches, state = self._batches_done, self.state()
                self.restarts.append(f"{error} (restarted after batch {skip_batches} of epoch {epoch})")

    def _batches(self, epoch: int, skip_batches: int, state: Mapping[str, Any] | None) -> Iterator[Batch]:
        self._start(epoch)
        here = (epoch, skip_batches, self._dataset.batch_size)
        there = state and tuple(state[name] for name in ("epoch", "batches", "batch_size"))
        known = None
        if here == there and len(state["workers"]) == len(self._positions):
            self._skipped = Skipped(Counter(state["skipped"]["counts"]), dict(state["skipped"]["examples"]))
            known = [Position(at["items"], set(at["lost"].tolist())) for at in state["workers"]]
            self._positions = [Position(0, set(at.lost)) for at in known]  # skipped items are counted again
        dataset = replace(self._dataset, epoch=epoch, positions=known)
        for batch, size in self._whole_batches(dataset):
            self._batches_done += 1
            self._used += size
            if self._batches_done > skip_batches:
                yield batch
        number = self._batches_done
        if number == 0:
            need = f"batch_size {dataset.batch_size} with drop_last" if self._drop_last else "a batch"
            raise EmptyEpochError(
                f"epoch {epoch} of {in_words(dataset.parts)} has no batch: {self._left_over} usable samples do not fill "
                f"{need}; {self._skipped}"
            )
        if number < skip_batches and known is None:  # with a state, shards may have vanished since
            raise InputError(f"skip_batches: expected at most {number}, the batches of epoch {epoch}, got {skip_batches}")

    def _whole_batches(self, dataset: Epoch) -> Iterator[tuple[Batch | None, int]]:
        """Yields the full batches of the workers, then batches merged from their last, smaller ones; each with its size."""
        ends = []
        item: WorkerItem
        for item in from_workers(dataset, self._workers, self._pin_memory):
            position = self._positions[item.worker]
            position.items += 1
            position.lost.update(item.lost)
            self._skipped.merge(item.skipped)
            if not item.last:
                yield item.batch, item.size
            elif item.batch is not None:
                ends.append(item.batch)
        if ends:
            yield from self._merged(ends, dataset.batch_size)

    def _merged(self, ends: list[Batch], batch_size: int) -> Iterator[tuple[Batch, int]]:
        merged = {
            name: torch.cat([end[name] for end in ends])
            if isinstance(ends[0][name], torch.Tensor)
            else [value for end in ends for value in end[name]]
            for name in ends[0]
        }
        count = len(merged["key"])
        for start in range(0, count, batch_size):
            size = min(batch_size, count - start)
            if size < batch_size and self._drop_last:
                self._left_over = size
                return
            own = self._dataset.share.rows(size) if self._dataset.share else slice(size)
            yield {name: value[start : start + size][own] for name, value in merged.items()}, size


def make_loader(
    shards: Any,
    *,
    tokenizer: Callable[[list[str]], torch.Tensor],
    transform: ImageTransform | Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    workers: int = 0,
    captions_per_image: int = 1,
    teacher: bool = False,
    sidecars: Folders = (),
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = True,
    shuffle_buffer: int = 4096,
    pin_memory: bool = False,
    on_error: str = "skip",
    max_pixels: int | None = None,
    max_bytes: int = MAX_BYTES,
    prefix: tuple[int, ...] | None = None,
    share: Share | None = None,
) -> Loader:
    """Returns a loader of training batches.

    `Loader.epoch(e)` yields dicts: "image" uint8 [N, 3, S, S], and "colour" float32 [N, P] if the transform changes colours
    (`transform.finish` takes both on the device; the images of a caller's own transform are float32 and finished), "text"
    int64 [N, L], "group" int64 [N] (hash of the json's "group", else of shard and key), "key" list[str], "meta" list[dict]
    (the json). With captions_per_image k > 1 "text" is [N, k, L].

    With `teacher` there are also "teacher_image" [N, D̂] and "teacher_text" [N, D̂] or [N, k, D̂], float16 or bfloat16: a
    teacher's features of the images and of the drawn captions. If the teacher saw views of an image, one of these views is
    drawn in place of the transform's own augmentation, and the features are those of the pixels in "image". Otherwise they
    are the features of the image without augmentation.

    Order: shards (of tables and folders, pieces of 512 samples) are shuffled, then samples in a buffer of `shuffle_buffer`
    samples per worker; a buffer that holds all samples of a worker shuffles them fully. Workers divide the shards; if there
    are fewer shards than workers, each worker reads all shards and takes its share of the samples. The order depends on
    (seed, epoch, workers) only. The drawn caption and the augmentation of a sample depend on (seed, epoch, shard's name,
    key): the transform may draw from the global generators of torch (CPU), random and numpy, which are seeded for it and
    restored. `Loader.epoch(e, skip_batches=k)` yields exactly what `epoch(e)` yields after k batches. Given `Loader.state()`
    of that place too, it skips without decoding, 20,000 samples a second or more in each worker, but reads streams again.

    Samples that do not fill a worker's last batch are joined with those of the other workers at the end of the epoch;
    drop_last drops fewer than `batch_size` samples in all, whatever the number of workers.

    Args:
        shards: tars by path, brace expression, glob, URL, pipe:COMMAND or list file; a table; a folder of images; a mapping
            {"shards": one of these or a list, "weight": W}; or a list of these. See `pairs.parts_of`.
        tokenizer: list of captions -> int64 [N, L].
        transform: an ImageTransform; or a function of a PIL image, RGB -> float32 [3, S, S], such as open_clip's, whose
            exceptions are raised, naming the sample.
        batch_size: samples per batch, N.
        captions_per_image: k captions drawn for each sample, different ones if there are enough.
        teacher: read the features that `simplclip teacher` wrote; a sample without features raises ShardError.
        sidecars: folders with further files of the samples, e.g. those of `simplclip teacher`, in the order in which they are
            joined; see `simplclip.data.sidecars`.
        workers: number of loader processes; 0 reads in the calling process.
        shuffle_buffer: number of samples. The buffer holds encoded files of streams and compressed tars, else only places.
        pin_memory: copy batches to page-locked memory, for a GPU.
        on_error: "skip" counts shards that cannot be read after several tries, and samples that cannot be read any more;
            "stop" raises ShardError for both.
        prefix: the shape of an output of an image tower's frozen prefix. The trainer's `data.cache_prefix` stores the outputs
            as prefix.npy in a sidecar, one for each of the teacher's views of the image. In place of "image" the batches have
            "prefix" float16 [N, *prefix], the output for the drawn view, and no image is read.
        share: the rows of each batch that this rank gets, if several ranks read the same data. `batch_size` then counts the
            rows of all ranks, a multiple of their number. Each rank reads all samples and streams, but decodes its own rows.
        max_pixels: an image whose header promises more pixels is skipped before it is decoded; by default Pillow's limit.
        max_bytes: a sample whose files have more bytes together is skipped without being read.

    If a loader process dies, loading restarts after the last batch, at most RESTARTS times in an epoch. The batches stay the
    same, and `Loader.restarts` has the reasons.

    Raises: ValueError if an argument is out of range or shards match no file; ShardError if a shard has no sidecar or has
    changed since its sidecar was made. While iterating: ShardError if a teacher's features are missing, or if a shard cannot
    be read and on_error is "stop"; WorkerError if loader processes died more often (never while the caller uses a batch);
    EmptyEpochError if there is no batch.
    """
    check_count("batch_size", batch_size, 1)
    check_count("captions_per_image", captions_per_image, 1)
    check_count("workers", workers, 0)
    check_count("shuffle_buffer", shuffle_buffer, 1)
    check_count("max_bytes", max_bytes, 1)
    if on_error not in ("skip", "stop"):
        raise InputError(f"on_error: expected skip or stop, got {on_error!r}")
    if max_pixels is not None and isinstance(transform, ImageTransform):
        transform = copy.copy(transform)
        transform.max_pixels = max_pixels
    if share and (batch_size % share.ranks or not drop_last):
        raise InputError(
            f"batch_size: expected a multiple of the {share.ranks} ranks, with drop_last, got {batch_size} and {drop_last}"
        )
    parts = parts_of(shards)
    check_sidecars(parts, sidecars)
    dataset = Epoch(
        parts=parts,
        tokenizer=tokenizer,
        transform=transform,
        batch_size=batch_size,
        captions=captions_per_image,
        shuffle=shuffle,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        teacher=teacher,
        on_error=on_error,
        sidecars=sidecars,
        max_pixels=max_pixels,
        max_bytes=max_bytes,
        prefix=prefix,
        share=share,
    )
    return Loader(dataset, drop_last, workers, pin_memory)
