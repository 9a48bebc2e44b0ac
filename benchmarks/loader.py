"""Images a second of this library's loader beside open_clip's, on any shards.

    python -m benchmarks.loader --shards 'shards/train-*.tar' --workers 2

The loaders take turns. Both read, decode, augment (a random crop of 0.9 to 1 of the image's area,
open_clip's default) and tokenize in loader processes, from which the main process takes batches.
The figure of a turn is that of its last `--seconds`; the medians are printed. open_clip's batches
are normalised float32; ours are uint8, which the device normalises.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from simplclip import data
from simplclip.data.transforms import ImageTransform

TOKENIZER = "ViT-B-32"


def simplclip_batches(options: argparse.Namespace) -> Iterator[int]:
    """Yields the sizes of the batches of this library's loader, which has no end."""
    loader = data.Loader(
        options.shards,
        tokenizer=open_clip.get_tokenizer(TOKENIZER),
        transform=ImageTransform(PreprocessCfg(options.size), {}),
        batch_size=options.batch,
        workers=options.workers,
        shuffle_buffer=1000,
    )
    for batch in loader:
        yield len(batch["image"])


def open_clip_batches(options: argparse.Namespace) -> Iterator[int]:
    """Yields the sizes of the batches of open_clip's loader, without an end too."""
    from open_clip_train import data as trainer
    from webdataset.tariterators import tar_file_expander

    # webdataset 1.0 marks the ends of shards, which this version of open_clip does not know.
    trainer.tar_file_expander = functools.partial(tar_file_expander, eof_value=None)
    arguments = SimpleNamespace(
        train_data="::".join(source.url for source in data.sources_of(options.shards)),
        train_num_samples=10**9,  # of an endless epoch
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=options.batch,
        workers=options.workers,
        world_size=1,
    )
    transform = image_transform_v2(PreprocessCfg(options.size), is_train=True)
    tokenizer = open_clip.get_tokenizer(TOKENIZER)
    dataset = trainer.get_wds_dataset(arguments, transform, is_train=True, tokenizer=tokenizer)
    for images, _ in dataset.dataloader:
        yield len(images)


LOADERS = {"simplclip": simplclip_batches, "open_clip": open_clip_batches}


def rate(batches: Iterator[int], workers: int, seconds: float) -> float:
    """Returns images a second, after the batches that workers prepare ahead."""
    for _ in range(3 * workers + 1):
        next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        count += next(batches)
    return count / elapsed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.loader", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shards", required=True, help="path, glob or brace pattern of tars")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--size", type=int, default=256, help="side of the training images")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each loader")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    for _ in range(options.repeats):
        for name, batches_of in LOADERS.items():
            batches = batches_of(options)
            rates[name].append(rate(batches, options.workers, options.seconds))
            batches.close()  # ends the workers
    for name, values in rates.items():
        print(f"{name}: {statistics.median(values):.0f} images/s, workers: {options.workers}")


if __name__ == "__main__":
    main()
