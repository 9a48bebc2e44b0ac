"""Collects the rows of all benchmarks of a session, prints them as one table and writes one CSV file per op."""

import csv
import os
from pathlib import Path

import pytest

from benchmarks import hardware

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser):
    parser.addoption("--sizes", default="4096,16384,32768", help="batch sizes N of the losses' benchmarks, comma-separated")
    parser.addoption("--repeats", type=int, default=5, help="interleaved repeats of each form")
    parser.addoption("--write", action="store_true", help="write benchmarks/results/<op>-<hardware>-<date>.csv")


def pytest_generate_tests(metafunc):
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", [int(n) for n in metafunc.config.getoption("--sizes").split(",")])


@pytest.fixture(scope="session")
def rows(request):
    collected: list[dict] = []
    request.config.stash[ROWS] = collected
    return collected


ROWS = pytest.StashKey[list]()


def pytest_terminal_summary(terminalreporter, config):
    collected = config.stash.get(ROWS, [])
    if not collected:
        return
    where = hardware.describe()
    terminalreporter.section(f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}")
    columns = [column for column in collected[0] if column not in ("op", "repeats")]
    widths = [max(len(c), *(len(str(row.get(c, ""))) for row in collected)) for c in columns]
    for row in [dict(zip(columns, columns)), *collected]:
        terminalreporter.write_line("  ".join(str(row.get(c, "")).rjust(w) for c, w in zip(columns, widths)))
    if config.getoption("--write"):
        for op in dict.fromkeys(row["op"] for row in collected):
            path = RESULTS / f"{op}-{hardware.slug(where['hardware'].split(',')[0])}-{where['date']}.csv"
            write_csv(path, [{**row, **where} for row in collected if row["op"] == op])
            terminalreporter.write_line(f"wrote {path}")


def write_csv(path: Path, table: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    os.replace(temporary, path)
