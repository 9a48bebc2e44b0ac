"""`simplclip data shrink`: writes shards anew with smaller images, which take less room and are decoded faster."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from PIL import Image

from simplclip.common.errors import InputError
from simplclip.data.broken import BrokenSample
from simplclip.data.decode import SCALES, decode, size_of
from simplclip.data.pool import cores, processes
from simplclip.data.rewrite import Made, rewrite
from simplclip.data.shards import IMAGE_SUFFIXES, Pair, Shards, check_count
from simplclip.data.sidecars import entries

BATCH = 16  # images that a process gets at a time


def run(
    shards: Shards,
    out: str | os.PathLike,
    *,
    short: int = 288,
    quality: int = 90,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the samples of `shards` to shards in `out` with images whose short side is at most `short`.

    An image that is not larger is copied byte for byte, as is every other file, a teacher's features among them. A larger one
    is decoded as training sees it (transparency on white, 16 bits scaled to 8, EXIF's orientation ignored), resized by
    Lanczos' filter and encoded as JPEG of `quality` 1 to 100; its RGB colour profile is kept, EXIF is not. Broken samples are
    copied and counted. The bytes of the result depend on the input, `short` and `quality`, not on `workers`, the number of
    processes (by default one for each core), or on how often the run was stopped. The input is only read.

    Returns the dict of `rewrite` with "bytes": [before, after] of the shards in `out`.

    Raises: the errors of `rewrite`; ProcessError if a process dies.
    """
    check_count("short", short, 1)
    if not 1 <= quality <= 100:
        raise InputError(f"quality: expected 1 to 100, got {quality}")
    with processes(workers) as pool:

        def process(samples: list[Pair]) -> Future[Made]:
            return pool.submit(shrink_all, [(_suffix(one), one.encoded) for one in samples], short, quality)

        stamp = {"shrink": {"short": short, "quality": quality, "format": "jpg"}}  # earlier versions wrote WebP too
        options = {"batch_size": BATCH, "workers": workers or cores(), "title": "shrink", "progress": progress}
        summary = rewrite(shards, out, process, stamp=stamp, **options)  # type: ignore[arg-type]
    made = entries(summary["path"])
    names = [name for name in summary["sources"] if made[name]["samples"]]
    sizes = [sum(made[name]["source"]["bytes"] for name in names), sum(made[name]["bytes"] for name in names)]
    return summary | {"bytes": sizes}


def _suffix(sample: Pair) -> str:
    """Returns the suffix of the image that readers use."""
    return next(suffix for suffix in IMAGE_SUFFIXES if suffix in sample.files)


def shrink_all(images: list[tuple[str, bytes]], short: int, quality: int) -> Made:
    """Returns the new files of samples, given the suffixes and files of their images. It runs in a process of the pool."""
    return [_shrunk(suffix, encoded, short, quality) for suffix, encoded in images]


def _shrunk(suffix: str, encoded: bytes, short: int, quality: int) -> Mapping[str, bytes | None] | BrokenSample:
    try:
        image = smaller(encoded, short)
    except BrokenSample as broken:
        return broken
    if image is None:
        return {}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, optimize=True, icc_profile=image.info.get("icc_profile"))
    # Readers use jpg first of a sample's images, so they use the new image as they used the one that it replaces.
    return {suffix: file.getvalue()} if suffix in ("jpg", "jpeg") else {suffix: None, "jpg": file.getvalue()}


def smaller(encoded: bytes, short: int) -> Image.Image | None:
    """Returns the image resized to this short side; None if it is not larger. Raises BrokenSample in both cases."""
    height, width = size_of(encoded)
    least = min(height, width)
    # The filter needs only twice the final resolution; the decoder does the rest. Pillow calls this a reducing gap of 2.
    scale = next((scale for scale in SCALES if least >= 2 * scale * short), 1)
    pixels = decode(encoded, scale=scale)
    if least <= short:
        return None
    size = [max(short, round(side * short / least)) for side in (width, height)]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((size[0], size[1]), Image.Resampling.LANCZOS)
    profile = Image.open(io.BytesIO(encoded)).info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":  # a profile of CMYK or grey would no longer fit
        image.info["icc_profile"] = profile
    return image
