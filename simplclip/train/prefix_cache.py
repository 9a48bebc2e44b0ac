"""The cache data.cache_prefix: outputs of the image tower's frozen prefix, in sidecars that are read in place of images.

    FOLDER/train-000000.tar     KEY.prefix.npy, float16 [k, C, H, W]: of the k views that the teacher saw, or of the image
    FOLDER/meta.json            "prefix": the stamp, which says from what prefix, precision, pixels and views they were made

The outputs are made before the first step, shard by shard, by `data.rewrite`. Later runs use them if their prefix, views and
images are the same; another run is refused.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simplclip import data
from simplclip.common import hardware
from simplclip.common.errors import InputError
from simplclip.data.broken import BrokenSample
from simplclip.data.rewrite import rewrite
from simplclip.data.shards import Pair, count_samples, parse
from simplclip.data.sidecars import PREFIX, beside, entries, plain_name
from simplclip.data.tar import MAX_BYTES
from simplclip.data.transforms import ImageTransform, augmentation
from simplclip.models.frozen import FrozenParts
from simplclip.train.config import ConfigError
from simplclip.train.settings import Config

AT_ONCE = 64  # images that the prefix gets at a time
_KEY = "data.cache_prefix"
Prefix: Any = None  # gone from models; this file goes with the trainer's rewriting


def prefix_of(config: Config, frozen: FrozenParts, transform: Any, teacher: dict[str, Any] | None, context: Any) -> Prefix:
    """Returns the prefix whose outputs are cached; from now on the model takes these outputs in training mode.

    context: the run's autocast. Raises ConfigError if pixels change from epoch to epoch, or the tower has no frozen prefix.
    """
    if not (teacher and "views" in teacher) and augmentation(transform) != "none":
        raise ConfigError(
            f"{_KEY}: expected images whose pixels do not change, got the augmentation {augmentation(transform)!r}; "
            "store views by `simplclip teacher --views` and train with that teacher, or set data.augment=none"
        )
    if not isinstance(transform, ImageTransform):
        raise ConfigError(f"{_KEY}: expected simplclip's ImageTransform, got {transform!r}")
    noise = torch.rand(1, 3, *transform.size, generator=torch.Generator().manual_seed(0))
    device = next(frozen.model.parameters()).device
    try:
        with context:
            prefix = Prefix(frozen, noise.to(device))
    except InputError as error:
        raise ConfigError(f"{_KEY}: {error}; only what `inherit` froze can be cached") from None
    prefix.replace()
    return prefix


class PrefixCache:
    """The folder of a run's cached outputs. training: a `Training` with a prefix."""

    def __init__(self, training: Any) -> None:
        c = training.config.data
        self.training, self.prefix, self.sidecars = training, training.prefix, c.sidecars
        self.folder = Path(c.cache_prefix).expanduser()
        self.transform, self.max_bytes = copy.copy(training.transform), c.options.get("max_bytes", MAX_BYTES)
        self.transform.max_pixels = c.options.get("max_pixels")
        self.views = (training.teacher or {}).get("views")
        parts = data.parts_of(c.train, "data.train")
        for part in parts:
            if not part.is_local_tar:
                raise ConfigError(f"{_KEY}: expected local tars, beside which sidecars can lie, got {part.url!r}")
        self.shards = list(dict.fromkeys(part.url for part in parts))
        t = self.transform
        pixels = {"size": t.size, "mean": t.mean, "std": t.std, "max_pixels": t.max_pixels, "max_bytes": self.max_bytes}
        if self.views is None:
            pixels |= {"interpolation": t.interpolation.value, "resize_mode": t.resize_mode, "fill": t.fill}
        stamp = {"output_of": self.prefix.name, "shape": self.prefix.shape, "weights": self.prefix.fingerprint()}
        stamp |= {"precision": training.precision, "pixels": pixels, "views": self.views}
        self.stamp = json.loads(json.dumps(stamp))

    @property
    def complete(self) -> bool:
        """Whether the folder has the outputs of all shards, judged by the stamp and by the sizes of the files involved."""
        made = entries(self.folder)
        return self._stamped() == self.stamp and all(self._made(shard, made) for shard in self.shards)

    def _stamped(self) -> Any:
        try:
            return json.loads((self.folder / "meta.json").read_text("utf-8"))["prefix"]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _made(self, shard: str, made: dict[str, dict[str, Any]]) -> bool:
        entry = made.get(plain_name(shard), {})
        joined = [one["bytes"] for one in entry.get("sidecars", [])]
        path = self.folder / plain_name(shard)
        return (
            bool(entry)
            and path.is_file()
            and path.stat().st_size == entry["bytes"]
            and os.path.getsize(shard) == entry["source"]["bytes"]
            and [os.path.getsize(sidecar) for sidecar in beside(shard, self.sidecars)] == joined
        )

    def make(self, show: Callable[[str], None]) -> None:
        """Makes the missing outputs. Raises ConfigError for a folder of another prefix, or on a full disk."""
        count = self.views["number"] if self.views else 1
        shape = " x ".join(map(str, self.prefix.shape))
        size, samples = 2 * math.prod(self.prefix.shape), count_samples(self.shards)
        total = "" if samples is None else f", {size * count * sum(samples) / 2**20:,.1f} MiB for {sum(samples):,} samples"
        what = f"{self.prefix.name}, {shape} in fp16: {size / 1024:,.1f} KiB a view, {count} a sample{total}"
        show(f"prefix     training reads the output of {what}, in {self.folder}; no image is decoded")
        if self.complete:
            return
        try:
            options = {"sidecar": True, "sidecars": self.sidecars, "batch_size": max(1, AT_ONCE // count), "title": "prefix"}
            options["max_bytes"] = self.max_bytes
            done = rewrite(self.shards, self.folder, self._process, stamp={"prefix": self.stamp}, **options)
        except (InputError, FileExistsError) as error:
            raise ConfigError(f"{_KEY}: {str(error).removeprefix('out: ')}") from None
        show(f"prefix     made {done['written']} of {done['shards']} shards; {done['skipped']}")

    def _process(self, samples: list[Pair]) -> list[dict[str, bytes | None] | BrokenSample]:
        found: list[Any] = []
        images: list[Tensor] = []
        colours: list[list[float] | None] = []
        for sample in samples:
            try:
                views = (parse(sample.files, teacher=True, max_bytes=self.max_bytes).views if self.views else None) or [{}]
                pixels = [self.transform.apply(sample.encoded, view) for view in views]
            except BrokenSample as broken:
                found.append(broken)
                continue
            found.append(len(views))
            images += pixels
            colours += [view.get("colour") for view in views]
        outputs = iter(self._outputs(images, colours))
        return [n if isinstance(n, BrokenSample) else {PREFIX: self._npy([next(outputs) for _ in range(n)])} for n in found]

    def _outputs(self, images: list[Tensor], colours: list[list[float] | None]) -> list[Tensor]:
        training, outputs = self.training, []
        for start in range(0, len(images), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            batch = {"image": torch.stack(images[part])}
            if colours[start] is not None:
                batch["colour"] = torch.tensor(colours[part])
            with torch.no_grad(), hardware.autocast(training.precision, training.device):
                outputs += self.prefix(training.pixels(batch)).half().cpu().contiguous()
        return outputs

    def _npy(self, outputs: list[Tensor]) -> bytes:
        array = torch.stack(outputs).numpy()
        if not np.isfinite(array).all():
            raise InputError(f"expected outputs of {self.prefix.name} in the range of fp16, got larger ones; set it to null")
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        return file.getvalue()
