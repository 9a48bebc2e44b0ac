"""Compiles the Triton kernels ahead of time and gates what the compiler made of them; needs no GPU.

    make aot                    what the calls of the proof start, on every architecture
    make aot AOT='--arch 86 --dtype bf16'

Prints a line per kernel: registers, shared memory, stack, spills, blocks per multiprocessor,
instructions and tensor-core instructions; the CUDA extension's kernels (where it is built) and the
launches they are planned for in the same table. Exits with 1 if a gate fails.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
import triton

from gates import extension
from gates.gate import LIMITS, measure_all, table
from support.kernels.calls import KINDS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", choices=LIMITS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=KINDS, help="default: all")
    options = parser.parse_args()
    rows = []
    if extension.why_not() is None:
        architectures = set(options.arch or LIMITS)
        if missing := sorted(architectures - extension.built()):
            print(
                f"CUDA extension: not built for {missing}; SIMPLCLIP_CUDA_ARCHS=all pip install -e "
                ". builds for all"
            )
        compiled = extension.compiled(sorted(architectures & extension.built()))
        rows = extension.rows(compiled) + extension.launches(compiled)
    else:
        print(f"CUDA extension: {extension.why_not()}")
    asked = zip(*itertools.product(options.arch or LIMITS, options.dtype or KINDS))
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        rows += itertools.chain(*pool.map(measure_all, *asked))
    print(table(rows))
    failed = sum(bool(row.failures) for row in rows)
    print(
        f"\n{len(rows)} kernels, {failed} failed; triton {triton.__version__}, torch "
        f"{torch.__version__}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
