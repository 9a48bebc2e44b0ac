"""`simplclip data shrink`: writes shards anew with smaller images, which take less room and are decoded faster."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from simplclip.common.errors import InputError
from simplclip.data.broken import BrokenSample
from simplclip.data.decode import SCALES, decode, size_of
from simplclip.data.pool import cores, processes
from simplclip.data.report import measure
from simplclip.data.rewrite import Made, rewrite
from simplclip.data.shards import IMAGE_SUFFIXES, Pair, Shards, check_count

BATCH = 16  # images that a process gets at a time
FORMATS = {"jpg": ("JPEG", ("jpg", "jpeg")), "webp": ("WEBP", ("webp",))}  # option -> Pillow's name, suffixes


class Rules(NamedTuple):
    """The options that the result depends on."""

    short: int
    quality: int
    format: str


def run(
    shards: Shards,
    out: str | os.PathLike,
    *,
    short: int = 288,
    quality: int = 90,
    format: str = "jpg",
    workers: int | None = None,
    sample: int = 256,
    size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the samples of `shards` to shards in `out` with images whose short side is at most `short`.

    An image that is not larger is copied byte for byte, as is every other file, a teacher's features among them. A larger one
    is decoded as training sees it (transparency on white, 16 bits scaled to 8, EXIF's orientation ignored), resized by
    Lanczos' filter and encoded; its RGB colour profile is kept, EXIF is not. Broken samples are copied and counted. The bytes
    of the result depend on the input and on the options, not on `workers` or on how often the run was stopped. The input is
    only read.

    Args:
        shards, out: as for `rewrite`; shards that an earlier run finished are kept.
        short: most pixels of the short side.
        quality: of the encoder, 1 to 100.
        format: jpg or webp. An image of another format that becomes smaller gets a new suffix, unless its sample has several
            images: then it keeps its format.
        workers: number of processes, by default one for each core.
        sample, size: as for `report.run`: how decoding is measured before and after; sample 0 leaves it out.

    Returns the dict of `rewrite` with "bytes" and "images_per_second": [before, after] of the shards in `out`.

    Raises: the errors of `rewrite`; ProcessError if a process dies.
    """
    check_count("short", short, 1)
    check_count("sample", sample, 0)
    if not 1 <= quality <= 100:
        raise InputError(f"quality: expected 1 to 100, got {quality}")
    if format not in FORMATS:
        raise InputError(f"format: expected {' or '.join(FORMATS)}, got {format!r}")
    rules, names = Rules(short, quality, format), {}
    with processes(workers) as pool:

        def process(samples: list[Pair]) -> Future[Made]:
            return pool.submit(shrink_all, [(_suffixes(one), one.encoded) for one in samples], rules)

        options = {"batch_size": BATCH, "workers": workers or cores(), "title": "shrink", "progress": progress}
        summary = rewrite(shards, out, process, stamp={"shrink": rules._asdict()}, keep_features=True, **options)
        splits = json.loads(Path(summary["path"], "meta.json").read_text("utf-8"))["splits"].values()
        made = {name: entry for split in splits for name, entry in split["shards"].items()}
        names = {name: source for name, source in summary["sources"].items() if made[name]["samples"]}
        rates = None
        if sample and names:
            before = {source: made[name]["samples"] for name, source in names.items()}
            after = {str(Path(summary["path"], name)): made[name]["samples"] for name in names}
            rates = [pool.submit(measure, counts, sample, size).result()["images_per_second"] for counts in (before, after)]
    sizes = [sum(made[name]["source"]["bytes"] for name in names), sum(made[name]["bytes"] for name in names)]
    return summary | {"bytes": sizes, "images_per_second": rates}


def _suffixes(sample: Pair) -> list[str]:
    """Those of its images, first that of the one that is used."""
    return [suffix for suffix in IMAGE_SUFFIXES if suffix in sample.files]


def shrink_all(images: list[tuple[list[str], bytes]], rules: Rules) -> Made:
    """The new files of samples, given the suffixes of their images and the image that is used; what a process does."""
    return [_shrunk(suffixes, encoded, rules) for suffixes, encoded in images]


def _shrunk(suffixes: list[str], encoded: bytes, rules: Rules) -> Mapping[str, bytes | None] | BrokenSample:
    try:
        height, width = size_of(encoded)
        image = smaller(encoded, height, width, rules.short)
    except BrokenSample as broken:
        return broken
    if image is None:
        return {}
    suffix = suffixes[0]
    if suffix in FORMATS[rules.format][1]:
        return {suffix: encode(image, rules.format, rules.quality)}
    if len(suffixes) > 1:  # another name might change which of them is used
        return {suffix: encode(image, {"jpeg": "jpg"}.get(suffix, suffix), rules.quality)}
    return {suffix: None, rules.format: encode(image, rules.format, rules.quality)}


def smaller(encoded: bytes, height: int, width: int, short: int) -> Image.Image | None:
    """The image with this short side; None if it is not larger. Raises BrokenSample, also for such an image."""
    least = min(height, width)
    # Half the resolution that is left to the filter is enough for it; Pillow calls this a reducing gap of 2.
    scale = next((scale for scale in SCALES if least >= 2 * scale * short), 1)
    pixels = decode(encoded, scale=scale)
    if least <= short:
        return None
    size = tuple(max(short, round(side * short / least)) for side in (width, height))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    profile = Image.open(io.BytesIO(encoded)).info.get("icc_profile") or b""
    if profile[16:20] == b"RGB ":  # that of CMYK or grey would not fit any more
        image.info["icc_profile"] = profile
    return image


def encode(image: Image.Image, format: str, quality: int) -> bytes:
    file = io.BytesIO()
    options = {"jpg": {"quality": quality, "optimize": True}, "webp": {"quality": quality}}.get(format, {})
    image.save(file, FORMATS.get(format, (format.upper(),))[0], icc_profile=image.info.get("icc_profile"), **options)
    return file.getvalue()
