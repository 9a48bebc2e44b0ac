"""Searches a file of features by text or image, and makes a picture of what is found."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from simplclip.common.errors import InputError
from simplclip.common.plotting import INK, MUTED, frame, say, sheet, show, wrapped, write
from simplclip.data.broken import BrokenSample
from simplclip.data.decode import decode_pil
from simplclip.embedding.encode import lasting
from simplclip.embedding.sources import encoded
from simplclip.embedding.store import CHUNK, Stored
from simplclip.encoder import Encoder, load
from simplclip.evaluation.metrics import nearest
from simplclip.evaluation.sources import IMAGES

WIDEST = 10  # tiles in a line of the picture
THUMBNAIL = 256  # pixels of the longer side of an image in the picture
EMPTY = "#f6f8fa"


@dataclass
class Hit:
    """A row of a file of features, and its cosine similarity to the query."""

    score: float
    row: int
    key: str
    caption: str
    shard: str
    image_path: str

    @property
    def place(self) -> str:
        return self.image_path or (f"{self.shard}: {self.key}" if self.shard else "")


def find(
    features: str | os.PathLike | Stored,
    queries: str | Sequence[str],
    *,
    model: str | os.PathLike | Encoder | None = None,
    top: int = 10,
    device: str = "auto",
) -> dict[str, list[Hit]]:
    """The `top` rows that are most similar to each query, a text or the path of an image: query -> hits, best first.

    The similarities are computed by faiss where it is installed, one part of the features after another.

    model: what `simplclip.load` takes, or an encoder; by default the model that the file names. It must have the weights and
    the image transform that the features were made by.
    Raises: InputError (another file, another model), FileNotFoundError, the errors of `simplclip.load`.
    """
    stored = features if isinstance(features, Stored) else Stored(features)
    queries = [queries] if isinstance(queries, str) else list(queries)
    if not queries or top < 1:
        raise InputError(f"find: expected at least one query and one hit, got {len(queries)} and {top}")
    for query in queries:
        if _is_image(query) and not Path(query).is_file():
            raise FileNotFoundError(f"find: no such image: {query}")
    encoder = model if isinstance(model, Encoder) else _model(stored, model, device)
    _check(stored, encoder)
    rows = [encoder.encode_image(query) if _is_image(query) else encoder.encode_text(query) for query in queries]
    search = _by_faiss if _has_faiss() else nearest
    found: list[list[tuple[float, int]]] = []
    for _, scores, places in search(torch.cat(rows).cpu(), stored, top):
        found += [list(zip(*both)) for both in zip(scores.tolist(), places.tolist())]
    about = stored.rows([row for hits in found for _, row in hits])
    return {query: [Hit(score, row, **about[row]) for score, row in hits] for query, hits in zip(queries, found)}


def _is_image(query: str) -> bool:
    return query.lower().endswith(IMAGES) or ("." in query and Path(query).is_file())


def _model(stored: Stored, given: str | os.PathLike | None, device: str) -> Encoder:
    source = given if given is not None else stored.about["source"]
    try:
        return load(source, device=device, precision=stored.about["precision"])
    except (FileNotFoundError, InputError) as error:
        if given is not None:
            raise
        raise InputError(
            f"model: expected the features' model at {source!r}, got none ({error}); say where it is by --model"
        ) from None


def _check(stored: Stored, encoder: Encoder) -> None:
    about, got = stored.about, encoder.fingerprint()
    if got != about["weights"]:
        raise InputError(
            f"model: expected the one that made {stored.path}, {about['name']} with fingerprint {about['weights']}, "
            f"got {encoder.name} ({lasting(encoder.source)}) with fingerprint {got}; embed the data again by it, or name "
            "the other by --model"
        )


def _has_faiss() -> bool:
    try:
        import faiss  # noqa: F401
    except ImportError:
        return False
    return True


def _by_faiss(queries: Tensor, stored: Stored, k: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `evaluation.nearest`."""
    import faiss

    scores, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(stored), CHUNK):
        part = stored[start : start + CHUNK].numpy()
        index = faiss.IndexFlatIP(part.shape[1])
        index.add(part)
        found, where = index.search(queries.numpy(), min(k, len(part)))
        joined = torch.cat([scores, torch.from_numpy(found)], 1), torch.cat([places, torch.from_numpy(where) + start], 1)
        scores, order = joined[0].topk(min(k, joined[0].shape[1]))
        places = joined[1].gather(1, order)
    yield 0, scores, places


def picture(path: str | os.PathLike, found: dict[str, list[Hit]], about: dict[str, Any]) -> Path:
    """A picture of the hits of each query, in a row; an image that is not where it was is an empty frame with a note.

    about: of `Stored`.
    """
    hits = [hit for several in found.values() for hit in several]
    images = dict(zip((hit.row for hit in hits), encoded([(hit.key, hit.shard, hit.image_path) for hit in hits])))
    label, gap, below, columns = 2.3, 0.16, 0.5, max(map(len, found.values()))
    wide = -(-columns // -(-columns // WIDEST))  # as even lines
    lines = {query: -(-len(several) // wide) for query, several in found.items()}
    row_height, between = 1 + below, 0.12
    width = max(label + wide * (1 + gap), 7.5)
    height = sum(number * row_height + between for number in lines.values())
    figure, axis = sheet(width, height, 0.95)
    what = "images" if about["tower"] == "image" else "texts"
    say(axis, 0, -0.75, f"Nearest of {about['count']:,} {what}", 15, fontweight="bold")
    say(axis, 0, -0.38, wrapped(f"{about['name']}; cosine similarity below each", 110, 1), 10, MUTED)
    y = 0.0
    for query, several in found.items():
        if _is_image(query):
            _tile(axis, Path(query).read_bytes(), label - 1.3, y)
            say(axis, label - 0.8, y + 1.13, wrapped(Path(query).name, 20, 1), 8, MUTED, ha="center")
        else:
            say(axis, label - 0.3, y + 0.5, wrapped(query, 20, 5), 11, ha="right", fontweight="bold")
        for number, hit in enumerate(several):
            x, top = label + (number % wide) * (1 + gap), y + (number // wide) * row_height
            text = hit.caption or Path(hit.image_path).name or hit.key
            if images[hit.row] == "":  # a text, which has no image
                frame(axis, x, top)
                say(axis, x + 0.5, top + 0.5, wrapped(hit.caption, 15, 6), 8, ha="center")
                text = ""
            else:
                _tile(axis, images[hit.row], x, top)
            say(axis, x, top + 1.11, f"{hit.score:.3f}", 8.5, INK, fontweight="bold")
            say(axis, x, top + 1.2, wrapped(text, 18, 2), 7.5, MUTED, va="top", linespacing=1.15)
        y += lines[query] * row_height + between
    return write(figure, Path(path))


def _tile(axis: Any, data: bytes | str, x: float, y: float) -> None:
    """An image in its proportions in the middle of a square, or why there is none."""
    image: Image.Image | None = None
    note = data
    if isinstance(data, bytes):
        try:
            image = decode_pil(data)
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        except BrokenSample as broken:
            note = broken.args[0]
    if image is None:
        axis.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=EMPTY, zorder=0)
        say(axis, x + 0.5, y + 0.5, wrapped(str(note), 14, 4), 8, MUTED, ha="center", style="italic")
    else:
        size = (image.width / max(image.size), image.height / max(image.size))
        show(axis, image, x + (1 - size[0]) / 2, y + (1 - size[1]) / 2, size)
    frame(axis, x, y)
