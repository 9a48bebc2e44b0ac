"""Tests, then times the ops on a GPU in one go: `python -m benchmarks.gpu`.

Runs `pytest -m gpu` first and times nothing while a test is red (`--no-tests` goes without). Then, case by case:
similarity_loss with its peers (open_clip, torch.compile; Inf-CLIP, memeff and siglip-kernel where they are installed) at
every N, and with several budgets of scratch at the largest; single kernels beside what benchmarks.bound predicts and a plain
product of cuBLAS; blocks; shaped attention; a training step. A form that fails, does not fit in memory or has a wrong value
becomes a row with its reason. Prints the rows and writes benchmarks/results/<gpu>-<date>.csv after every case; a case that is
in that file, measured at this commit, is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import attention_forms, block_forms, hardware, similarity_forms, training_forms
from benchmarks.bound import calls
from benchmarks.measure import PASSES, attempted, interleaved_times, quantiles, reason, row_of
from benchmarks.results_file import RESULTS, table, write_csv
from simplclip.common.cards import CARDS
from simplclip.ops import similarity_loss

CORRECTNESS = {
    "cuda": ["-m", "gpu"],
    "cpu": [
        *(f"tests/ops/test_{name}.py" for name in ("similarity_loss", "shaped_attention", "simplified_block")),
        "-k",
        "cpu and dtype0",
    ],
}
SCRATCH = (64 << 20, 256 << 20, 1 << 30)
OURS = re.compile(r"(similarity_\w+?|shaped_attention_\w+?|parallel_mlp_\w+?|feature_loss_\w+?)(?:_kernel\b|$)")


@dataclass
class Case:
    """What is measured at a time; `op` is one of OPS."""

    op: str
    name: str
    run: Callable[[], list[dict]]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program without a GPU")
    parser.add_argument("--no-tests", action="store_true", help="time at once")
    parser.add_argument("--ops", default=",".join(OPS), help="in this order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--sizes", default="1024,4096,16384,32768,65536", help="batch sizes N")
    parser.add_argument("--width", type=int, default=512, help="embedding width D")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sequences", type=float, default=1.0, help="share of the blocks' batches: 0.1 for a trial")
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of each form")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/<gpu>-<date>.csv)")
    return parser.parse_args(argv)


def check(device: str) -> None:
    """Runs the tests, which print as they go; ends if one fails, or if none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *CORRECTNESS[device]]
    print("correctness:", " ".join(command[1:]), flush=True)
    with subprocess.Popen(command, cwd=hardware.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        last = ""
        for line in tests.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    if tests.returncode or " passed" not in last:
        sys.exit(f"the tests are not green, so nothing is timed (--no-tests times all the same): {last}")


def losses(o: argparse.Namespace) -> Iterator[Case]:
    sizes = [int(n) for n in o.sizes.split(",")]
    for n, dtype, objective in itertools.product(sizes, o.dtypes.split(","), similarity_forms.OBJECTIVES):
        run = partial(similarity_forms.measure, objective, n, o.width, dtype, o.repeats, o.device, strict=False)
        yield Case("losses", f"{objective}, N={n} D={o.width} {dtype}", run)
    for dtype in o.dtypes.split(","):
        yield Case("losses", f"scratch, N={sizes[-1]} D={o.width} {dtype}", partial(scratch, o, sizes[-1], dtype))


def scratch(o: argparse.Namespace, n: int, dtype: str) -> list[dict]:
    """The contrastive loss with several budgets of scratch."""
    features = similarity_forms.batch(n, o.width, getattr(torch, dtype), o.device)

    def step(size: int):
        return features.step(lambda b: similarity_loss(b.image, b.text, b.scale, scratch_bytes=size)["contrastive"])

    forms = {f"{size >> 20} MiB": lambda size=size: step(size) for size in SCRATCH}
    base = next(iter(forms))
    _, reasons = attempted(forms, lambda *_: "", base, strict=False)
    ran = {name: form for name, form in forms.items() if name not in reasons}
    times = interleaved_times(ran, o.repeats, strict=False)
    reasons |= times.failed
    what = {"op": "scratch_bytes", "objective": "contrastive", "n": n, "d": o.width, "dtype": dtype, "repeats": o.repeats}
    return [row_of({**what, "form": name}, times, name, reasons, strict=False, base=base) for name in forms]


def kernels(o: argparse.Namespace) -> Iterator[Case]:
    sizes = [int(n) for n in o.sizes.split(",")]
    cases = calls.losses((sizes[0], sizes[-1]), o.width) + calls.others(o.sequences)
    for dtype, case in itertools.product(o.dtypes.split(","), cases):
        yield Case("kernels", f"{case} {dtype}", partial(of_kernels, o, case, dtype))


def card(device: str) -> str:
    """The name of the card whose data sheet is nearest; where there is no GPU the first, to try this program."""
    if device == "cpu":
        return next(iter(CARDS))
    found = torch.cuda.get_device_properties(0)
    near = lambda name: (abs(CARDS[name].architecture - 10 * found.major - found.minor),  # noqa: E731
                         abs(CARDS[name].multiprocessors - found.multi_processor_count))  # fmt: skip
    return min(CARDS, key=near)


def of_kernels(o: argparse.Namespace, case: calls.Case, dtype: str) -> list[dict]:
    """Each kernel of a call, forward and backward: milliseconds, TFLOP/s, what was predicted, and cuBLAS's rate beside it."""
    rows, beside = {}, blas(case.product, getattr(torch, dtype), o)
    expected = predicted(case, dtype, card(o.device))
    with calls.real(o.device):
        case.run(getattr(torch, dtype), True)
        activities = [ProfilerActivity.CUDA] if o.device == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=activities) as profiled:
            for _ in range(o.repeats):
                case.run(getattr(torch, dtype), True)
    for event in profiled.key_averages():
        time_us = event.self_device_time_total if o.device == "cuda" else event.self_cpu_time_total
        found = OURS.search(event.key)
        if not found or not time_us:
            continue
        row = rows.setdefault(found[1], {"launches": 0, "ms": 0.0})
        row["launches"] += event.count / o.repeats
        row["ms"] += time_us / 1e3 / o.repeats
    out = []
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ms"]):
        sum_of = expected.get(name)
        tflops = {"tflops": round(sum_of.flops / row["ms"] / 1e9, 1), "predicted_ms": round(sum_of.ms, 4)} if sum_of else {}
        row = {"op": "kernels", "objective": case.name, "shape": case.shape, "dtype": dtype, "form": name, **row, **tflops}
        out.append({**row, "ms": round(row["ms"], 4), "cublas_tflops": round(beside, 1), "note": ""})
    return out or [{"op": "kernels", "objective": case.name, "form": "none", "note": "no kernel of ours ran"}]


def predicted(case: calls.Case, dtype: str, name: str) -> dict[str, object]:
    """The estimates of benchmarks.bound by kernel; none where it cannot tell."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from benchmarks.bound import predict, trace

    predictor = predict.Predictor(name)
    try:
        with trace.on_card(predictor.card) as found:
            case.run(getattr(torch, dtype), True)
        return {row.name: row.sum for row in predict.predict(found.steps, predictor)}
    except Exception as error:
        print(f"{case}: not predicted, {reason(error)}")
        return {}


def blas(product: tuple[int, int, int], dtype: torch.dtype, o: argparse.Namespace) -> float:
    """TFLOP/s of a plain product, of at most 8,192 rows of the first matrix."""
    m, n, k = product
    m = min(m, 8192)
    left, right = (torch.randn(*shape, device=o.device).to(dtype) for shape in ((m, k), (k, n)))
    out = left.new_empty(m, n)
    times = interleaved_times({"cuBLAS": lambda: torch.mm(left, right, out=out)}, o.repeats)
    return 2e-12 * m * n * k / quantiles(times.device["cuBLAS"])[1]


def blocks(o: argparse.Namespace) -> Iterator[Case]:
    batch = max(1, int(block_forms.BATCH * o.sequences))
    for dtype, backward in itertools.product(o.dtypes.split(","), PASSES):
        run = partial(block_forms.measure, dtype, backward, o.repeats, o.device, batch=batch, strict=False)
        yield Case("block", f"B={batch} {dtype} {PASSES[backward]}", run)


def attention(o: argparse.Namespace) -> Iterator[Case]:
    for dtype, backward, shape in itertools.product(o.dtypes.split(","), PASSES, attention_forms.SHAPES):
        shape = dataclasses.replace(shape, b=max(1, int(shape.b * o.sequences)))
        run = partial(attention_forms.measure, shape, dtype, backward, o.repeats, o.device, strict=False)
        yield Case("attention", f"{shape} {dtype} {PASSES[backward]}", run)


def training(o: argparse.Namespace) -> Iterator[Case]:
    batch = max(2, int(1024 * o.sequences))
    for dtype, objective in itertools.product(o.dtypes.split(","), training_forms.OBJECTIVES):
        run = partial(training_forms.measure, objective, batch, dtype, o.repeats, o.device, strict=False)
        yield Case("training", f"{objective}, N={batch} {dtype}", run)


OPS = {"losses": losses, "kernels": kernels, "block": blocks, "attention": attention, "training": training}


def earlier(out: Path, commit: str) -> list[dict]:
    """The rows of a file that need not be measured again."""
    if not out.exists():
        return []
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    failed = {row["case"] for row in rows if not row["form"]}
    return [row for row in rows if row["commit"] == commit and row["case"] not in failed]


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu --sizes 256 tries the program")
    if unknown := set(options.ops.split(",")) - set(OPS):
        sys.exit(f"--ops: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    where = hardware.describe(options.device)
    out = options.out or RESULTS / f"{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}.csv"
    if not options.no_tests:
        check(options.device)
    started, rows = time.monotonic(), earlier(out, where["commit"])
    done, left = {row["case"] for row in rows}, 0
    for case in itertools.chain.from_iterable(OPS[name](options) for name in options.ops.split(",")):
        if str(case) in done:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            left += 1
            continue
        print(f"\n{case}", flush=True)
        try:
            found = case.run()
        except Exception as error:
            found = [{"op": case.op, "note": reason(error)}]
        print("\n".join(table(found)), flush=True)
        state = hardware.gpu_state()
        rows += [{"case": str(case), "form": "", **row, **state, **where} for row in found]
        write_csv(out, rows)
    left_out = f", {left} cases left for the next call" if left else ""
    print(f"\n{where['hardware']}, torch {where['torch']}, commit {where['commit']}: wrote {out}{left_out}")


if __name__ == "__main__":
    main()
