"""Trains the demo's teacher on the pairs of shards, and writes its features into sidecars.

    python examples/emoji/teach.py 'data/emoji/train-*.tar' --out data/emoji-teacher

A sidecar has the name of its shard, and for each sample KEY.teacher.npy: float16 [1 + C, WIDTH],
normalised rows of the image and of its C captions in order, and KEY.teacher.json with a digest of
these captions. meta.json names the teacher. A config takes them by `data.sidecars:
[data/emoji-teacher]`.

The frozen networks see each image and caption once (and VIEWS augmented images): what they make of
them trains the heads (teacher.py) and then becomes the features. For a teacher that is ready, e.g.
of open_clip, `simplclip teacher` does the rest.
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
from safetensors.torch import load_file, save
from teacher import WIDTH, Heads, Networks, tokenizer, transform
from timm.optim import param_groups_weight_decay
from torch import Tensor
from tqdm import tqdm

from simplclip.common import hardware
from simplclip.data.samples import TEACHER, TEACHER_JSON, digest_of
from simplclip.losses import ClipPMLoss

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


def read(shards: list[str]) -> list[Pair]:
    pairs = []
    for shard in shards:
        for sample in webdataset.WebDataset(os.path.abspath(shard), shardshuffle=False):
            record = json.loads(sample["json"])
            pairs.append(
                Pair(shard, sample["__key__"], sample["png"], record["captions"], record["group"])
            )
    return pairs


def augmented(images: Tensor) -> Tensor:
    """Turns, zooms and shifts each image a little, and changes its colours. images: [B, 3, S, S]
    from -1 to 1.
    """
    n = len(images)

    def drawn(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high)

    angle = drawn(-0.26, 0.26)
    zoom = drawn(0.87, 1.25)
    shift = drawn(-0.2, 0.2, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # what lies beyond the edges is white
    images = F.grid_sample(images - 1, grid, align_corners=False) + 1
    gain = drawn(0.7, 1.3, 1, 1, 1) * drawn(0.85, 1.15, 3, 1, 1)
    return ((images + 1) * gain - 1).clamp(-1, 1)


@torch.no_grad()
def features_of(
    networks: Networks, pairs: list[Pair], views: int, device: torch.device
) -> Features:
    precision, _ = hardware.pick_precision("auto", device)
    captions = {text for pair in pairs for text in pair.captions}
    # texts of one length together: less padding
    captions = sorted(captions, key=lambda text: (len(text), text))
    images, texts = [], []
    with hardware.autocast(precision, device):
        for start in tqdm(range(0, len(pairs), 64), "images", unit="batch"):
            part = pairs[start : start + 64]
            pixels = torch.stack(
                [transform(Image.open(io.BytesIO(pair.png)).convert("RGB")) for pair in part]
            )
            seen = [pixels, *(augmented(pixels) for _ in range(views))]
            images.append(
                torch.stack(
                    [networks.image_features(view.to(device)).float().cpu() for view in seen]
                )
            )
        for start in tqdm(range(0, len(captions), 256), "captions", unit="batch"):
            part = captions[start : start + 256]
            texts.append(networks.text_features(tokenizer(part).to(device)).float().cpu())
    rows = {text: row for row, text in enumerate(captions)}
    groups = {}
    for pair in pairs:
        groups.setdefault(pair.group, len(groups))
    return Features(
        torch.cat(images, 1),
        torch.cat(texts),
        [[rows[text] for text in pair.captions] for pair in pairs],
        torch.tensor([groups[pair.group] for pair in pairs]),
    )


def fit(heads: Heads, features: Features, rng: random.Random, device: torch.device) -> None:
    """Trains the heads: contrastive, with one view and one caption drawn for each pair of a
    batch.
    """
    for head, inputs in (
        (heads.image, features.images.flatten(0, 1)),
        (heads.text, features.texts),
    ):
        head.mean.copy_(inputs.mean(0))
        head.std.copy_(inputs.std(0).clamp(min=1e-3))
    heads.train().requires_grad_(True)
    images, texts, groups = (
        t.to(device) for t in (features.images, features.texts, features.groups)
    )
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(heads, WEIGHT_DECAY), LEARNING_RATE, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, STEPS, pct_start=0.1, cycle_momentum=False
    )
    contrastive = ClipPMLoss(pm_weight=0)
    order: list[int] = []
    for _ in tqdm(range(STEPS), "heads", unit="step"):
        if len(order) < min(BATCH, len(groups)):
            order += rng.sample(range(len(groups)), len(groups))
        batch, order = order[:BATCH], order[BATCH:]
        views = rng.choices(range(len(images)), k=len(batch))
        x = heads.image(images[views, batch])
        y = heads.text(texts[[rng.choice(features.captions[row]) for row in batch]])
        scale = heads.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, ids=groups[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    heads.eval().requires_grad_(False)
    heads.logit_scale.clamp_(max=torch.tensor(MAX_SCALE).log().item())


@torch.no_grad()
def write(
    pairs: list[Pair], features: Features, heads: Heads, out: Path, device: torch.device
) -> None:
    """Writes a sidecar of each shard, then meta.json."""
    x = F.normalize(heads.image(features.images[0].to(device)), dim=-1).cpu()
    y = F.normalize(heads.text(features.texts.to(device)), dim=-1).cpu()
    arrays = (
        torch.cat([x[i : i + 1], y[rows]]).half().numpy()
        for i, rows in enumerate(features.captions)
    )
    entries = {}
    for shard, grouped in groupby(zip(pairs, arrays), lambda sample: sample[0].shard):
        path, samples = out / Path(shard).name, list(grouped)
        with webdataset.TarWriter(f"{path}.unfinished", mtime=0) as writer:
            for pair, array in samples:
                np.save(file := io.BytesIO(), array)
                about = {"captions": digest_of(pair.captions)}
                writer.write({"__key__": pair.key, TEACHER: file.getvalue(), TEACHER_JSON: about})
        os.replace(f"{path}.unfinished", path)
        source = {"bytes": os.path.getsize(shard)}
        entries[path.name] = {
            "samples": len(samples),
            "bytes": path.stat().st_size,
            "source": source,
        }
    stamp = {
        "name": "emoji",
        "width": WIDTH,
        "logit_scale": heads.logit_scale.exp().item(),
        "dtype": "fp16",
    }
    meta = {"teacher": stamp, "splits": {"train": {"samples": len(pairs), "shards": entries}}}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def complete(shards: list[str], out: Path) -> bool:
    """Whether `out` has the sidecars of these shards from an earlier call."""
    if not (out / "meta.json").exists():
        return False
    entries = json.loads((out / "meta.json").read_text())["splits"]["train"]["shards"]
    sizes = {Path(shard).name: os.path.getsize(shard) for shard in shards}
    return sizes == {name: entry["source"]["bytes"] for name, entry in entries.items()}


def teach(shards: list[str], out: Path, heads_file: Path | None = None) -> None:
    """Trains the heads, or takes those of a file, and writes the sidecars of the shards."""
    device, start = hardware.pick_device(), time.perf_counter()
    torch.manual_seed(0)
    heads, pairs = Heads().to(device).eval(), read(shards)
    if heads_file is not None:
        heads.load_state_dict(load_file(heads_file))
    features = features_of(Networks().to(device), pairs, 0 if heads_file else VIEWS, device)
    seen = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    (out / "meta.json").unlink(missing_ok=True)  # what it describes is replaced
    if heads_file is None:
        fit(heads, features, random.Random(0), device)
        tensors = {name: tensor.cpu() for name, tensor in heads.state_dict().items()}
        # save_file would make it readable by its owner only
        (out / "heads.safetensors").write_bytes(save(tensors))
    write(pairs, features, heads, out, device)
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
    shards = sorted({path for pattern in options.shards for path in glob.glob(pattern)})
    if not shards:
        raise SystemExit(f"shards: expected at least one, got none by {' '.join(options.shards)}")
    if complete(shards, options.out):
        print(f"teacher: {options.out} is complete and is kept")
    else:
        teach(shards, options.out, options.heads)


if __name__ == "__main__":
    main()
