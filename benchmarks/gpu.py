"""Checks and measures this library on a GPU in one go: `python -m benchmarks.gpu`.

Runs `simplclip selftest`, then the benchmarks of test_ops.py, each op in a process of its own, so
that a crash ends one op alone. Writes selftest.json, the JSON of each op and log.txt into a folder,
by default benchmarks/results/DEVICE-DATE. Further options go to pytest: `--device cpu -k small`
tries the program without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.losses import LOSSES
from benchmarks.modules import MODULES

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("step", "contrastive")  # the most useful ones


def called(command: list[str], log: Path) -> int:
    """Runs a command of Python in the repository, shows and logs what it prints."""
    with open(log, "a") as file:
        print("$ python -m", *command, file=file, flush=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, **pipes) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
    return process.returncode


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ops = [*FIRST, *(op for op in LOSSES | MODULES if op not in FIRST)]
    parser.add_argument("--ops", default=",".join(ops), help="in this order")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options, of_pytest = parser.parse_known_args(arguments)
    name = "cpu"
    if options.device == "cuda":
        if not torch.cuda.is_available():
            parser.error(f"--device: expected cpu, got cuda, which torch {torch.__version__} lacks")
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
    out = options.out or ROOT / "benchmarks" / "results" / f"{name}-{datetime.date.today()}"
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log, device = out / "log.txt", ["--device", options.device]
    code = called(["simplclip", "selftest", *device, "--json", f"{out / 'selftest.json'}"], log)
    if code not in (0, 1):  # 1: an op is wrong, which it names
        sys.exit(f"selftest: expected exit code 0 or 1, got {code}; nothing was measured")
    codes = [code]
    for op in options.ops.split(","):
        tests = ["pytest", "benchmarks", "-q", *device, f"--op={op}", *of_pytest]
        codes.append(called([*tests, f"--benchmark-json={out / op}.json"], log))
    print(f"wrote {out}")
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
