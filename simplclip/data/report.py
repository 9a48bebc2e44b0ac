"""`simplclip data report`: describes pairs and the cost of decoding them, as a table, report.json and report.png."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from simplclip.common import plotting
from simplclip.common.errors import visible
from simplclip.common.files import write_atomically
from simplclip.common.progress import Progress
from simplclip.common.tables import table
from simplclip.data import index
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.build_index import described, inspect_shard, skipped_of
from simplclip.data.epoch import seeded
from simplclip.data.pairs import parts_of
from simplclip.data.parts import Part, read_part
from simplclip.data.pool import cores, ordered, processes
from simplclip.data.shards import ShardError, check_count, parse, place_of, stable_hash
from simplclip.data.transforms import ImageTransform

SPREAD = 32  # most parts of the data from which `measure` decodes images
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
MEASURES = {"short side": "px", "image file": "KiB", "captions an image": "", "caption": "characters"}  # and their units


class Summary(NamedTuple):
    """Statistics of a part of the data."""

    sums: Counter[str]
    formats: Counter[str]
    broken: Skipped
    values: dict[str, np.ndarray]  # by the names of MEASURES
    keys: np.ndarray  # hashes of the samples' keys


def run(
    shards: Any,
    *,
    out: str | os.PathLike | None = None,
    sample: int = 512,
    size: int = 256,
    batch_size: int = 1024,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Reports on pairs: of a shard by its index, if the index fits, else by reading headers and captions.

    shards: what `data.parts_of` takes. The pool's processes share the local tars; this process reads the rest. Nothing but
    the folder `out` is written. The options are those of the command. Returns the object that report.json holds, which also
    names the files that cannot be read. Memory: about 24 bytes a sample.
    """
    check_count("sample", sample, 0)
    check_count("batch_size", batch_size, 1)
    parts, found, unreadable = parts_of(shards), [], {}
    sums = Counter(samples=0, bytes=0, indexed=0, decoded=0, images=0, image_bytes=0)
    total = Summary(sums, Counter(), Skipped(), {}, np.zeros(0, np.uint64))
    with processes(workers) as pool:

        def submit(part: Part) -> Future[Summary | str]:
            if part.is_local_tar:
                return pool.submit(summarise, part)
            done: Future[Summary | str] = Future()  # another process would get a copy of all rows of a parquet file
            done.set_result(summarise(part))
            return done

        with Progress("report", len(parts), unit="parts", shown=progress) as bar:
            for part, one in ordered(submit, parts, 2 * (workers or cores())):
                bar.update()
                if isinstance(one, str):
                    unreadable[part.url] = one
                    continue
                found.append((part, one))
                total.sums.update(one.sums)
                total.formats.update(one.formats)
                total.broken.merge(one.broken)
        counts, samples = [(part, one.sums["samples"]) for part, one in found], total.sums["samples"]
        decoding = pool.submit(measure, counts, sample, size).result() if sample and samples else None
    for name in MEASURES if found else ():
        total.values[name] = np.concatenate([one.values[name] for _, one in found])
    report: dict[str, Any] = {
        "files": len({part.url for part in parts}),
        "unreadable": unreadable,
        **total.sums,
        "formats": dict(total.formats.most_common()),
        "broken": _broken(total.broken),
        "quantiles": {
            name: dict(zip(QUANTILES, np.quantile(values, [*QUANTILES.values()], method="inverted_cdf").astype(int).tolist()))
            for name, values in total.values.items()
            if len(values)
        },
        "epoch": {"batch_size": batch_size, "batches": samples // batch_size},
        "decoding": decoding,
        "duplicate_keys": {
            "in_a_file": sum(len(one.keys) - len(np.unique(one.keys)) for _, one in found),
            "in_all": samples - len(np.unique(np.concatenate([total.keys, *(one.keys for _, one in found)]))),
        },
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out, "report.json"), json.dumps(report, indent=1) + "\n")
        _draw(Path(out, "report.png"), total.values, report["quantiles"])
    return report


def summarise(part: Part) -> Summary | str:
    """Returns the summary of a part, or the reason why it cannot be read."""
    known = index.statistics(part.url) if part.is_local_tar else None
    found = known or (inspect_shard(part.url) if part.is_local_tar else _look(part))
    if isinstance(found, str):
        return found
    about, arrays = found
    samples, seen = about["samples"], arrays["width"] > 0
    size = arrays["bytes"][seen]
    sums = {"samples": samples, "bytes": about["shard"]["bytes"], "indexed": int(known is not None)}
    sums |= {"decoded": samples * about["decoded"], "images": int(seen.sum()), "image_bytes": int(size.sum(dtype=float))}
    values = {
        "short side": np.minimum(arrays["width"], arrays["height"])[seen],
        "image file": -(-size // 1024),
        "captions an image": arrays["captions"][arrays["captions"] > 0],
        "caption": arrays["characters"],
    }
    formats = Counter(about["formats"][number] for number in arrays["format"][seen].tolist())
    keys = np.array([stable_hash(key) for key in index.split(arrays["keys"], samples)], np.uint64)
    return Summary(Counter(sums), formats, skipped_of(about), values, keys)


def _look(part: Part) -> tuple[dict[str, Any], dict[str, np.ndarray]] | str:
    """Returns what `inspect_shard` returns, for a part that is no local tar. Its "bytes" are those of the images."""
    damage = Skipped()
    try:
        about, arrays = described(read_part(part, damage), damage)
    except ShardError as error:
        return str(error)
    return about | {"shard": {"bytes": int(arrays["bytes"].sum())}}, arrays


def measure(counts: Sequence[tuple[Part, int]], number: int, size: int) -> dict[str, Any]:
    """Decodes about `number` images as training does, on one core. counts: the parts to take them from, and their samples."""
    from open_clip.transform import AugmentationCfg, PreprocessCfg

    transform = ImageTransform(PreprocessCfg(size=size), AugmentationCfg())
    filled = [(part, count) for part, count in counts if count]
    chosen = filled[:: -(-len(filled) // SPREAD)]
    each = -(-number // len(chosen))
    skipped, seconds = Skipped(), []
    spread = (s for part, count in chosen for s in islice(read_part(part, Skipped()), 0, None, max(1, count // each)))
    with seeded("report"):
        for sample in islice(spread, number):
            try:
                encoded = parse(sample).encoded
                began = time.process_time()  # of this core, whatever else the machine does
                transform(encoded)
                seconds.append(time.process_time() - began)
            except BrokenSample as broken:
                skipped.add(broken.args[0], place_of(sample), broken.args[1])
    rate = len(seconds) / sum(seconds) if sum(seconds) else None
    return {"images": len(seconds), "size": size, "images_per_second": rate, "broken": _broken(skipped)}


def _broken(skipped: Skipped) -> dict[str, list]:
    return {reason: [count, skipped.examples[reason]] for reason, count in skipped.counts.most_common()}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Returns the tables that show a report in a terminal."""

    def first(name: str) -> str:
        return escape(visible(name))

    epoch, decoding, twice = found["epoch"], found["decoding"], found["duplicate_keys"]
    formats = ", ".join(f"{count:,} {name}" for name, count in found["formats"].items())
    about = [
        (
            "samples",
            f"{found['samples']:,} in {found['files']:,} file{'s' * (found['files'] != 1)}, {decimal(found['bytes'])}",
        ),
        ("images", f"{formats or 'none'}, {decimal(found['image_bytes'])}"),
        ("epoch", f"{epoch['batches']:,} batches of {epoch['batch_size']:,}"),
        ("repeated keys", f"{twice['in_a_file']:,} within a file, {twice['in_all']:,} in all"),
        ("index", f"of {found['indexed']:,} files; every image decoded of {found['decoded']:,} samples"),
    ]
    if decoding and (rate := decoding["images_per_second"]):
        hours = found["samples"] / rate / 3600
        about += [
            ("decoding", f"{rate:,.0f} images/s on one core ({decoding['images']:,}, to {decoding['size']} pixels)"),
            ("", f"{hours:,.3g} core hours an epoch; {1000 / rate:.2g} cores for every 1,000 images/s that a card takes"),
        ]
    quantiles = [
        (f"{name} ({MEASURES[name]})" if MEASURES[name] else name, *(f"{value:,}" for value in values.values()))
        for name, values in found["quantiles"].items()
    ]
    broken = [(reason, f"{count:,}", first(place)) for reason, (count, place) in found["broken"].items()]
    if decoding and found["decoded"] < found["samples"]:
        reasons = decoding["broken"].items()
        broken += [(f"{reason}, of those decoded", f"{count:,}", first(place)) for reason, (count, place) in reasons]
    shown = [table(("data", ""), about)]
    if quantiles:
        shown.append(table(("of each", *next(iter(found["quantiles"].values()))), quantiles, numbers=True))
    return [*shown, *([table(("broken", "samples", "the first"), broken)] if broken else [])]


def _draw(path: Path, values: Mapping[str, np.ndarray], quantiles: Mapping[str, Mapping[str, int]]) -> None:
    """Draws a histogram of each of MEASURES. The last bar includes the largest 0.5 % of the values."""
    from matplotlib.ticker import EngFormatter

    figure = plotting.new_figure(10, 6.6)
    for axis, colour, (name, unit) in zip(figure.subplots(2, 2).flat, plotting.COLOURS, MEASURES.items()):
        median = f"median {quantiles[name]['median']:,} {unit}" if name in quantiles else "none"
        plotting.style(axis, f"{name}: {median}")
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        if name in quantiles:
            axis.hist(np.minimum(values[name], np.quantile(values[name], 0.995, method="inverted_cdf")), 40, color=colour)
    figure.tight_layout(h_pad=2, w_pad=2)
    plotting.write(figure, path)
