"""Small shards of image-text pairs, whose batches can be read back; commands, and processes that
are killed.
"""

import csv
import hashlib
import io
import json
import random
import tarfile

import numpy as np
import torch
from PIL import Image

from simplclip import data
from simplclip.data import samples, tars
from simplclip.data.errors import Skipped

SIZE = 8
COUNT = 23


def png(seed=0, size=(12, 12), form="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        out, form
    )
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def digests(folder, pattern="*"):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)
    }


def meta(folder):
    return json.loads((folder / "meta.json").read_text())


def write(path, samples):
    """Writes a tar. samples: list of (key, {suffix: bytes}), as the tar's members in this order."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples:
            for suffix, content in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def joined(shards, *folders, teacher=False):
    """Returns the samples of shards by key, as training reads them with the sidecars in
    `folders`.
    """
    found = {}
    for source in data.sources_of(str(shards)):
        for raw in tars.read(source, Skipped(), sidecars=folders):
            found[raw["__key__"]] = samples.parse(raw, teacher=teacher)
    return found


def table(path, rows, header=("filepath", "title"), separator=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def sample(number):
    record = {"captions": [f"{number} {letter}" for letter in "abc"], "group": number // 2}
    return f"k{number:03d}", {
        "json": json.dumps(record).encode(),
        "png": png(number),
        "txt": f"{number} a".encode(),
    }


def tokenizer(texts):
    """Tokenizes without loss: a token is a byte of the text."""
    return torch.tensor([list(text.encode()[:12].ljust(12)) for text in texts], dtype=torch.int64)


def text_of(row):
    return bytes(row.tolist()).decode().strip()


def resize(image):
    return torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).permute(2, 0, 1).float() / 255


def augment(image):
    """Adds draws from all three global generators, which torchvision, open_clip and timm use."""
    return resize(image) + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002


def loader(paths, state=None, **options):
    reader = data.Loader(
        paths, **{"batch_size": 4, "transform": augment, "tokenizer": tokenizer} | options
    )
    if state is not None:
        reader.load_state_dict(state)
    return reader


def keys(batches):
    return [key for batch in batches for key in batch["key"]]
