"""Trains the heads of the built-in teacher on pairs, from features that are computed once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor
from tqdm import tqdm

from simplclip import models
from simplclip.common import hardware
from simplclip.data import EmptyEpochError
from simplclip.data.shards import Shards, Skipped, count_samples, expand, read_shard, usable
from simplclip.demo.teacher import IMAGE_SIZE, BuiltinTeacher, Head, Heads, Transform, tokenizer
from simplclip.losses import ClipPMLoss

STEPS = 300
BATCH = 512
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
VIEWS = 3  # augmented images of each image, besides itself
MAX_SCALE = 40.0  # with a sharper softmax the teacher would only tell which training pairs match


@dataclass
class Pairs:
    """Features of n samples and of the m different captions among them."""

    images: Tensor  # float32 [1 + VIEWS, n, IMAGE_FEATURES]: of the images, then of augmented ones
    texts: Tensor  # float32 [m, TEXT_FEATURES]
    captions: list[list[int]]  # rows of `texts`, by sample
    groups: Tensor  # int64 [n]
    skipped: Skipped


def train(
    shards: Shards,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    progress: bool = True,
) -> tuple[Heads, int]:
    """Heads for the built-in teacher from the pairs of `shards`, and the number of these pairs.

    Loss: contrastive, over batches of BATCH pairs with one view and one caption drawn for each. Pairs of one group are not
    each other's negatives. Equal seeds and threads give equal heads. Memory: 45 kB per pair and 1.5 kB per caption.
    Raises: ValueError if shards match no file, ShardError, EmptyEpochError if there are no two pairs of different groups.
    """
    place = hardware.pick_device(str(device))
    precision, _ = hardware.pick_precision(precision, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = features(expand(shards), place, precision, progress)
        return _fit(pairs, random.Random(seed), place, precision, progress), len(pairs.groups)


@torch.no_grad()
def features(files: list[str], device: torch.device, precision: str, progress: bool, batch_size: int = 64) -> Pairs:
    """The frozen networks' features of all pairs. Augmentation draws from torch's global generator."""
    model, skipped = BuiltinTeacher(Heads()).to(device).eval(), Skipped()
    plain, augmented = Transform(), models.affine(PreprocessCfg(IMAGE_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3))
    images, rows, captions, groups = [], {}, [], []

    def all_views():
        for sample in usable((sample for file in files for sample in read_shard(file, skipped)), skipped):
            groups.append(sample.group)
            captions.append([rows.setdefault(text, len(rows)) for text in sample.captions])
            yield torch.stack([plain(sample.image), *(augmented(sample.image) for _ in range(VIEWS))])

    found = all_views()
    with (
        hardware.autocast(precision, device),
        tqdm(total=count_samples(files), desc="images", unit=" images", disable=None if progress else True) as bar,
    ):
        while batch := list(islice(found, batch_size)):
            views = torch.stack(batch, 1)  # [1 + VIEWS, B, 3, S, S]
            images.append(torch.stack([model.image_features(view.to(device)).float().cpu() for view in views]))
            bar.update(len(batch))
    if len(set(groups)) < 2:
        raise EmptyEpochError(f"{len(files)} shard(s), the first {files[0]!r}, have only one group; {skipped}")
    encode, order = tokenizer(), sorted(rows, key=lambda text: (len(text), text))
    texts = torch.empty(len(rows), model.heads.text.mean.numel())
    with (
        hardware.autocast(precision, device),
        tqdm(total=len(order), desc="captions", unit=" captions", disable=None if progress else True) as bar,
    ):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            texts[[rows[text] for text in part]] = model.text_features(encode(part).to(device)).float().cpu()
            bar.update(len(part))
    return Pairs(torch.cat(images, 1), texts, captions, torch.tensor(groups), skipped)


def _fit(pairs: Pairs, rng: random.Random, device: torch.device, precision: str, progress: bool) -> Heads:
    heads = Heads()
    _standardise(heads.image, pairs.images.flatten(0, 1))
    _standardise(heads.text, pairs.texts)
    heads.to(device)
    images, texts, groups = (t.to(device) for t in (pairs.images, pairs.texts, pairs.groups))
    decayed = [p for name, p in heads.named_parameters() if name.endswith("weight")]
    others = [p for name, p in heads.named_parameters() if not name.endswith("weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1, cycle_momentum=False)
    contrastive = ClipPMLoss(pm_weight=0)
    order: list[int] = []
    for _ in tqdm(range(STEPS), desc="heads", unit=" steps", disable=None if progress else True):
        if len(order) < min(BATCH, len(groups)):
            order += rng.sample(range(len(groups)), len(groups))
        rows, order = order[:BATCH], order[BATCH:]
        views, captions = rng.choices(range(len(images)), k=len(rows)), [rng.choice(pairs.captions[row]) for row in rows]
        with hardware.autocast(precision, device):
            x, y = heads.image(images[views, rows]), heads.text(texts[captions])
        scale = heads.logit_scale.exp().clamp(max=MAX_SCALE)
        loss = contrastive(F.normalize(x.float(), dim=-1), F.normalize(y.float(), dim=-1), scale, ids=groups[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        heads.logit_scale.clamp_(max=torch.tensor(MAX_SCALE).log().item())
    return heads.eval()


def _standardise(head: Head, features: Tensor) -> None:
    head.mean.copy_(features.mean(0))
    head.std.copy_(features.std(0).clamp(min=1e-3))
