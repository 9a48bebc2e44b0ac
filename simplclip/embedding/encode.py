"""Writes the features of images or texts into a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.progress import Progress
from simplclip.data.broken import Skipped
from simplclip.data.pool import cores
from simplclip.data.stream import Stream
from simplclip.data.text import clean
from simplclip.embedding.sources import images
from simplclip.embedding.store import Writer, check_out
from simplclip.encoder import Encoder, load
from simplclip.version import __version__

DTYPES = ("fp16", "fp32")


def embed(
    source: Any = None,
    out: str | os.PathLike = "features.npz",
    *,
    model: str | os.PathLike | Encoder,
    texts: str | os.PathLike | Iterable[str] | None = None,
    dtype: str = "fp16",
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Write the features of the images of `source`, or of `texts`, into `out`; returns what the file says about them.

    Memory does not depend on their number. The file appears when it is complete. Broken samples are skipped, and are
    counted in the answer's "skipped".

    Args:
        source: see `sources.images`.
        out: NAME.npz; NAME.parquet or a folder in clip-retrieval's layout, for which pyarrow is needed.
        model: what `simplclip.load` takes, or an encoder.
        texts: in place of a source: a file with a text a line, or texts.
        dtype: of the stored features: fp16 or fp32.
        workers: processes that decode images; by default one for each core, at most 8.

    Raises: InputError, FileNotFoundError, the errors of `simplclip.load` and of `data.stream.Stream.batches`.
    """
    if (source is None) == (texts is None):
        raise InputError("source: expected images or texts, got " + ("neither" if texts is None else "both"))
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected fp16 or fp32, got {dtype!r}")
    path = check_out(out)
    found = images(source) if source is not None else None
    if isinstance(texts, (str, os.PathLike)) and not os.path.isfile(texts):
        raise FileNotFoundError(f"texts: no such file: {texts}")
    encoder = model if isinstance(model, Encoder) else load(model, device=device, precision=precision)
    if workers is None:
        workers = min(8, cores())
    skipped, writer = Skipped(), Writer(path, half=dtype == "fp16")
    parts = (
        _of_texts(encoder, texts, batch_size)
        if found is None
        else _of_images(encoder, Stream(found, encoder.preprocess, batch_size).batches(skipped, workers))
    )
    total = len(found) or None if found is not None else None
    with Progress("embed", total, unit="texts" if found is None else "images") as progress:
        for features, rows in parts:
            writer.append(features, rows)
            progress.update(len(rows))
    count = len(writer.features)
    if not count:
        raise InputError("texts: expected at least one text, got none")
    tower = "text" if found is None else "image"
    about = encoder.stamp() | {"source": lasting(encoder.source), "tower": tower, "count": count, "dtype": dtype}
    writer.finish(about | {"simplclip": __version__})
    return about | {"path": str(path), "skipped": skipped}


def _of_images(encoder: Encoder, batches: Iterable[tuple]) -> Iterator[tuple[Tensor, list[dict[str, str]]]]:
    for batch, _, entries in batches:
        if batch.dtype == torch.uint8:
            batch = encoder.preprocess.finish(batch.to(encoder.device, non_blocking=True))
        yield (
            encoder.features("image", batch),
            [
                {"key": e.key, "caption": e.captions[0] if e.captions else "", "shard": e.shard, "image_path": e.image_path}
                for e in entries
            ],
        )


def _of_texts(
    encoder: Encoder, texts: str | os.PathLike | Iterable[str], size: int
) -> Iterator[tuple[Tensor, list[dict[str, str]]]]:
    lines = enumerate(text for text in map(clean, _lines(texts)) if text)
    while part := list(itertools.islice(lines, size)):
        rows = [{"key": f"{number:09d}", "caption": text} for number, text in part]
        yield encoder.encode_text([text for _, text in part]), rows


def _lines(texts: str | os.PathLike | Iterable[str]) -> Iterator[str]:
    if not isinstance(texts, (str, os.PathLike)):
        yield from texts
        return
    try:
        with open(texts, encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"texts: expected a file in UTF-8, got {texts}: {error}") from None


def lasting(source: str) -> str:
    """The source of an encoder with its path made absolute, so that it can be loaded from another folder."""
    if os.path.exists(source):
        return os.path.abspath(source)
    name, _, rest = source.partition("/")
    return f"{name}/{os.path.abspath(rest)}" if rest and os.path.exists(rest) else source
