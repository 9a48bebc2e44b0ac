"""Predicts the time of an op's call on a card from its matrix products, bytes and launches. Measures nothing.

    python -m benchmarks.bound --call contrastive --n 65536 --dtype bfloat16 --card rtx-3090
    python -m benchmarks.bound --write         all calls on all cards, as a result file

The rates are the vendor's, which no kernel reaches, so that the prediction is a lower bound. With --call the last line is a
JSON object: "predicted_ms", "bound" (what takes most of it), "bytes" of memory, "launches", "torch_kernels" and so on
"""

from __future__ import annotations

import argparse
import json

import torch

from benchmarks.bound import calls, trace
from benchmarks.bound.cards import CARDS
from benchmarks.bound.roofline import roofline
from benchmarks.measure import PASSES
from benchmarks.results_file import RESULTS, table, versions, write_csv

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}


def predicted(case: calls.Case, dtype: str, backward: bool, card: str) -> tuple[list[dict], dict]:
    """Returns a row for each kernel, and the columns of the whole call."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    with trace.on_card(CARDS[card]) as traced:
        case.run(DTYPES[dtype], backward)
    rows, total = roofline(traced.steps, CARDS[card])
    what = {"call": case.name, "shape": case.shape, "dtype": dtype, "pass": PASSES[backward], "card": card}
    return rows, what | total


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser("python -m benchmarks.bound", description=__doc__, formatter_class=raw)
    made.add_argument("--call", choices=[*calls.LOSSES, *(case.name for case in calls.others())], help="default: all")
    made.add_argument("--n", type=int, default=65536, help="pairs of a loss")
    made.add_argument("--width", type=int, default=calls.WIDTH, help="width of the features of a loss")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="tf32: float32 whose products torch may round")
    made.add_argument("--card", choices=CARDS, help="default: rtx-3090 with --call, else all")
    made.add_argument("--forward", action="store_true", help="without the backward")
    made.add_argument("--write", action="store_true", help="write benchmarks/results/bound-predicted-DATE.csv")
    return made


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    cards = [options.card] if options.card else ["rtx-3090"] if options.call else list(CARDS)
    cases = calls.losses((options.n,), options.width) + calls.others()
    lines = []
    for case in [case for case in cases if options.call in (case.name, None)]:
        of_cards = {card: predicted(case, options.dtype, not options.forward, card) for card in cards}
        rows, total = of_cards[cards[0]]
        times = {f"{card} ms": of_card["predicted_ms"] for card, (_, of_card) in of_cards.items()}
        lines.append({name: total[name] for name in ("call", "shape", "dtype", "pass")} | times | total)
    print(f"predicted, never measured; all but the times is of {cards[0]}")
    print("\n".join(table(lines)))
    if options.write:
        where = versions()
        path = RESULTS / f"bound-predicted-{where['date']}.csv"
        write_csv(path, [line | where for line in lines])
        print(f"wrote {path}")
    if options.call:
        print("\n".join(table([row | {name: round(row[name], 3) for name in ("ms", "gflop", "mb")} for row in rows])))
        print(json.dumps(total))


if __name__ == "__main__":
    main()
