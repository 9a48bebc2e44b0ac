"""Features of many images or texts in a file: `embed` writes it, `find` searches it, `picture` draws what was found.

The file is an .npz with an array of features [N, D], N rows of metadata, and what is known about the model. Memory does not
depend on N, neither in writing nor in reading. A file may come from elsewhere, so opening it compares its description of
itself with its contents.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simplclip.common import ranks
from simplclip.common.errors import InputError
from simplclip.common.files import HOUR, remove_leftovers, replacing
from simplclip.common.plotting import INK, MUTED, draw_image, draw_text, frame, sheet, wrapped, write
from simplclip.common.progress import Progress
from simplclip.data import arrays, held_out
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode_pil
from simplclip.data.folders import IMAGES
from simplclip.data.pairs import count
from simplclip.data.pool import cores
from simplclip.data.shards import ShardError, contents, file_bytes, image_of, read_shard
from simplclip.data.text import clean, json_of
from simplclip.data.transforms import finished
from simplclip.evaluation.encoder import Encoder, load
from simplclip.evaluation.retrieval import nearest
from simplclip.version import __version__

COLUMNS = ("key", "caption", "shard", "image_path")
DTYPES = {"fp16": "<f2", "fp32": "<f4"}
_CHUNK = 16384  # rows that are packed at a time
_ABOUT_BYTES = 1 << 20  # most bytes of a file's description of itself, `about`
_TEXT_BYTES = 16 << 20  # most bytes that each text of a column may take
_ABOUT = {"count": int, "width": int, "name": str, "weights": str, "source": str, "precision": str, "tower": str}
WIDEST = 10  # tiles in a line of the picture
THUMBNAIL = 256  # pixels of the longer side of an image in the picture

Batch = tuple[Tensor, list[dict[str, Any]]]  # features [k, D], and k rows: column -> text; keys not in COLUMNS are dropped


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
    """Writes the features of the images of `source`, or of `texts`, into `out`; returns the file's description of them.

    Ranks divide the work, and the first rank writes. Memory does not depend on the number of rows. The file appears when it
    is complete. Broken samples are skipped, and are counted in the result's "skipped".

    Args:
        source: images, all that `data.parts_of` takes; captions are not needed.
        out: NAME.npz.
        model: what `simplclip.load` takes, or an encoder.
        texts: in place of a source: a file with one text in each line, or an iterable of texts.
        dtype: of the stored features: fp16 or fp32.
        workers: processes that decode images; by default one for each core, at most 8.

    Raises: InputError, FileNotFoundError, the errors of `simplclip.load` and of `data.HeldOut.batches`.
    """
    if (source is None) == (texts is None):
        raise InputError("source: expected images or texts, got " + ("neither" if texts is None else "both"))
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected fp16 or fp32, got {dtype!r}")
    path = Path(out)
    if path.suffix != ".npz":
        raise InputError(f"out: expected a name that ends in .npz, got {str(out)!r}")
    if source is not None:
        found = held_out(source, bare=True, name="source")
        total = sum(count(found.parts) or ()) or None  # None if streams, or many bytes, would have to be read
    encoder = model if isinstance(model, Encoder) else load(model, device=ranks.device(device), precision=precision)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name.__eq__, HOUR)
    skipped = Skipped()
    if source is None:
        tower, total, batches = "text", None, _of_texts(encoder, texts, batch_size)
    else:
        workers = min(8, cores()) if workers is None else workers

        def encode(images: Tensor) -> Tensor:
            return encoder.features("image", finished(encoder.preprocess, images, encoder.device)).cpu()

        tower, batches = "image", _of_images(found.batches(encoder.preprocess, batch_size, skipped, workers, encode))
    about = encoder.stamp() | {"source": lasting(encoder.source), "tower": tower, "dtype": dtype, "simplclip": __version__}
    if ranks.first():
        about = _write(path, batches, about, total)
    else:
        deque(batches, 0)
    return ranks.on_first(lambda: about | {"path": str(path), "skipped": skipped})


def _of_images(decoded: Iterable[tuple]) -> Iterator[Batch]:
    for features, _, found in decoded:
        columns = ((one.key, one.captions[0] if one.captions else "", one.shard, one.image_path) for one in found)
        yield features, [dict(zip(COLUMNS, row)) for row in columns]


def _of_texts(encoder: Encoder, texts: str | os.PathLike | Iterable[str], size: int) -> Iterator[Batch]:
    cleaned = filter(None, map(clean, _lines(texts)))
    rows = ({"key": f"{number:09d}", "caption": text} for number, text in enumerate(cleaned))
    batches = iter(lambda: list(itertools.islice(rows, size)), [])
    return ranks.mapped(lambda batch: (encoder.encode_text([row["caption"] for row in batch]).cpu(), batch), batches)


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
    """Returns an encoder's source with an absolute path, so that the encoder can be loaded from another folder."""
    if os.path.exists(source):
        return os.path.abspath(source)
    name, _, rest = source.partition("/")
    return f"{name}/{os.path.abspath(rest)}" if rest and os.path.exists(rest) else source


def _write(path: Path, batches: Iterable[Batch], about: dict[str, Any], total: int | None) -> dict[str, Any]:
    """Replaces `path` by a file of features; returns `about` with their count.

    Features and rows wait in temporary files beside `path`, since arrays' headers need the number of rows and longest texts.
    """
    features, longest = Features(folder=path.parent, half=about["dtype"] == "fp16"), dict.fromkeys(COLUMNS, 1)
    progress = Progress("embed", total, unit=f"{about['tower']}s")
    with progress, tempfile.TemporaryFile("w+", encoding="ascii", dir=path.parent) as lines:
        for some, rows in batches:
            features.append(some)
            for row in rows:
                row = {column: row.get(column, "") for column in COLUMNS}
                lines.write(json.dumps(row) + "\n")
                longest = {column: max(longest[column], len(text)) for column, text in row.items()}
            progress.update(len(rows))
        count = len(features.finish())
        if not count:
            raise InputError("texts: expected at least one text, got none")
        about |= {"count": count}
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            # Features are not compressed, so that they can be mapped into memory. Texts are compressed, as they are padded.
            parts = (features[i : i + _CHUNK].numpy() for i in range(0, count, _CHUNK))
            arrays.add_to_npz(archive, "features", DTYPES[about["dtype"]], (count, features.width), parts, zipfile.ZIP_STORED)
            for column, length in longest.items():
                lines.seek(0)
                texts = (json.loads(line)[column] for line in lines)
                arrays.add_to_npz(archive, column, f"<U{length}", (count,), texts)
            text = json.dumps(about, ensure_ascii=False)
            arrays.add_to_npz(archive, "about", f"<U{len(text)}", (), [text])
    return about


class Stored:
    """A file that `embed` wrote: description `about`, features by slices, `rows`. Raises FileNotFoundError and InputError."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"features: no such file: {path}")
        try:
            self._open()
        except Exception as error:  # the type depends on the damage
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"features: expected a file of simplclip embed, got {str(path)!r}: {reason}") from None

    def _open(self) -> None:
        self._map = arrays.mapped_in_npz(self.path, "features")
        shape, dtype = self._map().shape, self._map().dtype
        if len(shape) != 2 or dtype not in ("<f2", "<f4"):
            raise ValueError(f"expected features [N, D], got {dtype} {list(shape)}")
        self.about = json_of(str(arrays.from_npz(self.path, "about", max_bytes=_ABOUT_BYTES)[0]))
        for key, kind in _ABOUT.items():
            if not isinstance(self.about, dict) or not isinstance(self.about.get(key), kind):
                raise ValueError(f"it has no {key} of its model")
        if shape != (self.about["count"], self.about["width"]):
            raise ValueError(f"expected features of {self.about['count']:,} rows, got {list(shape)}")
        for column in COLUMNS:
            found, dtype = arrays.header_in_npz(self.path, column)
            if found != shape[:1] or dtype.kind != "U" or dtype.itemsize > _TEXT_BYTES:
                raise ValueError(f"expected {column} of each of {shape[0]:,} rows, got {dtype} {list(found)}")

    def __len__(self) -> int:
        return self.about["count"]

    def __getitem__(self, rows: slice) -> Tensor:
        """Copies features, float32 [k, D]. The file is mapped anew each time, so that its pages do not stay in memory."""
        return torch.from_numpy(self._map()[rows].astype(np.float32))

    def rows(self, numbers: Sequence[int]) -> dict[int, dict[str, str]]:
        """Reads the metadata of these rows: number -> column -> text, in ascending order of the numbers."""
        numbers = sorted(set(numbers))
        columns = [arrays.items_in_npz(self.path, column, numbers) for column in COLUMNS]
        return {number: dict(zip(COLUMNS, map(str, row))) for number, *row in zip(numbers, *columns)}


@dataclass
class Hit:
    """A row of a file of features, and its cosine similarity to the query."""

    score: float
    row: int
    key: str
    caption: str
    shard: str
    image_path: str


def find(
    features: str | os.PathLike | Stored,
    queries: str | Sequence[str],
    *,
    model: str | os.PathLike | Encoder | None = None,
    top: int = 10,
    device: str = "auto",
) -> dict[str, list[Hit]]:
    """Finds the `top` rows that are most similar to each query, a text or the path of an image: query -> hits, best first.

    A query image is not among its own hits if the features include the file at its path.
    model: what `simplclip.load` takes, or an encoder; by default the model that the file names. It must have the weights and
    the image transform with which the features were made.
    Raises: InputError (another file, another model), FileNotFoundError, the errors of `simplclip.load`.
    """
    stored = features if isinstance(features, Stored) else Stored(features)
    queries = [queries] if isinstance(queries, str) else list(queries)
    if not queries or top < 1:
        raise InputError(f"find: expected at least one query and one hit, got {len(queries)} and {top}")
    about = stored.about
    source = model or about["source"]
    try:
        encoder = model if isinstance(model, Encoder) else load(source, device=device, precision=about["precision"])
    except (FileNotFoundError, InputError) as error:
        told = f"model: expected the features' model at {source!r}, got none ({error}); say where it is by --model"
        raise InputError(told) from None
    got = encoder.fingerprint()
    if got != about["weights"]:
        raise InputError(
            f"model: expected the one that made {stored.path}, {about['name']} with fingerprint {about['weights']}, "
            f"got {encoder.name} with fingerprint {got}; embed the data again by it, or name the other by --model"
        )
    rows = [encoder.encode_image(query) if _is_image(query) else encoder.encode_text(query) for query in queries]
    own = {query: os.path.abspath(query) if _is_image(query) else None for query in queries}
    number = top + any(own.values())
    while True:
        found: list[list[tuple[float, int]]] = []
        for _, scores, places in nearest(torch.cat(rows).cpu(), stored, number):
            found += [list(zip(*both)) for both in zip(scores.tolist(), places.tolist())]
        metadata = stored.rows([row for hits in found for _, row in hits])
        hits = {query: [Hit(score, row, **metadata[row]) for score, row in some] for query, some in zip(queries, found)}
        others = {query: [hit for hit in some if hit.image_path != own[query]] for query, some in hits.items()}
        if number >= len(stored) or min(map(len, others.values())) >= top:
            return {query: some[:top] for query, some in others.items()}
        number *= 2  # a table may have several rows of one image


def _is_image(query: str) -> bool:
    return query.lower().endswith(IMAGES) or ("." in query and Path(query).is_file())


def picture(path: str | os.PathLike, found: dict[str, list[Hit]], about: dict[str, Any]) -> Path:
    """Draws the hits of each query; the frame of an image that is gone says "not found". about: that of `Stored`."""
    images = thumbnails([hit for hits in found.values() for hit in hits])
    label, gap, height = 2.3, 0.16, 1.55  # inches: width of the queries' column, gap of tiles, height of a line
    wide = min(WIDEST, max(map(len, found.values())))
    lines = {query: -(-len(hits) // wide) for query, hits in found.items()}
    figure, axis = sheet(max(label + wide * (1 + gap), 7.5), sum(lines.values()) * height, 0.95)
    draw_text(axis, 0, -0.75, f"Nearest of {about['count']:,} {about['tower']}s", 15, fontweight="bold")
    draw_text(axis, 0, -0.38, wrapped(f"{about['name']}; cosine similarity below each", 110, 1), 10, MUTED)
    y = 0.0
    for query, hits in found.items():
        if _is_image(query):
            _tile(axis, label - 1.3, y, _thumbnail(file_bytes(query)))
            draw_text(axis, label - 0.8, y + 1.13, wrapped(Path(query).name, 20, 1), 8, MUTED, ha="center")
        else:
            draw_text(axis, label - 0.3, y + 0.5, wrapped(query, 20, 5), 11, ha="right", fontweight="bold")
        for number, hit in enumerate(hits):
            x, top = label + (number % wide) * (1 + gap), y + (number // wide) * height
            _tile(axis, x, top, images.get(hit.row), hit.caption if about["tower"] == "text" else "not found")
            if about["tower"] == "image":
                text = hit.caption or Path(hit.image_path).name or hit.key
                draw_text(axis, x, top + 1.2, wrapped(text, 17, 2), 7.5, MUTED, va="top", linespacing=1.15)
            draw_text(axis, x, top + 1.11, f"{hit.score:.3f}", 8.5, INK, fontweight="bold")
        y += lines[query] * height
    return write(figure, Path(path))


def _tile(axis: Any, x: float, y: float, image: Image.Image | None, text: str = "") -> None:
    """Draws a square with an image in its proportions, or with a text."""
    frame(axis, x, y)
    if image is None:
        draw_text(axis, x + 0.5, y + 0.5, wrapped(text, 15, 6), 8, MUTED, ha="center")
    else:
        width, height = image.width / max(image.size), image.height / max(image.size)
        draw_image(axis, image, x + (1 - width) / 2, y + (1 - height) / 2, (width, height))


def thumbnails(hits: Sequence[Hit]) -> dict[int, Image.Image]:
    """Reads small images of the hits whose image is still there: row -> image. Each shard is read once, by its headers.

    Only a shard with an absolute path is read, never a URL or a command: the names of shards come from a file, which must not
    run commands.
    """
    found: dict[int, Image.Image] = {}
    wanted: dict[str, dict[str, list[int]]] = {}  # shard -> key -> rows
    for hit in hits:
        if hit.image_path:
            with contextlib.suppress(OSError, BrokenSample):
                found[hit.row] = _thumbnail(file_bytes(hit.image_path))
        elif os.path.isabs(hit.shard) and os.path.isfile(hit.shard):
            wanted.setdefault(hit.shard, {}).setdefault(hit.key, []).append(hit.row)
    for shard, rows in wanted.items():
        with contextlib.suppress(OSError, ShardError):
            for sample in read_shard(shard, Skipped()):
                if several := rows.pop(sample["__key__"], None):
                    with contextlib.suppress(BrokenSample):
                        found |= dict.fromkeys(several, _thumbnail(image_of(contents(sample)) or b""))
                if not rows:
                    break
    return found


def _thumbnail(encoded: bytes) -> Image.Image:
    image = decode_pil(encoded)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


class Features:
    """Rows [n, D] that are added one batch after another and read in parts, as float32 tensors.

    file: a path, which becomes a .npy file; or None for a file that disappears with this object.
    folder: folder of the file that disappears. half: store float16 instead of float32.
    """

    def __init__(self, file: Path | None = None, folder: str | Path | None = None, half: bool = False) -> None:
        if file:
            file.unlink(missing_ok=True)  # a link there is replaced, not followed
        self._file = open(file, "x+b") if file else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._dtype, self._count, self.width, self._start = np.dtype("<f2" if half else "<f4"), 0, 0, 0

    def append(self, rows: Tensor) -> None:
        """Adds rows [k, D]."""
        if not self.width:
            self.width = rows.shape[1]
            self._header()
            self._start = self._file.tell()
        self._file.write(rows.detach().cpu().numpy().astype(self._dtype).tobytes())
        self._count += len(rows)

    def finish(self) -> Features:
        """Writes buffered rows to the file, and the number of rows into its header."""
        if self.width:
            self._header()
            self._file.seek(0, os.SEEK_END)
        self._file.flush()
        return self

    def _header(self) -> None:
        self._file.seek(0)  # numpy leaves room for a larger number of rows
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._count, self.width)}
        np.lib.format.write_array_header_1_0(self._file, about)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, key: slice | Sequence[int]) -> Tensor:
        """Returns rows as float32 [k, D]: a copy, so that pages of the file do not stay in memory."""
        if not self._count:
            return torch.empty(0, self.width)
        rows = np.memmap(self._file, self._dtype, "r", self._start, (self._count, self.width))
        return torch.from_numpy(rows[key].astype(np.float32))
