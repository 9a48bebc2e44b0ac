"""Images a second of this library's loader beside open_clip's, on any shards.

python -m benchmarks.loader --make FOLDER          # test shards: 512-pixel JPEGs of 37 KiB
python -m benchmarks.loader --shards 'FOLDER/*.tar' --workers 1,2

The loaders take turns. Both read, decode, augment (a random crop of 0.9 to 1 of the image's area,
open_clip's default) and tokenize in loader processes, from which the main process takes batches.
The figure of a repeat is that of its last `--seconds`. open_clip's batches are normalised float32;
ours are uint8, which the device normalises. The last line is one JSON object: images a second with
one worker.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from webdataset import TarWriter

from benchmarks.results_file import describe, result_path, table, write_csv
from simplclip import data
from simplclip.data.transforms import ImageTransform

SIDE, QUALITY = 512, 88
TOKENIZER = "ViT-B-32"


def simplclip_batches(shards: str, size: int, workers: int, batch: int) -> Iterator[int]:
    """Returns the sizes of the batches of this library's loader, which has no end."""
    loader = data.Loader(
        shards,
        tokenizer=open_clip.get_tokenizer(TOKENIZER),
        transform=ImageTransform(PreprocessCfg(size), {}),
        batch_size=batch,
        workers=workers,
        shuffle_buffer=1000,
    )
    return (len(batch["image"]) for batch in loader)


def open_clip_batches(shards: str, size: int, workers: int, batch: int) -> Iterator[int]:
    from open_clip_train import data as trainer
    from webdataset.tariterators import tar_file_expander

    # webdataset 1.0 marks the ends of shards, which this version of open_clip does not know.
    trainer.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    arguments = SimpleNamespace(
        train_data="::".join(source.url for source in data.sources_of(shards)),
        train_num_samples=10**9,  # of an endless epoch
        train_data_upsampling_factors=None,
        dataset_resampled=True,  # does not end with the shards, as ours
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    transform = image_transform_v2(PreprocessCfg(size), is_train=True)
    tokenizer = open_clip.get_tokenizer(TOKENIZER)
    dataset = trainer.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, _ in dataset.dataloader:
        yield len(images)


LOADERS: dict[str, Callable[..., Iterator[int]]] = {
    "simplclip": simplclip_batches,
    "open_clip": open_clip_batches,
}


def rate(batches: Iterator[int], workers: int, seconds: float) -> tuple[float, float]:
    """Returns images a second, and images a second of the workers' processor time.

    A busy machine changes the latter less. Measures after the batches that workers prepare ahead.
    """
    for _ in range(3 * workers + 1):
        next(batches)
    start = time.perf_counter()
    processor_start = processor_seconds()
    count, elapsed = 0, 0.0
    while elapsed < seconds:
        count += next(batches)
        elapsed = time.perf_counter() - start
    processor_elapsed = processor_seconds() - processor_start
    batches.close()  # ends the workers
    return count / elapsed, count / processor_elapsed


def processor_seconds() -> float:
    """Returns the processor time of this process' children, which are the workers."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in kernel mode
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    shards: str, size: int, workers: list[int], batch: int, seconds: float, repeats: int
) -> dict[str, float]:
    """Prints a table and writes it to benchmarks/results. Returns the rates with one worker."""
    rates: dict[tuple[int, str], list[tuple[float, float]]] = {
        (count, name): [] for count in workers for name in LOADERS
    }
    for _ in range(repeats):
        for count, name in rates:
            batches = LOADERS[name](shards, size, count, batch)
            rates[count, name].append(rate(batches, count, seconds))
    medians = {}
    for key, values in rates.items():
        medians[key] = [statistics.median(column) for column in zip(*values)]
    rows = []
    for (count, name), values in rates.items():
        wall, processor = medians[count, name]
        base_wall, base_processor = medians[count, "open_clip"]
        wall_rates = [value for value, _ in values]
        row = {
            "form": name,
            "workers": count,
            "images_per_s": round(wall),
            "least": round(min(wall_rates)),
            "most": round(max(wall_rates)),
            "times": round(wall / base_wall, 2),
            "repeats": repeats,
            "per_processor_s": round(processor),
            "times_of_it": round(processor / base_processor, 2),
        }
        rows.append(row)
    where = describe()
    write_csv(result_path("loader", where), [row | where for row in rows])
    print(f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}")
    print(f"{shards}: to {size} pixels, in batches of {batch}; `times` open_clip's images")
    print("\n".join(table(rows)))
    return {name: round(medians[1, name][0], 1) for name in LOADERS}


def make(folder: Path, count: int, shards: int = 4) -> None:
    """Writes shards of JPEGs whose spectrum is that of photographs, about 37 KiB each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with TarWriter(str(folder / f"photos-{shard:06d}.tar")) as tar:
            for number in range(shard, count, shards):
                image = io.BytesIO()
                _picture(rng).save(image, "JPEG", quality=QUALITY)
                caption = f"a noise of many frequencies, number {number}"
                tar.write({"__key__": f"{number:06d}", "jpg": image.getvalue(), "txt": caption})
    print(f"wrote {count} images to {folder}/photos-*.tar")


def _picture(rng: np.random.Generator) -> Image.Image:
    total = np.zeros((SIDE, SIDE, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64, 128, 256):
        noise = rng.random((cells, cells, 3), np.float32) * 0.4
        noise += rng.random((cells, cells, 1), np.float32) * 0.6
        channels = [
            Image.fromarray(noise[..., i]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for i in range(3)
        ]
        total += np.stack(channels, -1) * cells**-0.62
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", help="path, glob or brace pattern of tars with jpg, png or webp, and txt"
    )
    parser.add_argument(
        "--make", type=Path, metavar="FOLDER", help="write test shards and, without --shards, end"
    )
    parser.add_argument("--count", type=int, default=2000, help="images of --make")
    parser.add_argument(
        "--workers", default="1,2", help="numbers of loader processes, comma-separated, beside one"
    )
    parser.add_argument("--size", type=int, default=256, help="side of the training images")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument(
        "--repeats", type=int, default=5, help="interleaved measurements of each loader"
    )
    options = parser.parse_args()
    if options.make:
        make(options.make, options.count)
    if options.shards:
        torch.set_num_threads(1)
        logging.disable(logging.WARNING)
        workers = sorted({1, *map(int, options.workers.split(","))})
        how = options.batch, options.seconds, options.repeats
        print(json.dumps(measure(options.shards, options.size, workers, *how)))
    elif not options.make:
        parser.error("expected --shards PATTERN or --make FOLDER")


if __name__ == "__main__":
    main()
