"""Checks and measures this library on a GPU in one go: `python -m benchmarks.gpu`.

Runs `simplclip selftest` and shows what fails. Then measures case by case, the most useful first:
steps of the SiCLIPs beside the models that they were made from; the losses with their peers
(open_clip, torch.compile; memeff and siglip-kernel where they are installed); attention; blocks; a
step of a small model; the host's time of small calls. Measures all cases in one dtype, then in the
next. A form that fails, does not fit in memory or has a wrong value becomes a row with its reason.

Writes one folder and a zip of it: rows.csv after every case, the output of selftest, a summary, the
environment. A case that the folder already has at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import simplclip
from benchmarks import attention_forms, block_forms, host, similarity_forms, training_forms
from benchmarks.measure import PASSES, reason
from benchmarks.results_file import RESULTS, describe, gpu_state, read_csv, slug, table, write_csv
from benchmarks.steps import beside_original
from simplclip.common.files import write_atomically

PAIRS, LARGE_STEP = 128, 1024  # of a step of a SiCLIP, and of siclip-tiny


@dataclass
class Case:
    """A measurement that is done or left as a whole; `op` is a key of OPS."""

    op: str
    name: str
    run: Callable[[], list[dict]]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def losses(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    sizes = [int(n) for n in o.sizes.split(",")]
    for n, objective in itertools.product(sizes, similarity_forms.OBJECTIVES):
        problem = similarity_forms.Problem("similarity_loss", objective, n, o.width, dtype)
        run = partial(similarity_forms.measure, problem, 1 << 62, o.device, o.repeats, False)
        yield Case("losses", f"{objective}, N={n} D={o.width} {dtype}", run)


def attention(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    for backward, shape in itertools.product(PASSES, attention_forms.SHAPES):
        shape = dataclasses.replace(shape, b=max(1, int(shape.b * o.sequences)))
        run = partial(attention_forms.measure, shape, dtype, backward, o.device, o.repeats, False)
        yield Case("attention", f"{shape} {dtype} {PASSES[backward]}", run)


def blocks(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    batch = max(1, int(block_forms.BATCH * o.sequences))
    for backward in PASSES:
        run = partial(block_forms.measure, dtype, backward, batch, o.device, o.repeats, False)
        yield Case("block", f"B={batch} {dtype} {PASSES[backward]}", run)


def training(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    batch = max(2, int(LARGE_STEP * o.sequences))
    run = partial(training_forms.measure, batch, dtype, o.device, o.repeats, False)
    yield Case("training", f"siclip-tiny, N={batch} {dtype}", run)


def small_calls(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    def measure() -> list[dict]:
        rows = host.measure(20 * o.repeats, o.device)
        return [{"op": "host", "form": row["call"], **row} for row in rows]

    if dtype == o.dtypes.split(",")[0]:  # in float32, once
        yield Case("host", o.device, measure)


def steps(o: argparse.Namespace, dtype: str) -> Iterator[Case]:
    pairs = max(2, int(PAIRS * o.sequences))
    for name in o.models.split(","):
        run = partial(beside_original, name, pairs, dtype, torch.device(o.device), o.repeats, False)
        yield Case("steps", f"{name} {dtype}", run)


OPS = {
    "steps": steps,
    "losses": losses,
    "attention": attention,
    "block": blocks,
    "training": training,
    "host": small_calls,
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: to try this program without a GPU",
    )
    parser.add_argument("--at-once", action="store_true", help="measure without selftest")
    parser.add_argument("--ops", default=",".join(OPS), help="in this order")
    parser.add_argument("--minutes", type=float, default=40, help="start no case after so many")
    parser.add_argument(
        "--sizes",
        default="32768,4096,65536,16384,1024",
        help="batch sizes N of the losses, in this order",
    )
    parser.add_argument("--width", type=int, default=512, help="embedding width D")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--models", default="siclip-s0,siclip2-s0", help="configs")
    parser.add_argument(
        "--sequences",
        type=float,
        default=1.0,
        help="share of the batches of models: 0.1 for a trial",
    )
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of each form")
    parser.add_argument(
        "--out", type=Path, help="folder (default: benchmarks/results/<gpu>-<date>)"
    )
    return parser.parse_args(argv)


def check_first(device: str, folder: Path) -> None:
    """Runs selftest and keeps its output. Exits unless it ends with 0, or 1: something is wrong."""
    words = ["simplclip", "selftest", "--device", device, "--json", str(folder / "selftest.json")]
    print(*words, flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        open(folder / "selftest.txt", "w") as file,
        subprocess.Popen([sys.executable, "-m", *words], **pipes) as run,
    ):
        for line in run.stdout:
            print(line, end="", flush=True)
            file.write(line)
    if run.returncode not in (0, 1):
        sys.exit(
            f"selftest ended with {run.returncode}, so nothing is measured (--at-once measures all "
            "the same)"
        )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for dtype, name in itertools.product(options.dtypes.split(","), options.ops.split(",")):
        yield from OPS[name](options, dtype)


def earlier(file: Path, commit: str) -> list[dict]:
    """Returns the rows of a file that need not be measured again."""
    rows = read_csv(file) if file.exists() else []
    failed = {row["case"] for row in rows if not row["form"]}
    return [row for row in rows if row["commit"] == commit and row["case"] not in failed]


def write_bundle(folder: Path, rows: list[dict], left: int, where: dict[str, str]) -> list[str]:
    """Writes all files but rows.csv, and the zip beside the folder. Returns the summary's lines."""
    versions = f"torch {where['torch']}, simplclip {where['simplclip']}, commit {where['commit']}"
    lines = [f"{where['hardware']}, {versions}", ""]
    lines.append(f"{len(rows)} rows; {left} cases were left for the next call.")
    failed = []
    for row in rows:
        if row.get("note"):
            failed.append({name: row[name] for name in ("case", "form", "note")})
    if failed:
        lines += ["", f"{len(failed)} forms have no figure:", *table(failed)]
    packages = {p.metadata["Name"]: p.version for p in importlib.metadata.distributions()}
    environment = {
        "command": sys.argv,
        "where": where,
        "gpu": gpu_state(),
        "doctor": simplclip.report(),
        "packages": dict(sorted(packages.items())),
    }
    write_atomically(folder / "summary.txt", "\n".join(lines) + "\n")
    write_atomically(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    return lines


def main(argv: list[str] | None = None) -> None:
    started, options = time.monotonic(), arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu --sizes "
            "256 tries the program"
        )
    unknown = set(options.ops.split(",")) - set(OPS)
    if unknown:
        sys.exit(f"--ops: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    where = describe(options.device)
    folder = options.out or RESULTS / f"{slug(where['hardware'].split(',')[0])}-{where['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.at_once:
        check_first(options.device, folder)
    rows = earlier(folder / "rows.csv", where["commit"])
    done, left = {row["case"] for row in rows}, 0
    for case in cases(options):
        if str(case) in done:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            left += 1
            continue
        print(f"\n{case}", flush=True)
        try:
            measured = case.run()
        except Exception as error:
            measured = [{"op": case.op, "note": reason(error)}]
        print("\n".join(table(measured)), flush=True)
        state = gpu_state()
        rows += [{"case": str(case), "form": "", **row, **state, **where} for row in measured]
        write_csv(folder / "rows.csv", rows)
    summary = write_bundle(folder, rows, left, where)
    print("\n", *summary, f"wrote {folder} and {folder}.zip", sep="\n")


if __name__ == "__main__":
    main()
