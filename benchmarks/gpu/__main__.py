"""Checks and measures this library on a GPU in one go: `python -m benchmarks.gpu`.

Runs `simplclip selftest` and shows what fails. Then measures case by case, the most useful first: steps of the SiCLIPs beside
the models that they were made from; similarity_loss with its peers (open_clip, torch.compile; Inf-CLIP, memeff and
siglip-kernel where they are installed); the largest batches; the rate of the loader; single kernels beside the prediction of
benchmarks.bound and a plain product of cuBLAS; attention; blocks; a step of a small model. Measures all cases in one dtype,
then in the next. A form that fails, does not fit in memory or has a wrong value becomes a row with its reason.

Writes one folder and a zip of it: rows.csv after every case, the output of selftest, measured beside predicted
figures, pictures, the environment. A case that the folder already has at this commit is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import hardware
from benchmarks.gpu import bundle, models, ops
from benchmarks.measure import reason
from benchmarks.results_file import RESULTS, table, write_csv

OPS = {
    "steps": models.steps,
    "losses": ops.losses,
    "batches": models.batches,
    "loader": models.fed,
    "kernels": ops.kernels,
    "attention": ops.attention,
    "block": ops.blocks,
    "training": ops.training,
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program without a GPU")
    parser.add_argument("--at-once", action="store_true", help="measure without selftest")
    parser.add_argument("--ops", default=",".join(OPS), help="in this order")
    parser.add_argument("--minutes", type=float, default=40, help="start no case after so many")
    parser.add_argument("--sizes", default="32768,4096,65536,16384,1024", help="batch sizes N of the losses, in this order")
    parser.add_argument("--width", type=int, default=512, help="embedding width D")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--models", default="siclip-s0,siclip2-s0", help="configs")
    parser.add_argument("--sequences", type=float, default=1.0, help="share of the batches of models: 0.1 for a trial")
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of each form")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/results/<gpu>-<date>)")
    return parser.parse_args(argv)


def check_first(device: str, folder: Path) -> None:
    """Runs selftest and keeps its output. Ends the program unless it ends with 0, or with 1: something is wrong."""
    command = [sys.executable, "-m", "simplclip", "selftest", "--device", device, "--json", str(folder / "selftest.json")]
    print(" ".join(command[2:]), flush=True)
    with (
        open(folder / "selftest.txt", "w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run,
    ):
        for line in run.stdout:
            print(line, end="", flush=True)
            file.write(line)
    if run.returncode not in (0, 1):
        sys.exit(f"selftest ended with {run.returncode}, so nothing is measured (--at-once measures all the same)")


def cases(options: argparse.Namespace) -> Iterator[ops.Case]:
    for dtype, name in itertools.product(options.dtypes.split(","), options.ops.split(",")):
        yield from OPS[name](argparse.Namespace(**{**vars(options), "dtypes": dtype}))


def earlier(file: Path, commit: str) -> list[dict]:
    """Returns the rows of a file that need not be measured again."""
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    failed = {row["case"] for row in rows if not row["form"]}
    return [row for row in rows if row["commit"] == commit and row["case"] not in failed]


def main(argv: list[str] | None = None) -> None:
    started, options = time.monotonic(), arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu --sizes 256 tries the program")
    if unknown := set(options.ops.split(",")) - set(OPS):
        sys.exit(f"--ops: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    where = hardware.describe(options.device)
    folder = options.out or RESULTS / f"{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}"
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
            found = case.run()
        except Exception as error:
            found = [{"op": case.op, "note": reason(error)}]
        print("\n".join(table(found)), flush=True)
        state = hardware.gpu_state()
        rows += [{"case": str(case), "form": "", **row, **state, **where} for row in found]
        write_csv(folder / "rows.csv", rows)
    print("\n", *bundle.write_bundle(folder, options.device, rows, left), f"wrote {folder} and {folder}.zip", sep="\n")


if __name__ == "__main__":
    main()
