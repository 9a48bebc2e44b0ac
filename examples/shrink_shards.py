"""Copies WebDataset shards with smaller images, as JPEG; all else stays.

A repeated call goes on after the last whole shard.

    python examples/shrink_shards.py 'shards/*.tar' --out small --short 288

Decoding costs by the pixel, and a crop of 256 pixels needs no more than 288. While downloading,
img2dataset's --image_size does the same.
"""

import argparse
import glob
import io
import os
from multiprocessing import Pool
from pathlib import Path

import webdataset
from PIL import Image

SUFFIXES = {"jpg", "jpeg", "png", "webp"}


def smaller(encoded: bytes, short: int, quality: int) -> bytes | None:
    """Returns a JPEG with this short side; None for an image that is copied: small enough, damaged,
    or of 16 bits of grey.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    scale = short / min(image.size)
    if scale >= 1 or image.mode.startswith("I"):
        return None
    jpeg = io.BytesIO()
    size = [max(1, round(side * scale)) for side in image.size]
    # as open_clip
    image.resize(size, Image.Resampling.BICUBIC).convert("RGB").save(jpeg, "JPEG", quality=quality)
    return jpeg.getvalue()


def shrink(shard: str, out: Path, short: int, quality: int) -> None:
    target = out / Path(shard).name
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    with webdataset.TarWriter(str(unfinished), mtime=0) as writer:
        path = os.path.abspath(shard)
        for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False):
            suffixes = SUFFIXES & sample.keys()
            if len(suffixes) == 1:  # several would all become the one jpg
                suffix = suffixes.pop()
                jpeg = smaller(sample[suffix], short, quality)
                if jpeg is not None:
                    del sample[suffix]
                    sample["jpg"] = jpeg
            names = [name for name in sample if name == "__key__" or name[0] != "_"]
            writer.write({name: sample[name] for name in names})
    os.replace(unfinished, target)
    before, after = os.path.getsize(shard), os.path.getsize(target)
    print(f"{target}: {before:,} bytes before, {after:,} after", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", nargs="+", help="paths or patterns")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new shards")
    parser.add_argument(
        "--short", type=int, default=288, help="most pixels of the short side (default: 288)"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (default: 90)")
    options = parser.parse_args(arguments)
    paths = set[str]()
    for pattern in options.shards:
        paths.update(glob.glob(pattern) or [pattern])
    shards = sorted(paths)
    folders: dict[str, str] = {}  # of the shards, by name
    for shard in shards:
        if not os.path.isfile(shard):
            parser.error(f"shards: expected files, got {shard!r}, which is none")
        name = os.path.basename(shard)
        folder = os.path.realpath(os.path.dirname(shard))
        if folder == os.path.realpath(options.out):
            parser.error(f"--out: expected another folder than that of {shard!r}")
        if folders.setdefault(name, folder) != folder:
            parser.error(f"shards: expected files of different names, got two {name!r}")
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [(shard, options.out, options.short, options.quality) for shard in shards]
    with Pool() as pool:
        pool.starmap(shrink, tasks, chunksize=1)


if __name__ == "__main__":
    main()
