"""What a worker does in an epoch: it orders samples by seed, draws captions, augments images and makes batches."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset import filters

from simplclip.data.shards import Opened, Sample, ShardError, Skipped, open_sample, read_shard, stable_hash, usable

_NUMPY_GENERATOR = np.random.MT19937(0)

Batch = dict[str, Any]
Item = tuple[Batch | None, int, bool, Skipped]  # the batch, or None if it is skipped; its size; whether it is the last


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seeds the global generators that transforms use by `parts`, and restores them afterwards."""
    seed = stable_hash("/".join(map(str, parts)))
    states = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator()
    # torch.manual_seed would also seed the GPU's generators.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.set_bit_generator(_NUMPY_GENERATOR)  # 30 times cheaper than saving and restoring the state
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_bit_generator(states[2])


def apply_transform(transform: Callable, sample: Opened) -> torch.Tensor:
    try:
        return transform(sample.image)
    except Exception as error:
        place = f"{sample.files['__key__']!r} of shard {sample.files['__url__']!r}"
        raise RuntimeError(f"the transform failed on sample {place}: {type(error).__name__}: {error}") from error


@dataclass
class Epoch(IterableDataset):
    """Yields what one worker reads in one epoch."""

    shards: list[str]
    tokenizer: Callable
    transform: Callable
    batch_size: int
    captions: int
    shuffle: bool
    shuffle_buffer: int
    seed: int
    teacher: bool
    epoch: int = 0
    skip_batches: int = 0

    def __iter__(self) -> Iterator[Item | tuple[ShardError]]:
        worker = get_worker_info()
        try:
            yield from self._items(*((worker.id, worker.num_workers) if worker else (0, 1)))
        except ShardError as error:
            yield (error,)  # raised in the main process, without the worker's traceback

    def _items(self, worker: int, workers: int) -> Iterator[Item]:
        skipped = Skipped()
        samples = self._samples(worker, workers, skipped)
        if self.shuffle:
            rng = random.Random(f"{self.seed}/{self.epoch}/{worker}/{workers}")
            samples = filters.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)
        pending: list[Any] = []
        # The batch's position in the epoch if all workers have batches until then; otherwise it is earlier, never later.
        index = worker
        for sample in usable(samples, skipped, self.teacher):
            skip = index < self.skip_batches
            pending.append(sample.files if skip else self._prepare(sample))
            if len(pending) == self.batch_size:
                yield None if skip else self._collate(pending), len(pending), False, skipped.take()
                pending = []
                index += workers
        if index < self.skip_batches:
            pending = [self._prepare(open_sample(files, self.teacher)) for files in pending]
        yield self._collate(pending) if pending else None, len(pending), True, skipped.take()

    def _samples(self, worker: int, workers: int, skipped: Skipped) -> Iterator[Sample]:
        shards = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(shards)
        if len(shards) >= workers:
            return (sample for shard in shards[worker::workers] for sample in read_shard(shard, skipped))
        # With fewer shards than workers, each worker reads all shards and takes its share of the samples.
        counted = skipped if worker == 0 else Skipped()
        return islice((sample for shard in shards for sample in read_shard(shard, counted)), worker, None, workers)

    def _prepare(self, sample: Opened) -> tuple:
        with seeded(self.seed, self.epoch, sample.place):
            drawn = _draw(len(sample.captions), self.captions)
            tensor = apply_transform(self.transform, sample)
        texts = [sample.captions[i] for i in drawn]
        features = torch.from_numpy(sample.features[[0, *(1 + i for i in drawn)]]) if self.teacher else None
        return tensor, texts, sample.group, sample.files["__key__"], sample.record, features

    def _collate(self, prepared: list[tuple]) -> Batch:
        images, texts, groups, keys, records, features = zip(*prepared)
        one = self.captions == 1
        tokens = self.tokenizer([text for several in texts for text in several])
        batch = {
            "image": torch.stack(images),
            "text": tokens if one else tokens.unflatten(0, (-1, self.captions)),
            "group": torch.tensor(groups, dtype=torch.int64),
            "key": list(keys),
            "meta": list(records),
        }
        if self.teacher:
            stacked = torch.stack(features)
            batch |= {"teacher_image": stacked[:, 0], "teacher_text": stacked[:, 1] if one else stacked[:, 1:]}
        return batch


def _draw(count: int, wanted: int) -> list[int]:
    """Draws `wanted` of `count` captions at random, different ones if there are enough."""
    drawn: list[int] = []
    while len(drawn) < wanted:
        drawn += random.sample(range(count), min(count, wanted - len(drawn)))
    return drawn
