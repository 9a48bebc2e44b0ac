"""Tests, then times the ops on a GPU in one go: `python -m benchmarks.gpu`.

Runs `pytest -m gpu` first and refuses to time anything while a test is red. Then shaped attention and the simplified block
with their peers (SDPA, FlexAttention, open_clip's block, torch.compile, xformers where it is installed), and similarity_loss
with its own (open_clip, torch.compile; Inf-CLIP, memeff and siglip-kernel where they are installed) at every N, take turns; a
loss that does not fit in memory says so. Prints the rows and writes benchmarks/results/<gpu>-<date>.csv after every step, so
that an interrupted run keeps what it measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import attention_forms, block_forms, hardware
from benchmarks.results_file import RESULTS, table, write_csv
from benchmarks.similarity_forms import OBJECTIVES, measure

CORRECTNESS = {
    "cuda": ["-m", "gpu"],
    "cpu": [
        *(
            f"tests/ops/test_{name}.py"
            for name in ("similarity_loss", "similarity_distillation", "shaped_attention", "simplified_block")
        ),
        "-k",
        "cpu and dtype0",
    ],
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program without a GPU")
    parser.add_argument("--sizes", default="1024,4096,16384,32768,65536", help="batch sizes N")
    parser.add_argument("--width", type=int, default=512, help="embedding width D")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--sequences", type=float, default=1.0, help="share of the blocks' batches: 0.1 for a trial")
    parser.add_argument("--repeats", type=int, default=10, help="interleaved repeats of each form")
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/<gpu>-<date>.csv)")
    return parser.parse_args(argv)


def check(device: str) -> None:
    """Ends with the tests' output if one fails, or if none ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *CORRECTNESS[device]]
    print("correctness:", " ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=hardware.ROOT, capture_output=True, text=True)
    tail = "\n".join(done.stdout.splitlines()[-25:])
    print(tail.splitlines()[-1] if tail else "", flush=True)
    if done.returncode or " passed" not in tail:
        sys.exit(f"the tests are not green, so nothing is timed:\n{tail}\n{done.stderr[-2000:]}")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"--device cuda: torch {torch.__version__} sees no CUDA device; --device cpu --sizes 256 tries the program")
    where = hardware.describe(options.device)
    out = options.out or RESULTS / f"{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}.csv"
    check(options.device)
    rows: list[dict] = []

    def keep(found: list[dict]) -> None:
        print("\n".join(table(found)), flush=True)
        rows.extend(found)
        write_csv(out, [{**row, **where} for row in rows])

    for dtype, backward in itertools.product(options.dtypes.split(","), (False, True)):
        for shape in attention_forms.SHAPES:
            shape = dataclasses.replace(shape, b=max(1, int(shape.b * options.sequences)))
            keep(attention_forms.measure(shape, dtype, backward, options.repeats, options.device))
        batch = max(1, int(block_forms.BATCH * options.sequences))
        keep(block_forms.measure(dtype, backward, options.repeats, options.device, batch=batch))
    for n in map(int, options.sizes.split(",")):
        for dtype in options.dtypes.split(","):
            for objective in OBJECTIVES:
                keep(measure(objective, n, options.width, dtype, options.repeats, options.device))
    print(f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}: wrote {out}")


if __name__ == "__main__":
    main()
