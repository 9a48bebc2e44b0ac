"""`simplclip data report`: what shards hold, and what it costs to read them; a table, report.json and report.png."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from simplclip.common import plotting
from simplclip.common.errors import visible
from simplclip.common.files import write_atomically
from simplclip.common.progress import Progress
from simplclip.data import index
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.epoch import seeded
from simplclip.data.indexing import look, skipped_of, tables
from simplclip.data.pairs import expand
from simplclip.data.pool import cores, ordered, processes
from simplclip.data.shards import ShardError, Shards, check_count, parse, place_of, read_shard, stable_hash
from simplclip.data.transforms import ImageTransform

SPREAD = 32  # the sample of images comes from at most so many shards
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
# what is counted -> its unit; of images, the last two of captions
MEASURES = {"short side": "px", "image file": "KiB", "captions an image": "", "caption": "characters", "tokens": "tokens"}


@dataclass
class Summary:
    """What some shards hold; sums of summaries take no more memory than one, but for the keys' 8 bytes a sample."""

    samples: int = 0
    bytes: int = 0
    indexed: int = 0
    decoded: int = 0  # samples of shards whose index was made with every image decoded
    values: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in MEASURES})
    sums: Counter[str] = field(default_factory=Counter)  # bytes and pixels of all images
    formats: Counter[str] = field(default_factory=Counter)
    broken: Skipped = field(default_factory=Skipped)

    def add(self, other: Summary) -> None:
        self.samples += other.samples
        self.bytes += other.bytes
        self.indexed += other.indexed
        self.decoded += other.decoded
        for name, counts in other.values.items():
            self.values[name].update(counts)
        self.sums.update(other.sums)
        self.formats.update(other.formats)
        self.broken.merge(other.broken)


def run(
    shards: Shards,
    *,
    out: str | os.PathLike | None = None,
    sample: int = 512,
    size: int = 256,
    batch_size: int = 1024,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Report on shards, by their indices where they fit, else by reading headers and captions; `out` is all that is written.

    Args:
        shards: as for `make_loader`; shards that cannot be read are named in the report.
        out: a folder for report.json and report.png.
        sample: number of images that are decoded for training on one core, to measure how long an epoch takes; 0 for none.
        size: side of the images that training makes, S.
        batch_size: of the epoch's length.
        workers: number of processes, by default one for each core.

    Returns the object that report.json holds.
    """
    check_count("sample", sample, 0)
    check_count("batch_size", batch_size, 1)
    files = expand(shards)
    total, hashes, unreadable, counts = Summary(), [], {}, {}
    with processes(workers) as pool:
        with Progress("report", len(files), unit="shards", shown=progress) as bar:
            for file, found in ordered(partial(pool.submit, summarise), files, 2 * (workers or cores())):
                bar.update()
                if isinstance(found, str):
                    unreadable[file] = found
                    continue
                total.add(found[0])
                hashes.append(found[1])
                counts[file] = found[0].samples
        measured = pool.submit(measure, counts, sample, size).result() if sample and total.samples else None
    report = _report(total, files, unreadable, measured, batch_size)
    report["duplicate_keys"] = _duplicates(list(counts), hashes)
    report["img2dataset"] = _differing(counts)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out, "report.json"), json.dumps(report, indent=1) + "\n")
        plotting.write(picture(report), Path(out, "report.png"))
    return report


def summarise(shard: str) -> tuple[Summary, np.ndarray] | str:
    """The summary of one shard and the hashes of its keys, uint64 [samples]; or why it cannot be read."""
    try:
        known = index.statistics(shard)
        about, arrays = known or tables(look(shard))
    except ShardError as error:
        return str(error)
    keys = index.split(arrays["keys"])
    summary = Summary(about["samples"], about["shard"]["bytes"], known is not None, about["decoded"] and about["samples"])
    seen = arrays["width"] > 0
    width, height, size = (arrays[name][seen].astype(np.int64) for name in ("width", "height", "bytes"))
    summary.values["short side"].update(np.minimum(width, height).tolist())
    summary.values["image file"].update((-(-size // 1024)).tolist())
    summary.values["captions an image"].update(arrays["captions"][arrays["captions"] > 0].tolist())
    summary.values["caption"].update(arrays["characters"].tolist())
    summary.values["tokens"].update(arrays["tokens"].tolist() if "tokens" in arrays else [])
    summary.sums.update({"bytes": int(size.sum(dtype=float)), "pixels": int((width * height).sum(dtype=float))})
    summary.formats.update(about["formats"][number] for number in arrays["format"][seen].tolist())
    summary.broken = skipped_of(about)
    return summary, np.array([stable_hash(key) for key in keys], np.uint64)


def measure(counts: Mapping[str, int], number: int, size: int) -> dict[str, Any]:
    """Decodes about `number` images, spread over shards with `counts` samples, as training does; on this core alone."""
    from open_clip.transform import AugmentationCfg, PreprocessCfg

    transform = ImageTransform(PreprocessCfg(size=size), AugmentationCfg())
    filled = [file for file, count in counts.items() if count]
    chosen = [filled[i * len(filled) // min(SPREAD, len(filled))] for i in range(min(SPREAD, len(filled)))]
    each = -(-number // len(chosen))
    skipped, opened = Skipped(), []
    for file in chosen:
        samples = islice(read_shard(file, Skipped()), 0, None, max(1, counts[file] // each))
        for sample in islice(samples, min(each, number - len(opened) - skipped.counts.total())):
            try:
                opened.append(parse(sample))
            except BrokenSample as broken:
                skipped.add(broken.args[0], place_of(sample), broken.args[1])
    seconds = decoded = 0.0
    with seeded("report"):
        for place, one in enumerate((*opened[:8], *opened)):  # the first ones twice: to warm up
            began = time.process_time()  # of a core, whatever else the machine does
            try:
                transform(one.encoded)
            except BrokenSample as broken:
                if place >= len(opened[:8]):
                    skipped.add(broken.args[0], one.place, broken.args[1])
            else:
                if place >= len(opened[:8]):
                    decoded += 1
                    seconds += time.process_time() - began
    rate = decoded / seconds if seconds else 0.0
    broken = {reason: [count, skipped.examples[reason]] for reason, count in skipped.counts.items()}
    return {"images": int(decoded), "size": size, "images_per_second": _rounded(rate), "broken": broken}


def _report(
    total: Summary, files: list[str], unreadable: dict[str, str], measured: dict[str, Any] | None, batch_size: int
) -> dict[str, Any]:
    broken = {reason: [count, total.broken.examples[reason]] for reason, count in total.broken.counts.most_common()}
    images = sum(total.formats.values())
    report: dict[str, Any] = {
        "shards": len(files),
        "unreadable": unreadable,
        "indexed": total.indexed,
        "decoded": total.decoded,
        "samples": total.samples,
        "bytes": total.bytes,
        "images": images,
        "image_bytes": total.sums["bytes"],
        "megapixels_an_image": round(total.sums["pixels"] / 1e6 / images, 3) if images else None,
        "formats": dict(total.formats.most_common()),
        "broken": broken,
        "quantiles": {
            name: {label: quantile(counts, share) for label, share in QUANTILES.items()}
            for name, counts in total.values.items()
            if counts
        },
        "histograms": {name: histogram(name, counts) for name, counts in total.values.items() if counts},
        "epoch": {"batch_size": batch_size, "batches": total.samples // batch_size},
        "decoding": measured,
    }
    if measured and measured["images_per_second"]:
        hours = total.samples / measured["images_per_second"] / 3600
        have = cores()
        measured |= {"core_hours_an_epoch": _rounded(hours), "cores": have, "hours_an_epoch": _rounded(hours / have)}
    return report


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The least value that at least this share of what was counted does not exceed."""
    values = sorted(counts)
    sums = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(sums, max(1, math.ceil(share * sums[-1]))))]


def histogram(name: str, counts: Mapping[int, int]) -> dict[str, list]:
    """Bins with round edges, and how many values each holds: those of an edge belong to the bin above."""
    least, most = min(counts), max(counts)
    if name == "image file":
        edges = 2.0 ** (np.arange(math.floor(2 * math.log2(max(1, least))), math.ceil(2 * math.log2(most + 1)) + 1) / 2)
    else:
        end = most + 1 if name == "captions an image" else max(quantile(counts, 0.995) + 1, least + 1)
        step = max(1, next(step for i in range(10) for step in (10**i, 2 * 10**i, 5 * 10**i) if (end - least) / step <= 40))
        edges = np.arange(least // step * step, end + step, step, dtype=float)
    values = np.minimum(np.array(list(counts)), edges[-1] - 1e-9)  # the last bin takes all above it
    found, _ = np.histogram(values, edges, weights=np.array(list(counts.values())))
    return {"edges": [round(float(edge), 3) for edge in edges], "counts": [int(count) for count in found]}


def _duplicates(files: list[str], hashes: list[np.ndarray]) -> dict[str, Any]:
    """Keys that occur more than once, in a shard and in all of them; and one of them."""
    found: dict[str, Any] = {"in_a_shard": 0, "in_all_shards": 0, "first": None}
    if not hashes:
        return found
    found["in_a_shard"] = sum(len(of_shard) - len(np.unique(of_shard)) for of_shard in hashes)
    known, counts = np.unique(np.concatenate(hashes), return_counts=True)
    found["in_all_shards"] = int((counts - 1).sum())
    if (counts > 1).any():
        wanted = known[counts > 1]
        file, of_shard = next((file, of_shard) for file, of_shard in zip(files, hashes) if np.isin(of_shard, wanted).any())
        place = int(np.flatnonzero(np.isin(of_shard, wanted))[0])
        found["first"] = visible(place_of(next(islice(read_shard(file, Skipped()), place, None))))
    return found


def _differing(counts: Mapping[str, int]) -> dict[str, list[int]]:
    """Shards of which img2dataset's NAME_stats.json says another number of images: shard -> [it says, there are]."""
    found = {}
    for file, count in counts.items():
        try:
            said = int(json.loads(Path(file.removesuffix(".tar") + "_stats.json").read_text("utf-8"))["successes"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if said != count:
            found[file] = [said, count]
    return found


def picture(report: Mapping[str, Any]) -> Any:
    """Histograms of the images' short sides and files, of captions an image and their lengths."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    words = "tokens" if "tokens" in report["histograms"] else "caption"
    shown = {
        "short side": "Short side of images (pixels)",
        words: "Length of captions (CLIP's tokens)" if words == "tokens" else "Length of captions (characters)",
        "captions an image": "Captions an image",
        "image file": "Image files (KiB)",
    }
    figure = plotting.new_figure(10, 6.6)
    axes = figure.subplots(2, 2)
    for axis, colour, (name, title) in zip(axes.flat, plotting.COLOURS, shown.items()):
        plotting.style(axis, title)
        axis.grid(False, axis="x")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        if name not in report["histograms"]:
            axis.text(0.5, 0.5, "none", transform=axis.transAxes, ha="center", color=plotting.MUTED)
            continue
        edges, counts = (np.array(report["histograms"][name][part]) for part in ("edges", "counts"))
        axis.set_ylim(0, max(counts) * 1.18)
        if len(counts) == 1:  # all are alike: their values instead of a scale
            least, most = (report["quantiles"][name][which] for which in ("least", "most"))
            axis.bar([0], counts, 0.4, color=colour)
            axis.set_xlim(-1.5, 1.5)
            axis.set_xticks([0], [f"{least:,}" if least == most else f"{least:,} to {most:,}"])
            continue
        if name == "captions an image":
            edges = edges - 0.5
            axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        gap = 0.4 if name == "captions an image" and len(counts) <= 12 else 0.0
        widths = np.diff(edges) * (1 - gap)
        axis.bar(edges[:-1] + gap / 2, counts, widths, align="edge", color=colour, edgecolor="white", linewidth=0.6)
        if report["quantiles"][name]["most"] > edges[-1]:
            place = ((edges[-2] + edges[-1]) / 2, counts[-1])
            axis.annotate(
                f"{edges[-2]:,.0f}+", place, (0, 2), textcoords="offset points", ha="center", color=plotting.MUTED, fontsize=8
            )
        if name == "image file":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.minorticks_off()
        middle = report["quantiles"][name]["median"]
        axis.axvline(middle, ymax=0.985, color=plotting.INK, linewidth=1, linestyle=(0, (3, 3)))
        right = middle > (np.sqrt(edges[0] * edges[-1]) if name == "image file" else (edges[0] + edges[-1]) / 2)
        axis.annotate(
            f"median {middle:,}", (middle, 1), (-5 if right else 5, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="right" if right else "left", va="top", color=plotting.INK, fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    figure.suptitle(_headline(report), x=0.02, ha="left", color=plotting.INK, fontsize=12.5)
    figure.tight_layout(rect=(0.005, 0, 0.995, 0.97), h_pad=2, w_pad=2)
    return figure


def _headline(report: Mapping[str, Any]) -> str:
    broken = sum(count for count, _ in report["broken"].values())
    shards = f"{report['shards']:,} shard{'s' if report['shards'] != 1 else ''}"
    return f"{report['samples']:,} samples in {shards}, {size_text(report['bytes'])}" + (
        f"; {broken:,} broken" * bool(broken)
    )


def short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{int(size)} B"
        size /= 1000
    return f"{size:.3g} TB"
