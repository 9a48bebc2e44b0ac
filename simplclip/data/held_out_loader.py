"""Batches of evaluation: held-out images in stored order, with their captions and labels."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from simplclip.common.errors import InputError
from simplclip.data.errors import BrokenSample, EmptyDataError, Skipped
from simplclip.data.pack import files_of
from simplclip.data.rows import (
    NO_OPTIONS,
    OPTION_NAMES,
    Options,
    PairRow,
    RowSource,
    is_source,
    label_of_folder,
    open_source,
)
from simplclip.data.samples import (
    Pair,
    Sample,
    captions_of,
    clean,
    is_held_out,
    label_of,
    pair_of,
    record_of,
)
from simplclip.data.shards import Source, in_words, sources_of
from simplclip.data.sidecars import Folders, read_joined
from simplclip.data.transforms import Transform, pixels_of, seeded
from simplclip.data.workers import StoredOrder


@dataclass(frozen=True)
class Classes:
    """The classes of labelled data, by number: their names, those of their folders if each has one,
    and prompt templates.
    """

    names: list[str] | None = None
    folders: tuple[str, ...] = ()
    templates: list[str] | None = None


class HeldOutRow(NamedTuple):
    """A held-out sample without its image."""

    position: int  # among the samples of the data, from 0, broken ones included
    key: str
    captions: list[str]
    label: str | int | None  # name or number of the class
    group: str | None  # the json's, see `Pair.group`
    checksum: int  # of the image file


class HeldOutBatch(NamedTuple):
    """N images, and what was skipped; N may be 0."""

    # [N, 3, S, S], uint8 or float32; [0] without images
    images: torch.Tensor
    rows: list[HeldOutRow]  # N
    skipped: Skipped


@dataclass
class HeldOut:
    """Held-out data, made by `held_out`."""

    sources: Sequence[Source]
    classes: Classes
    captions: int | None = None
    txt_lines: bool = False
    # of training data the share that is held out, see `samples.is_held_out`; 0: all data are
    share: float = 0.0
    sidecars: Folders = ()  # those that training joins, since their json may have other groups
    rows: RowSource | None = None  # those of a table, JSON file or folder, which are no tars

    def __str__(self) -> str:
        return in_words(self.sources)

    def open(self, sample: Sample) -> Pair:
        """Parses the files of a sample, or of its `PairRow` under "__row__"; decodes no image.

        A sample with a label may have no captions. In a folder of classes no sample has any. The
        parsed json is kept in the sample. Raises BrokenSample.
        """
        row: PairRow | None = sample.get("__row__")
        if row is not None:
            sample = sample | files_of(row)
        record = record_of(sample)
        pair = pair_of(sample, [])
        pair.label = label_of(sample, record)
        if self.classes.folders:  # the caption of an image is only the name of its class
            pair.label = self.classes.folders.index(pair.key.split(os.sep)[0])
            return pair
        try:
            captions = captions_of(sample, record, txt_lines=self.txt_lines)
        except BrokenSample as broken:
            if pair.label is None or broken.reason not in ("missing caption", "empty caption"):
                raise
            captions = []
        several = isinstance(record.get("captions"), list) and not (row and row.captions)
        count = self.captions
        if count is None and several:
            count = 1
        pair.captions = captions[: count or None]
        return pair

    def batches(
        self,
        transform: Transform,
        batch_size: int,
        workers: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[HeldOutBatch]:
        """Yields the images in stored order, N <= batch_size at a time, without broken samples.

        transform: an ImageTransform, whose uint8 images still need its `finish`; or a function RGB
        -> float32 [3, S, S].
        workers: loader processes, which end with the iteration; 0 reads in this process.
        rank, world_size: the batches of this rank, of so many ranks that divide them.

        Raises ShardError for a shard that cannot be read.
        """
        order = StoredOrder(
            self.sources,
            self._read,
            partial(self._prepare, transform=transform),
            batch_size,
            _collate,
            rank,
            world_size,
        )
        for portion in order.portions(workers):
            images, rows = portion.batch or (torch.empty(0), [])
            yield HeldOutBatch(images, rows, portion.skipped)

    def nothing_usable(self, skipped: Skipped) -> EmptyDataError:
        """Returns the error for data without a usable sample; `skipped` has why."""
        return EmptyDataError(f"data: expected usable samples, got none in {self}; {skipped}")

    def pictures(self, positions: Iterable[int]) -> dict[int, Image.Image]:
        """Returns {position: RGB image} of the samples at `positions`, which count as in `batches`.

        The data up to the last of them are read again. Raises BrokenSample.
        """
        chosen = set(positions)
        samples = chain.from_iterable(self._read(source, Skipped()) for source in self.sources)
        last = max(chosen, default=-1)
        images = {}
        for position, sample in enumerate(islice(samples, last + 1)):
            if position in chosen:
                images[position] = self.open(sample).image
        return images

    def _read(self, source: Source, skipped: Skipped) -> Iterator[Sample]:
        """Yields a source's samples in stored order; of divided training data the held-out ones."""
        if self.rows is None:
            for sample in read_joined(source, skipped, self.sidecars):
                if not self.share or is_held_out(sample, self.share):
                    yield sample
            return
        for row in self.rows.rows(skipped):
            key = row.name.partition("/")[2]
            yield {"__key__": key, "__url__": source.url, "__shard__": source.name, "__row__": row}

    def _prepare(self, sample: Sample, transform: Transform) -> tuple[torch.Tensor, HeldOutRow]:
        """Returns the pixels [3, S, S] of a sample, and its row; raises BrokenSample."""
        pair = self.open(sample)
        with seeded("eval", pair.name):
            image = pixels_of(transform, pair)
        position = sample["__position__"]
        checksum = zlib.crc32(pair.encoded)
        row = HeldOutRow(position, pair.key, pair.captions, pair.label, pair.group, checksum)
        return image, row


def held_out(source: Any, *, captions: int | None = None, name: str = "data") -> HeldOut:
    """Returns the held-out data that a user names; samples are read when it is used.

    source: tars as `sources_of` takes them; a table, JSON file or folder as `pack` takes them; a
    folder in clip-benchmark's layout, whose split `test` is taken (name the folder of another one
    itself); a table or JSON file and fields of its `Options`, {"shards": ..., "images": FOLDER}; or
    training data that a run divides, {"shards": ..., "hold_out": SHARE, "sidecars": [...]}, of
    which the held-out share is taken. A sample without caption and label is broken.

    captions: number of captions to use of each sample, from the first on; 0 for all. None for all,
    except that of a json's captions only the first counts, since the others may be rephrasings for
    training, or synthetic.
    name: name of the argument in errors.

    Raises InputError if no data are found, or if a folder has another layout.
    """
    if isinstance(source, Mapping) and "hold_out" in source:
        # some tars may come twice in training
        tars = {tar.url: tar for tar in sources_of(source["shards"], name)}
        return HeldOut(
            [*tars.values()],
            Classes(),
            captions,
            share=source["hold_out"],
            sidecars=source.get("sidecars", ()),
        )
    options = NO_OPTIONS
    if isinstance(source, Mapping) and not source.keys().isdisjoint(OPTION_NAMES):
        options = Options(**{key: source[key] for key in OPTION_NAMES if key in source})
        source = source.get("shards")
    if not (isinstance(source, (str, os.PathLike)) and is_source(source)):
        for option, value in options.given().items():
            expected = f"{name}.{option}: expected a table or a JSON file with it"
            raise InputError(f"{expected}, got {source!r} and {value!r}")
        return HeldOut(sources_of(source, name), Classes(), captions)
    path = os.path.expanduser(os.fspath(source))
    data = _clip_benchmark(Path(path), captions, name)
    if data is not None:
        return data
    try:
        rows = open_source(path, options)
    except InputError as error:
        raise InputError(f"{name}: {str(error).removeprefix('source: ')}") from None
    names = [label_of_folder(folder) for folder in rows.classes] or None
    classes = Classes(names, rows.classes)
    return HeldOut([Source(path, name=rows.name)], classes, captions, rows=rows)


def _collate(
    prepared: list[tuple[torch.Tensor, HeldOutRow]],
) -> tuple[torch.Tensor, list[HeldOutRow]]:
    images, rows = zip(*prepared)
    return torch.stack(images), list(rows)


def _clip_benchmark(folder: Path, captions: int | None, name: str) -> HeldOut | None:
    """Returns the data of a folder in clip-benchmark's layout; None for another layout."""
    split, root = folder, folder.parent
    if not (split / "nshards.txt").is_file():
        split, root = folder / "test", folder
    count_file = split / "nshards.txt"
    if not count_file.is_file():
        return None
    count = count_file.read_text(errors="replace").strip()
    if not count.isdecimal() or len(count) > 9 or not int(count):
        raise InputError(f"{count_file}: expected the number of shards, got {count[:40]!r}")
    sources = sources_of((split / f"{shard}.tar" for shard in range(int(count))), name)
    names = _lines(root / "classnames.txt")
    templates = _lines(root / "zeroshot_classification_templates.txt")
    return HeldOut(sources, Classes(names, templates=templates), captions, txt_lines=True)


def _lines(file: Path) -> list[str] | None:
    """Returns the lines of a text file, as `clean` returns them; None if there is no file."""
    if not file.is_file():
        return None
    try:
        return [clean(line) for line in file.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: expected UTF-8, got {error}") from None
