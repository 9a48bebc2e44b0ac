"""Tables of measurements: for a terminal, and as CSV files that are written atomically."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from benchmarks.hardware import slug
from simplclip.common.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def result_path(op: str, where: dict[str, str], suffix: str = ".csv") -> Path:
    """Returns the path of a result file. where: the columns of `hardware.describe`."""
    return RESULTS / f"{op}-{slug(where['hardware'].split(',')[0])}-{where['date']}{suffix}"


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of an aligned table, with the columns for which some row has a value."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "repeats"))
    columns = [column for column in columns if any(row.get(column, "") != "" for row in rows)]
    widths = [max(len(c), *(len(str(row.get(c, ""))) for row in rows)) for c in columns]
    lines = [dict(zip(columns, columns)), *rows]
    return ["  ".join(str(line.get(c, "")).rjust(w) for c, w in zip(columns, widths)) for line in lines]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict], key: tuple[str, ...] = ()) -> None:
    """Writes the rows. With `key`, rows of an earlier file stay, unless they were measured anew.

    Such a file has rows of several commits; every row names its own.
    """
    path.parent.mkdir(exist_ok=True, parents=True)
    if key and path.exists():
        name = lambda row: tuple(str(row.get(column, "")) for column in key)  # noqa: E731
        measured = {name(row) for row in rows}
        rows = [row for row in read_csv(path) if name(row) not in measured] + rows
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
