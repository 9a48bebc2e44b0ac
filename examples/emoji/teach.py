"""Trains the demo's teacher on the pairs of shards, and writes its features into sidecars.

    python examples/emoji/teach.py 'data/emoji/train-*.tar' --out data/emoji-teacher

A sidecar has the name of its shard. For each sample it has KEY.teacher.npy: float16 [1 + C, WIDTH],
normalised rows of the image and of its C captions in order, and KEY.teacher.json with a digest of
these captions. meta.json names the teacher. A config takes the sidecars by
`data.sidecars: [data/emoji-teacher]`.

The frozen networks see each caption once, and each image as it is and in VIEWS augmented forms.
Their features train the heads (teacher.py), which then turn them into the teacher's features. For a
teacher that is ready, e.g. of open_clip, `simplclip teacher` writes the sidecars.
"""

import argparse
import glob
import io
import json
import os
import random
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save
from teacher import WIDTH, Head, Heads, Networks, tokenizer, transform
from timm.optim import param_groups_weight_decay
from torch import Tensor

from simplclip.common import hardware
from simplclip.data.samples import TEACHER, TEACHER_JSON, digest_of
from simplclip.losses import ClipPMLoss

STDERR = Console(stderr=True)
STEPS = 200
BATCH = 512
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
VIEWS = 2  # augmented images of each image, in addition to the image itself
MAX_SCALE = 40.0  # with a sharper softmax the teacher would only tell which training pairs match


@dataclass
class Pair:
    shard: str
    key: str
    png: bytes
    captions: list[str]
    group: str  # pairs of one group are not each other's negatives


@dataclass
class Features:
    """What the frozen networks make of n pairs, and of the m different captions among them."""

    images: Tensor  # float32 [1 + views, n, IMAGE_FEATURES]
    texts: Tensor  # float32 [m, TEXT_FEATURES]
    captions: list[list[int]]  # rows of `texts`, by pair
    groups: Tensor  # int64 [n]


def read_pairs(shards: list[str]) -> list[Pair]:
    """Returns all pairs of the shards, in their order."""
    pairs = []
    for shard in shards:
        for sample in webdataset.WebDataset(os.path.abspath(shard), shardshuffle=False):
            key, png, record = sample["__key__"], sample["png"], json.loads(sample["json"])
            pairs.append(Pair(shard, key, png, record["captions"], record["group"]))
    return pairs


def augmented(images: Tensor) -> Tensor:
    """Returns the images turned, zoomed and shifted a little, with other colours, at random.

    images: [B, 3, S, S] from -1 to 1.
    """
    n = len(images)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    angle = draw(-0.26, 0.26)
    zoom = draw(0.87, 1.25)
    shift = draw(-0.2, 0.2, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # what lies beyond the edges is white
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1
    gain = draw(0.7, 1.3, 1, 1, 1) * draw(0.85, 1.15, 3, 1, 1)
    return ((images + 1) * gain - 1).clamp(-1, 1)


@torch.no_grad()
def features_of(
    networks: Networks, pairs: list[Pair], views: int, device: torch.device
) -> Features:
    """Returns the frozen networks' features of the pairs; views: augmented images of each image."""
    precision, _ = hardware.pick_precision("auto", device)
    captions = {text for pair in pairs for text in pair.captions}
    # texts of one length together: less padding
    captions = sorted(captions, key=lambda text: (len(text), text))
    images, texts = [], []
    with hardware.autocast(precision, device):
        for start in track(range(0, len(pairs), 64), "images", console=STDERR):
            pixels = torch.stack([pixels_of(pair) for pair in pairs[start : start + 64]])
            forms = [pixels]
            forms += [augmented(pixels) for _ in range(views)]
            features = [networks.image_features(form.to(device)).float().cpu() for form in forms]
            images.append(torch.stack(features))
        for start in track(range(0, len(captions), 256), "captions", console=STDERR):
            tokens = tokenizer(captions[start : start + 256])
            texts.append(networks.text_features(tokens.to(device)).float().cpu())
    rows = {text: row for row, text in enumerate(captions)}
    rows_of_pairs = []
    numbers: dict[str, int] = {}  # by group, in the order of the pairs
    for pair in pairs:
        rows_of_pairs.append([rows[text] for text in pair.captions])
        numbers.setdefault(pair.group, len(numbers))
    groups = torch.tensor([numbers[pair.group] for pair in pairs])
    return Features(torch.cat(images, 1), torch.cat(texts), rows_of_pairs, groups)


def pixels_of(pair: Pair) -> Tensor:
    """Returns the pixels of a pair's image, as the networks take them."""
    return transform(Image.open(io.BytesIO(pair.png)).convert("RGB"))


def fit(heads: Heads, features: Features, rng: random.Random, device: torch.device) -> None:
    """Trains the heads by a contrastive loss.

    Of each pair of a batch, one view of its image and one of its captions are drawn.
    """
    set_mean_and_std(heads.image, features.images.flatten(0, 1))
    set_mean_and_std(heads.text, features.texts)
    heads.train().requires_grad_(True)
    images = features.images.to(device)
    texts = features.texts.to(device)
    groups = features.groups.to(device)
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(heads, WEIGHT_DECAY), LEARNING_RATE, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.1, cycle_momentum=False
    )
    contrastive = ClipPMLoss(pm_weight=0)
    order: list[int] = []
    for _ in track(range(STEPS), "heads", console=STDERR):
        if len(order) < min(BATCH, len(groups)):
            order += rng.sample(range(len(groups)), len(groups))
        batch = order[:BATCH]
        order = order[BATCH:]
        views = rng.choices(range(len(images)), k=len(batch))
        captions = [rng.choice(features.captions[pair]) for pair in batch]
        x = heads.image(images[views, batch])
        y = heads.text(texts[captions])
        scale = heads.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, ids=groups[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    heads.eval().requires_grad_(False)
    heads.logit_scale.clamp_(max=torch.tensor(MAX_SCALE).log().item())


def set_mean_and_std(head: Head, inputs: Tensor) -> None:
    """Sets the mean and deviation by which a head standardises inputs [n, features]."""
    head.mean.copy_(inputs.mean(0))
    head.std.copy_(inputs.std(0).clamp(min=1e-3))


@torch.no_grad()
def write_sidecars(
    pairs: list[Pair], features: Features, heads: Heads, out: Path, device: torch.device
) -> None:
    """Writes a sidecar of each shard, then meta.json."""
    x = F.normalize(heads.image(features.images[0].to(device)), dim=-1).cpu()
    y = F.normalize(heads.text(features.texts.to(device)), dim=-1).cpu()
    entries = {}
    numbered_pairs = enumerate(pairs)
    for shard, pairs_of_shard in groupby(numbered_pairs, lambda numbered: numbered[1].shard):
        path = out / Path(shard).name
        samples = 0
        with webdataset.TarWriter(f"{path}.unfinished", mtime=0) as writer:
            for number, pair in pairs_of_shard:
                rows = torch.cat([x[number : number + 1], y[features.captions[number]]])
                file = io.BytesIO()
                np.save(file, rows.half().numpy())
                about = {"captions": digest_of(pair.captions)}
                writer.write({"__key__": pair.key, TEACHER: file.getvalue(), TEACHER_JSON: about})
                samples += 1
        os.replace(f"{path}.unfinished", path)
        entries[path.name] = {
            "samples": samples,
            "bytes": path.stat().st_size,
            "source": {"bytes": os.path.getsize(shard)},
        }
    stamp = {
        "name": "emoji",
        "width": WIDTH,
        "logit_scale": heads.logit_scale.exp().item(),
        "dtype": "fp16",
    }
    meta = {"teacher": stamp, "splits": {"train": {"samples": len(pairs), "shards": entries}}}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def is_complete(shards: list[str], out: Path) -> bool:
    """Whether `out` has the sidecars of these shards from an earlier call."""
    if not (out / "meta.json").exists():
        return False
    entries = json.loads((out / "meta.json").read_text())["splits"]["train"]["shards"]
    sizes = {Path(shard).name: os.path.getsize(shard) for shard in shards}
    return sizes == {name: entry["source"]["bytes"] for name, entry in entries.items()}


def teach(shards: list[str], out: Path, heads_file: Path | None = None) -> None:
    """Trains the heads, or takes those of a file, and writes the sidecars of the shards."""
    device = hardware.pick_device()
    start = time.perf_counter()
    torch.manual_seed(0)
    heads = Heads().to(device).eval()
    pairs = read_pairs(shards)
    views = VIEWS
    if heads_file is not None:
        heads.load_state_dict(load_file(heads_file))
        views = 0
    features = features_of(Networks().to(device), pairs, views, device)
    seen = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)  # what it describes is replaced
    if heads_file is None:
        fit(heads, features, random.Random(0), device)
        tensors = {name: tensor.cpu() for name, tensor in heads.state_dict().items()}
        # save_file would make it readable by its owner only
        (out / "heads.safetensors").write_bytes(save(tensors))
    write_sidecars(pairs, features, heads, out, device)
    times = f"networks {seen - start:.0f} s, heads and sidecars {time.perf_counter() - seen:.0f} s"
    print(
        f"teacher: {out}, features of {len(pairs):,} images and {len(features.texts):,} captions; "
        f"{times}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", nargs="+", help="paths or patterns of shards that build.py wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("data/emoji-teacher"), help="folder of the sidecars"
    )
    parser.add_argument(
        "--heads", type=Path, help="trained heads of an earlier call: its OUT/heads.safetensors"
    )
    options = parser.parse_args(arguments)
    paths = set[str]()
    for pattern in options.shards:
        paths.update(glob.glob(pattern))
    shards = sorted(paths)
    if not shards:
        raise SystemExit(f"shards: expected at least one, got none by {' '.join(options.shards)}")
    if is_complete(shards, options.out):
        print(f"teacher: {options.out} is complete and is kept")
    else:
        teach(shards, options.out, options.heads)


if __name__ == "__main__":
    main()
