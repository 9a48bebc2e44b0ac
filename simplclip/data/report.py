"""`simplclip data report`: what shards hold, and what it costs to read them; a table, report.json and report.png."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simplclip.common import plotting
from simplclip.common.files import write_atomically
from simplclip.common.progress import Progress
from simplclip.data import index
from simplclip.data.broken import BrokenSample, Skipped
from simplclip.data.build_index import look, skipped_of
from simplclip.data.epoch import seeded
from simplclip.data.pairs import expand
from simplclip.data.pool import cores, ordered, processes
from simplclip.data.shards import Shards, check_count, parse, place_of, read_shard, stable_hash
from simplclip.data.transforms import ImageTransform

SPREAD = 32  # the sample of images comes from at most so many shards
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
MEASURES = {"short side": "px", "image file": "KiB", "captions an image": "", "caption": "characters"}  # and their units


class Summary(NamedTuple):
    """What a shard holds."""

    sums: Counter[str]
    formats: Counter[str]
    broken: Skipped
    values: dict[str, np.ndarray]  # of MEASURES
    keys: np.ndarray  # their hashes


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

    The options are those of the command. Returns the object that report.json holds, in which shards that cannot be read are
    named. Memory: about 24 bytes a sample.
    """
    check_count("sample", sample, 0)
    check_count("batch_size", batch_size, 1)
    files, found, unreadable = expand(shards), {}, {}
    sums = Counter(samples=0, bytes=0, indexed=0, decoded=0, images=0, image_bytes=0)
    total = Summary(sums, Counter(), Skipped(), {}, np.zeros(0, np.uint64))
    with processes(workers) as pool:
        with Progress("report", len(files), unit="shards", shown=progress) as bar:
            for file, one in ordered(lambda file: pool.submit(summarise, file), files, 2 * (workers or cores())):
                bar.update()
                if isinstance(one, str):
                    unreadable[file] = one
                    continue
                found[file] = one
                total.sums.update(one.sums)
                total.formats.update(one.formats)
                total.broken.merge(one.broken)
        counts, samples = {file: one.sums["samples"] for file, one in found.items()}, total.sums["samples"]
        decoding = pool.submit(measure, counts, sample, size).result() if sample and samples else None
    for name in MEASURES if found else ():
        total.values[name] = np.concatenate([one.values[name] for one in found.values()])
    report: dict[str, Any] = {
        "shards": len(files),
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
            "in_a_shard": sum(len(one.keys) - len(np.unique(one.keys)) for one in found.values()),
            "in_all_shards": samples - len(np.unique(np.concatenate([total.keys, *(one.keys for one in found.values())]))),
        },
        "img2dataset": _differing(counts),
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(out, "report.json"), json.dumps(report, indent=1) + "\n")
        _draw(Path(out, "report.png"), total.values, report["quantiles"])
    return report


def summarise(shard: str) -> Summary | str:
    """The summary of a shard, or why it cannot be read."""
    known = index.statistics(shard)
    found = known or look(shard)
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


def measure(counts: Mapping[str, int], number: int, size: int) -> dict[str, Any]:
    """Decodes about `number` images, spread over shards with `counts` samples, as training does; on this core alone."""
    from open_clip.transform import AugmentationCfg, PreprocessCfg

    transform = ImageTransform(PreprocessCfg(size=size), AugmentationCfg())
    filled = [file for file, count in counts.items() if count]
    chosen = filled[:: -(-len(filled) // SPREAD)]
    each = -(-number // len(chosen))
    skipped, seconds = Skipped(), []
    spread = (s for file in chosen for s in islice(read_shard(file, Skipped()), 0, None, max(1, counts[file] // each)))
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


def _draw(path: Path, values: Mapping[str, np.ndarray], quantiles: Mapping[str, Mapping[str, int]]) -> None:
    """A histogram of each of MEASURES; its last bar has the largest 0.5 % of the values too."""
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
