"""Predicts the time of an op's call on a card from machine code, bytes and launches. Needs no card and measures nothing.

    python -m benchmarks.bound --call contrastive --n 65536 --width 512 --dtype bfloat16 --card rtx-3090
    python -m benchmarks.bound --label after         all calls on all cards, into benchmarks/results

Prints a row for each kernel, the slowest first: launches, milliseconds, the pipe that bounds it and the share of the card's
peak of products. The last line is a JSON object with bytes of memory: "bytes" of sums, statistics and elementwise kernels,
"operand_bytes" that products read, "block_bytes" that a kernel writes for a later product (a block of the gradient of the
similarities, a hidden layer), and "all_bytes", the sum of the three. "launches" includes torch's kernels.
"""

from __future__ import annotations

import argparse
import datetime
import json

import torch

from benchmarks import hardware
from benchmarks.bound import assumed, calls, machine, predict, sass, trace
from benchmarks.bound.cards import CARDS
from benchmarks.measure import PASSES
from benchmarks.results_file import RESULTS, table, write_csv

CALLS, KERNELS = RESULTS / "bound_calls-predicted.csv", RESULTS / "bound_kernels-predicted.csv"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
MAIN = "bfloat16"  # the other dtypes have only the smallest N, whose kernels are those of every N
OF_ARCHITECTURES = ("rtx-3090", "rtx-4090", "h100", "rtx-5090")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    cases = [*calls.LOSSES, *(case.name for case in calls.others())]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bound", description=__doc__, formatter_class=raw)
    parser.add_argument("--call", choices=cases, help="default: all, whose rows are written to benchmarks/results")
    parser.add_argument("--n", type=int, default=65536, help="pairs of a loss")
    parser.add_argument("--width", type=int, default=calls.WIDTH, help="width of the features of a loss")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="tf32: float32 whose products torch may round; default: bfloat16, without --call all"
    )
    parser.add_argument("--card", choices=CARDS, help="default: rtx-3090; without --call one of each architecture")
    parser.add_argument("--forward", action="store_true", help="without the backward")
    parser.add_argument(
        "--label", default="", help="of the rows that are written, e.g. before: rows of other labels are kept"
    )
    return parser.parse_args(argv)


def predicted(case: calls.Case, dtype: str, backward: bool, predictor: predict.Predictor) -> tuple[list[predict.Row], dict]:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    predictor.case = case.name
    with trace.on_card(predictor.card) as found:
        case.run(DTYPES[dtype], backward)
    rows = predict.predict(found.steps, predictor)
    return rows, predict.summary(rows, found.steps, predictor.card, DTYPES[dtype])


def shown(rows: list[predict.Row], predictor: predict.Predictor, dtype: str) -> list[dict]:
    peak = predict.peak(predictor.card, DTYPES[dtype])
    out = []
    for row in rows:
        each = row.sum
        cells = {
            "kernel": row.name + ("" if each.exact else " (loops not told apart)"),
            "by": row.kind,
            "launches": row.launches,
        }
        cells |= {"ms": f"{each.ms:.3f}", "bound by": row.pipe, "memory MB": f"{each.moved / 1e6:,.1f}"}
        cells["cache MB"] = f"{each.l2 / 1e6:,.1f}" if each.l2 else ""
        if each.flops:
            cells |= {"GFLOP": f"{each.flops / 1e9:,.0f}", "of peak": f"{each.flops / each.ms / peak / 1e9:.0%}"}
        out.append(cells)
    return out


def _instructions(made: machine.Machine, work: machine.Work) -> dict:
    """Counts instructions in and outside product loops, and those outside that a warp executes for 2,048 multiply-adds."""
    row: dict = {}
    for where in ("loop", "outside"):
        chosen = [part for part in made.code.parts if bool(part.products) == (where == "loop")]
        row[f"{where}_instructions"] = sum(part.codes.total() for part in chosen)
        row |= {f"{where}_{pipe}": sum(part.count(pipe) for part in chosen) for pipe in sass.PIPES[1:]}
    products = sum(part.multiply_adds for part in work.executed) / 2048
    executed = sum(part.codes.total() for part in work.executed if not part.products)
    return row | {"outside_per_mma": round(executed / products, 3) if products else ""}


COLUMNS = ("label", "kernel", "call", "dtype", "sm", "card", "registers", "shared", "stack", "warps", "blocks_per_sm")
COLUMNS += tuple(f"{where}_{what}" for where in ("loop", "outside") for what in ("instructions", *sass.PIPES[1:]))
COLUMNS += ("outside_per_mma", *(f"{pipe}_clocks" for pipe in sass.PIPES), "clocks_in_sequence", "memory_bytes", "l2_bytes")
COLUMNS += ("ms", "bound_by")


def kernel_rows(predictor: predict.Predictor, label: str, dtype: str, card: str) -> list[dict]:
    """Returns a row for each kernel that was started: instructions of its machine code, clocks of one block."""
    found = []
    for case, name, made, work, clocks, estimate in predictor.kernels.values():
        row = {"label": label, "kernel": name, "call": case, "dtype": dtype, "sm": predictor.card.architecture, "card": card}
        row |= {column: getattr(made, column) for column in ("registers", "shared", "stack", "warps")}
        row["blocks_per_sm"] = made.blocks(predictor.card.architecture)
        row |= _instructions(made, work) if work else {}
        row |= {f"{pipe}_clocks": round(clocks.total.get(pipe, 0)) for pipe in sass.PIPES}
        row |= {"clocks_in_sequence": round(clocks.sequence), "memory_bytes": estimate.moved, "l2_bytes": estimate.l2}
        row |= {"ms": round(estimate.ms, 4), "bound_by": estimate.pipe}
        found.append({column: row.get(column, "") for column in COLUMNS})
    return found


def everything(options: argparse.Namespace) -> None:
    """Predicts all calls on all cards. Writes the files after each card and dtype."""
    where = {"torch": torch.__version__, "triton": machine.triton.__version__, "commit": hardware.commit(),
             "date": datetime.date.today().isoformat()}  # fmt: skip
    for dtype in (options.dtype,) if options.dtype else DTYPES:
        for card in (options.card,) if options.card else OF_ARCHITECTURES:
            predictor, rows = predict.Predictor(card), []
            for case in calls.losses(calls.SIZES if dtype == MAIN else calls.SIZES[:1]) + calls.others():
                for backward, passes in PASSES.items():
                    if not backward and dtype != MAIN:
                        continue
                    key = {"label": options.label, "call": case.name, "shape": case.shape, "dtype": dtype, "pass": passes}
                    _, total = predicted(case, dtype, backward, predictor)
                    rows.append({**key, "card": card, **total, **where})
                    print(f"{card} {dtype} {case}, {passes}: {total['predicted_ms']} ms, {total['pipe']}", flush=True)
            write_csv(CALLS, rows, key=("label", "dtype", "card"))
            made = [{**row, **where} for row in kernel_rows(predictor, options.label, dtype, card)]
            write_csv(KERNELS, made, key=("label", "dtype", "card"))


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.call is None:
        return everything(options)
    card, dtype = options.card or "rtx-3090", options.dtype or MAIN
    found = calls.losses((options.n,), options.width) + calls.others()
    case = next(case for case in found if case.name == options.call)
    predictor = predict.Predictor(card)
    rows, total = predicted(case, dtype, not options.forward, predictor)
    passes = PASSES[not options.forward]
    print(f"{case}, {dtype}, {passes}, {card}: predicted, never measured")
    print("\n".join(table(shown(rows, predictor, dtype))))
    print()
    hidden = ("label", "call", "dtype", "sm", "card", "memory_bytes", "l2_bytes", "stack")
    made = kernel_rows(predictor, "", dtype, card)
    print("\n".join(table([{column: v for column, v in row.items() if column not in hidden} for row in made])))
    print("\n".join(assumed.lines(card)))
    print(json.dumps({"call": case.name, "shape": case.shape, "dtype": dtype, "card": card, "pass": passes, **total}))
    return None


if __name__ == "__main__":
    main()
