"""Counts the machine code of the GPU kernels and predicts how fast they are; needs no GPU.

    PYTHONPATH=tests python -m benchmarks.machine_code
        every kernel with the tiles of kernels/tuning.py, on every architecture
    PYTHONPATH=tests python -m benchmarks.machine_code --kernel gradient --arch 86 \\
            --tile 128x64x32/4/3/248
        some kernels with a tile: block sides, warps, stages, registers of a thread at most
    PYTHONPATH=tests python -m benchmarks.machine_code --write
        also writes benchmarks/results/machine-code-*.csv, and prints the constants of
        simplclip/plan/time.py; those of kernels and architectures that are not asked for stay
    PYTHONPATH=tests python -m benchmarks.machine_code --peers
        kernels of others, predicted and measured, as benchmarks/results/peers-predicted-*.csv
    PYTHONPATH=tests python -m benchmarks.machine_code --chunks
        losses by kernels, and by cuBLAS in chunks, as benchmarks/results/chunks-predicted-*.csv

Columns: regs, KiB (shared memory), spills, programs on a multiprocessor; in the loop over the width
instructions for each tensor-core instruction, and what issue, shared memory and L2 cache take in
per cent of the time of the tensor cores; instructions for an element outside of the loop (rest),
and what their issue and exponentials take in per cent of that time; the predicted share of the data
sheet's rate, and what bounds it. pipes.py has the model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.machine_code import chunks, peers
from benchmarks.machine_code.kernels import ATTENTION, CASES, WIDTH, attention, compiled
from benchmarks.machine_code.pipes import ARCHITECTURES, Prediction
from benchmarks.machine_code.sass import LANES
from benchmarks.results_file import RESULTS, read_csv, table, versions, write_csv
from gates import extension
from gates.gate import Row
from simplclip.kernels.tuning import Tile

WIDTHS = (512, 768)


def parse_tile(text: str) -> Tile:
    """Returns the tile of a text such as 128x64x32/4/3 or 128x64x32/4/3/248."""
    try:
        sides, warps, stages, *limit = text.split("/")
        block_m, block_n, block_k = map(int, sides.split("x"))
        (registers,) = map(int, limit) if limit else (None,)
        return Tile(block_m, block_n, block_k, int(warps), int(stages), registers=registers)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected block sides, warps, stages such as 128x64x32/4/3, got {text!r}"
        ) from None


def tile_text(tile: Tile) -> str:
    """Returns the text that `parse_tile` reads."""
    numbers = (tile.warps, tile.stages, tile.registers)
    sides = "x".join(map(str, tile[:3]))
    return "/".join([sides, *(str(number) for number in numbers if number)])


def described(name: str, row: Row, tile: str, width: int, found: Prediction) -> dict[str, object]:
    """Returns a row of the table."""
    loop = {f"loop {pipe} %": found.products[pipe] for pipe in ("issue", "shared", "l2")}
    rest = {f"rest {pipe} %": found.rest[pipe] for pipe in ("issue", "mufu")}
    return {
        "kernel": name,
        "sm": row.architecture,
        "tile": tile,
        "D": width,
        "regs": row.registers,
        "KiB": round(row.shared / 1024),
        "spills": row.spills,
        "programs": row.blocks,
        "instr/MMA": round(found.per_mma, 1),
        **{column: round(100 * share) for column, share in (loop | rest).items()},
        "share": round(found.share, 2),
        "bound": found.bound,
    }


def rows(
    architectures: Sequence[int], names: Sequence[str], widths: Sequence[int], tile: Tile | None
) -> Iterator[dict[str, object]]:
    """Yields a row for each kernel whose name begins so, architecture and width."""
    for case in CASES:
        if not case.name.startswith(tuple(names)):
            continue
        for architecture in architectures:
            counted = compiled(case, architecture, tile)
            for width in widths:
                found = counted.predicted(width)
                text = tile_text(counted.tile)
                row = described(case.name, counted.row, text, width, found)
                elements = counted.tile.block_m * counted.tile.block_n
                rest = found.elsewhere * counted.tile.warps * LANES / elements
                yield row | {"rest": round(rest, 1)}
    built = set() if extension.why_not() else extension.built()
    for architecture in built.intersection(architectures):
        for direction, row, found in attention(architecture):
            if f"attention {direction}".startswith(tuple(names)):
                yield described(f"attention {direction}", row, row.tile, WIDTH, found)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with an error for options that do not fit each other, or the extension."""
    of_extension = [f"attention {direction}" for direction in ATTENTION]
    names = [case.name for case in CASES] + of_extension
    for name in options.kernel:
        if not any(known.startswith(name) for known in names):
            parser.error(f"--kernel: expected the beginning of one of {names}, got {name!r}")
    if options.write and options.tile:
        parser.error("--write: expected the tiles of kernels/tuning.py, got --tile")
    built = set() if extension.why_not() else extension.built()
    missing = set(options.arch) - built
    asked = any(name.startswith(tuple(options.kernel)) for name in of_extension)
    if options.write and asked and missing:
        parser.error(
            f"--write: expected a CUDA extension for {sorted(missing)} (SIMPLCLIP_CUDA_ARCHS=all) "
            f"or --kernel without attention, got {sorted(built)}"
        )


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks.machine_code", description=__doc__, formatter_class=raw
    )
    parser.add_argument("--kernel", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--width", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--tile", type=parse_tile, help="instead of the table's")
    parser.add_argument("--peers", action="store_true", help="kernels of others")
    parser.add_argument("--chunks", action="store_true", help="losses by cuBLAS in chunks")
    parser.add_argument("--write", action="store_true", help="write a result file")
    options = parser.parse_args(argv)
    check(parser, options)
    where = versions()
    for name, of in (("peers", peers.rows), ("chunks", chunks.rows)):
        if getattr(options, name):
            found = list(of())
            print("\n".join(table(found)))
            path = RESULTS / f"{name}-predicted-{where['date']}.csv"
            write_csv(path, [row | where for row in found])
            if name == "peers":
                print(f"CALIBRATION = {peers.calibration(found)}")
            return
    found = []
    for row in rows(options.arch, options.kernel, options.width, options.tile):
        found.append(row)
        print(".", end="", file=sys.stderr, flush=True)
    print("\n".join(table(found)))
    if options.write:
        path = RESULTS / f"machine-code-{where['date']}.csv"
        if not path.exists():
            write_csv(path, read_csv(max(RESULTS.glob("machine-code-*.csv"))))
        write_csv(path, [row | where for row in found], ("kernel", "sm", "D"))
        print("OWN_RATES = {")
        for kind, shares in own_rates(read_csv(path)).items():
            print(f"    {json.dumps(kind)}: {shares},")
        print("}")


def own_rates(of_file: Sequence[Mapping[str, str]]) -> dict[str, tuple[float, ...]]:
    """Returns the constants of simplclip/plan/time.py: shares by kernel, for each architecture."""
    shares: dict[str, dict[int, float]] = {}
    for row in of_file:
        if row["D"] in (str(WIDTHS[0]), str(WIDTH)):
            shares.setdefault(row["kernel"], {})[int(row["sm"])] = float(row["share"])
    return {
        f"own {kernel}": tuple(of_kernel[sm] for sm in ARCHITECTURES)
        for kernel, of_kernel in sorted(shares.items())
    }


if __name__ == "__main__":
    main()
