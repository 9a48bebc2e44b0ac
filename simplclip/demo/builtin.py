"""The teacher called "builtin", which `simplclip.teacher` finds by an entry point, and the training of its heads on pairs."""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from timm.optim import param_groups_weight_decay
from torch import Tensor

from simplclip.common import hardware
from simplclip.common.progress import Progress
from simplclip.data import EmptyDataError, dataset_size, sources_of, tars
from simplclip.data.decode import to_tensor
from simplclip.data.errors import BrokenSample, Skipped
from simplclip.data.samples import parse, place_of
from simplclip.data.sidecars import Folders, zipped
from simplclip.data.transforms import ImageTransform
from simplclip.demo.teacher import IMAGE_SIZE, BuiltinTeacher, Heads, load_heads, save_heads, tokenizer, transform
from simplclip.losses import ClipPMLoss

STEPS = 200
BATCH = 512
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
VIEWS = 2  # augmented images of each image, in addition to the image itself
MAX_SCALE = 40.0  # with a sharper softmax the teacher would only tell which training pairs match


def load(path: str | os.PathLike) -> tuple[BuiltinTeacher, ImageTransform, Callable]:
    """Loads the teacher with the heads of a file, its transform and tokenizer. Raises the errors of `load_heads`."""
    return BuiltinTeacher(load_heads(path)), transform(), tokenizer()


def prepare(files: list[str], heads_file: Path, **options: Any) -> str:
    """Trains heads on `files` and saves them, unless `heads_file` exists. Returns a line about it for the user.

    If there are files named train*, only these files are used. options: as for `train`.
    """
    if heads_file.exists():
        return f"The built-in teacher uses the heads of {heads_file}"
    mine = [file for file in files if re.match(r"train\b|train[-_.\d]", Path(file).name)] or files
    trained, count = train(mine, **options)
    save_heads(trained, heads_file)
    return f"Trained the built-in teacher's heads on {count} pairs of {len(mine)} shards: {heads_file}"


@dataclass
class Pairs:
    """Features of n samples and of the m different captions among them."""

    images: Tensor  # float32 [1 + VIEWS, n, IMAGE_FEATURES]: of the images, then of augmented ones
    texts: Tensor  # float32 [m, TEXT_FEATURES]
    captions: list[list[int]]  # rows of `texts`, by sample
    groups: Tensor  # int64 [n]


def train(
    files: list[str],
    *,
    device: torch.device,
    precision: str,
    seed: int = 0,
    progress: bool = True,
    sidecars: Folders = (),
) -> tuple[Heads, int]:
    """Trains heads for the built-in teacher on the pairs of `files`; returns the heads and the number of pairs.

    Loss: contrastive, over batches of BATCH pairs with one view and one caption drawn for each. Pairs of one group are not
    each other's negatives. Equal seeds and threads give equal heads. Memory: 32 kB per pair and 1.5 kB per caption.
    Raises: ShardError, EmptyDataError if there are no two pairs of different groups.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = features(files, device, precision, progress, sidecars)
        return _fit(pairs, random.Random(seed), device, precision, progress), len(pairs.groups)


@torch.no_grad()
def features(files: list[str], device: torch.device, precision: str, progress: bool, sidecars: Folders = ()) -> Pairs:
    """Computes the frozen networks' features of all pairs. Augmentation draws from torch's global generator."""
    model, skipped = BuiltinTeacher(Heads()).to(device).eval(), Skipped()
    plain, augmented = transform(), ImageTransform(PreprocessCfg(IMAGE_SIZE, mean=(0.5,) * 3, std=(0.5,) * 3), "affine")
    images, rows, captions, groups = [], {}, [], []

    def usable():
        for source in sources_of(files):
            for files_of_key in tars.read(source, skipped, sidecars=partial(zipped, shard=source.url, folders=sidecars)):
                try:
                    sample = parse(files_of_key)
                    _ = sample.image
                except BrokenSample as broken:
                    skipped.add(broken.args[0], place_of(files_of_key), broken.args[1])
                else:
                    yield sample

    def all_views():
        for sample in usable():
            groups.append(sample.group_id)
            captions.append([rows.setdefault(text, len(rows)) for text in sample.captions])
            pixels = to_tensor(sample.image)
            views = [augmented.draw(*pixels.shape[1:]) for _ in range(VIEWS)]
            rendered = [plain.render(pixels, {}), *(augmented.render(pixels, view) for view in views)]
            yield rendered, [view["colour"] for view in views]

    with hardware.autocast(precision, device):
        for batch in _batches(all_views(), dataset_size(files), "images", progress):
            found = []
            for number, rendered in enumerate(zip(*(pixels for pixels, _ in batch))):
                colours = torch.tensor([colour[number - 1] for _, colour in batch]) if number else None
                view = plain.finish(torch.stack(rendered).to(device), colours)
                found.append(model.image_features(view).float().cpu())
            images.append(torch.stack(found))  # [1 + VIEWS, B, IMAGE_FEATURES]
        if len(set(groups)) < 2:
            raise EmptyDataError(f"{len(files)} shard(s), the first {files[0]!r}, have only one group; {skipped}")
        encode, order = tokenizer(), sorted(rows, key=lambda text: (len(text), text))
        texts = torch.empty(len(rows), model.heads.text.mean.numel())
        for part in _batches(iter(order), len(order), "captions", progress):
            texts[[rows[text] for text in part]] = model.text_features(encode(part).to(device)).float().cpu()
    return Pairs(torch.cat(images, 1), texts, captions, torch.tensor(groups))


def _batches(items: Iterator[Any], total: int | None, what: str, progress: bool) -> Iterator[list[Any]]:
    with Progress(what, total, unit=what, shown=progress) as bar:
        while batch := list(islice(items, 64)):
            yield batch
            bar.update(len(batch))


def _fit(pairs: Pairs, rng: random.Random, device: torch.device, precision: str, progress: bool) -> Heads:
    heads = Heads()
    for head, features in ((heads.image, pairs.images.flatten(0, 1)), (heads.text, pairs.texts)):
        head.mean.copy_(features.mean(0))
        head.std.copy_(features.std(0).clamp(min=1e-3))
    heads.to(device)
    images, texts, groups = (t.to(device) for t in (pairs.images, pairs.texts, pairs.groups))
    optimizer = torch.optim.AdamW(param_groups_weight_decay(heads, WEIGHT_DECAY), LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1, cycle_momentum=False)
    contrastive = ClipPMLoss(pm_weight=0)
    order: list[int] = []
    for _ in Progress("heads", STEPS, unit="steps", shown=progress).over(range(STEPS)):
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
