"""Small shards of image-text pairs, whose batches can be read back."""

import csv
import hashlib
import io
import itertools
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simplclip import data
from simplclip.data import samples
from simplclip.data.errors import Skipped
from simplclip.data.loader import Block
from simplclip.data.sidecars import read_joined

SIZE = 8  # of the pictures that `resize` returns
COUNT = 23  # samples of the shards of several test files
Sample = tuple[str, dict[str, bytes]]  # key, and content by suffix


def png(seed: int = 0, size: tuple[int, int] = (12, 12), form: str = "PNG") -> bytes:
    """Returns a picture of noise, in another file format if `form` names one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members(path: str | Path) -> dict[str, bytes]:
    """Returns the files of a tar by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Returns the digests of a folder's files by name; the file of its lock stays there."""
    return {path.name: digest(path) for path in folder.glob(pattern) if path.name != ".lock"}


def meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def write(path: str | Path, samples: Iterable[Sample]) -> str:
    """Writes a tar whose members have the order of the samples, and returns its path."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def joined(shards: str | Path, *folders: str | Path, teacher: bool = False) -> dict[str, dict]:
    """Returns the samples of shards by key, as training reads them with these sidecars' folders."""
    joined_samples = {}
    for source in data.sources_of(str(shards)):
        for raw in read_joined(source, Skipped(), folders):
            joined_samples[raw["__key__"]] = samples.parse(raw, teacher=teacher)
    return joined_samples


def table(
    path: str | Path,
    rows: Iterable[Sequence],
    header: Sequence[str] = ("filepath", "title"),
    separator: str = ",",
) -> str:
    """Writes a table of pictures' paths and captions, and returns its path."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def features_of(number: int, captions: int = 3) -> np.ndarray:
    """Returns a teacher's features whose row r of sample n is n + r / 8 everywhere."""
    return (number + np.arange(1 + captions)[:, None] / 8 + np.zeros(6)).astype(np.float16)


def sample(number: int) -> Sample:
    record = {"captions": [f"{number} {letter}" for letter in "abc"], "group": number // 2}
    return f"k{number:03d}", {
        "json": json.dumps(record).encode(),
        "png": png(number),
        "txt": f"{number} a".encode(),
    }


def tokenizer(texts: Iterable[str]) -> Tensor:
    """Tokenizes without loss: a token is a byte of the text."""
    return torch.tensor([list(text.encode()[:12].ljust(12)) for text in texts], dtype=torch.int64)


def text_of(row: Tensor) -> str:
    """Returns the text of a row of tokens."""
    return bytes(row.tolist()).decode().strip()


def resize(image: Image.Image) -> Tensor:
    pixels = np.array(image.resize((SIZE, SIZE)))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def augment(image: Image.Image) -> Tensor:
    """Adds draws from all three global generators, which torchvision, open_clip and timm use."""
    return resize(image) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002


def loader(paths: Any, state: dict | None = None, **options: Any) -> data.Loader:
    """Returns a loader of batches of 4, which continues from a state if there is one."""
    defaults = {"batch_size": 4, "transform": augment, "tokenizer": tokenizer}
    made = data.Loader(paths, **defaults | options)
    if state is not None:
        made.load_state_dict(state)
    return made


def one_pass(shards: Any, **options: Any) -> tuple[list[str], Skipped]:
    """Returns the keys of the first pass in stored order, and the counts of damage."""
    found: list[str] = []
    skipped = Skipped()
    pairs = loader(shards, batch_size=1, shuffle=False, transform=resize, **options)
    for block in pairs.items(0, 1):
        skipped.merge(block.skipped)
        if block.place.epoch:
            break  # the damage behind the last batch is in the next one
        found += block.batch["key"]
    return found, skipped


def first_passes(pairs: data.Loader, worker: int, workers: int, count: int = 1) -> Iterator[Block]:
    """Yields the blocks of a worker in its first passes, of one sample each."""
    for block in pairs.items(worker, workers):
        if block.place.epoch >= count:
            return
        yield block


def take(batches: Iterable[dict], count: int) -> list[dict]:
    return list(itertools.islice(batches, count))


def keys(batches: Iterable[dict]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]
