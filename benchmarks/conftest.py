"""Collects the rows of all benchmarks of a session, prints them as one table and writes one CSV
file per op.
"""

import pytest

from benchmarks.results_file import describe, result_path, table, write_csv

ROWS = pytest.StashKey[list]()
KEY = ("op", "objective", "n", "d", "shape", "dtype", "pass", "form")


def pytest_addoption(parser):
    parser.addoption(
        "--sizes",
        default="4096,8192,16384",
        help="batch sizes N of the losses' benchmarks, comma-separated",
    )
    parser.addoption("--repeats", type=int, default=5, help="interleaved repeats of each form")
    parser.addoption(
        "--write", action="store_true", help="write benchmarks/results/<op>-<hardware>-<date>.csv"
    )


def pytest_generate_tests(metafunc):
    if "n" in metafunc.fixturenames:
        metafunc.parametrize("n", [int(n) for n in metafunc.config.getoption("--sizes").split(",")])


@pytest.fixture
def measured(benchmark, request):
    """Runs a function once, with `repeats` as its last argument, and keeps its rows."""
    rows = request.config.stash.setdefault(ROWS, [])

    def run(function, *arguments):
        arguments += (request.config.getoption("--repeats"),)
        rows.extend(benchmark.pedantic(function, args=arguments, rounds=1))

    return run


def pytest_terminal_summary(terminalreporter, config):
    collected = config.stash.get(ROWS, [])
    if not collected:
        return
    where = describe()
    terminalreporter.section(
        f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}"
    )
    for line in table(collected):
        terminalreporter.write_line(line)
    if config.getoption("--write"):
        for op in dict.fromkeys(row["op"] for row in collected):
            path = result_path(op, where)
            write_csv(path, [{**row, **where} for row in collected if row["op"] == op], key=KEY)
            terminalreporter.write_line(f"wrote {path}")
