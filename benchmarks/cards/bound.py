"""A lower bound of the time of an op's call on a card, from its products, bytes and launches."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch

from benchmarks.cards import calls
from benchmarks.measure import PASSES
from benchmarks.results_file import RESULTS, table, versions, write_csv
from simplclip.plan.cards import CARDS, Card
from simplclip.plan.kernels import Kernel
from simplclip.plan.measure import on_card
from simplclip.plan.time import least_ms

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"tf32": torch.float32, "float32": torch.float32}
SHOWN = ("rtx-3090", "rtx-4090", "rtx-5090", "a100-80", "h100")


def lower_bound(kernels: Sequence[Kernel], card: Card) -> tuple[list[dict], dict]:
    """Returns a row for each name of a kernel, the slowest first; and those of the whole call."""
    rows: dict[tuple[str, str], dict] = {}
    bounds = dict.fromkeys(("products", "bytes", "launches"), 0.0)
    for kernel in (kernel for kernel in kernels if kernel.by != "host"):
        times = least_ms(kernel, card)
        ms = kernel.times * max(times.values())
        bounds[max(times, key=lambda name: times[name])] += ms
        row = rows.setdefault((kernel.by, kernel.name), {"kernel": kernel.name, "by": kernel.by})
        for column in ("launches", "ms", "gflop", "mb"):
            row.setdefault(column, 0)
        row["launches"] += kernel.times
        row["ms"] += ms
        row["gflop"] += 2e-9 * kernel.multiply_adds * kernel.times
        row["mb"] += kernel.bytes / 1e6 * kernel.times
    ordered = sorted(rows.values(), key=lambda row: -row["ms"])
    launches = sum(row["launches"] for row in ordered)
    own = sum(row["launches"] for row in ordered if row["by"] != "torch")
    return ordered, {
        "predicted_ms": round(sum(bounds.values()), 4),
        "bound": max(bounds, key=lambda name: bounds[name]),
        "tflop": round(sum(row["gflop"] for row in ordered) / 1e3, 4),
        "bytes": round(1e6 * sum(row["mb"] for row in ordered)),
        "launches": launches,
        "own_kernels": own,
        "torch_kernels": launches - own,
        "host_copies": sum(kernel.by == "host" for kernel in kernels),
    }


def predicted(case: calls.Case, dtype: str, backward: bool, card: str) -> tuple[list[dict], dict]:
    """Returns a row for each kernel, and the columns of the whole call."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    with on_card(CARDS[card]) as kernels:
        case.run(DTYPES[dtype], backward)
    rows, total = lower_bound(kernels, CARDS[card])
    what = {"call": case.name, "shape": case.shape, "dtype": dtype, "pass": PASSES[backward]}
    return rows, what | {"card": card} | total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*calls.LOSSES, *(case.name for case in calls.others())]
    parser.add_argument(
        "--call", choices=["all", *names], help="a call of this library, for a lower bound"
    )
    parser.add_argument("--n", type=int, default=65536, help="pairs of a loss")
    parser.add_argument(
        "--width", type=int, default=calls.WIDTH, help="width of the features of a loss"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="tf32: float32 whose products torch may round",
    )
    parser.add_argument("--forward", action="store_true", help="of a call without the backward")


def run(options: argparse.Namespace) -> None:
    every = options.call == "all"
    cards = list(SHOWN) if every else ["rtx-3090"]
    if options.card:
        cards = [options.card]
    cases = calls.losses((options.n,), options.width) + calls.others()
    lines = []
    for case in [case for case in cases if every or case.name == options.call]:
        results = {
            card: predicted(case, options.dtype, not options.forward, card) for card in cards
        }
        rows, total = results[cards[0]]
        names = {name: total[name] for name in ("call", "shape", "dtype", "pass")}
        times = {}
        for card, (_, card_total) in results.items():
            times[f"{card} ms"] = card_total["predicted_ms"]
        lines.append(names | times | total)
    print(f"predicted, never measured; all but the times is of {cards[0]}")
    print("\n".join(table(lines)))
    if every:
        where = versions()
        path = RESULTS / f"bound-predicted-{where['date']}.csv"
        write_csv(path, [line | where for line in lines])
        print(f"wrote {path}")
        return
    for row in rows:
        row |= {name: round(row[name], 3) for name in ("ms", "gflop", "mb")}
    print("\n".join(table(rows)))
    print(json.dumps(total))
