"""Batches whose images a GPU decodes: loader processes leave files and views to the process that trains."""

from __future__ import annotations

from typing import Any

import torch

from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.decode import decode_gpu
from simplclip.data.transforms import ImageTransform


def decoded(
    batch: dict[str, Any], transform: ImageTransform, device: torch.device, skipped: Skipped
) -> dict[str, Any] | None:
    """The batch with "image" on the device in the place of "encoded" and "view".

    Samples whose images turn out to be broken are taken out of the batch and counted; None if no sample is left.
    """
    files, views = batch["encoded"], batch["view"]
    images = decode_gpu(files, device, max_pixels=transform.max_pixels)
    for key, image in zip(batch["key"], images):
        if isinstance(image, BrokenSample):
            skipped.add(image.args[0], key, image.args[1])
    whole = [place for place, image in enumerate(images) if not isinstance(image, BrokenSample)]
    if not whole:
        return None
    rest = {name: value for name, value in batch.items() if name not in ("encoded", "view")}
    if len(whole) < len(files):
        rest = {n: v[whole] if isinstance(v, torch.Tensor) else [v[place] for place in whole] for n, v in rest.items()}
    return {"image": torch.stack([transform.render(images[place], views[place]) for place in whole]), **rest}
