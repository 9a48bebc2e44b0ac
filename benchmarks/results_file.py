"""Tables of measurements: for a terminal, and as CSV files that are written atomically."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from simplclip.common.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def table(rows: list[dict]) -> list[str]:
    """Returns the lines of an aligned table, with the columns for which some row has a value."""
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "repeats"))
    columns = [column for column in columns if any(row.get(column, "") != "" for row in rows)]
    widths = [max(len(c), *(len(str(row.get(c, ""))) for row in rows)) for c in columns]
    lines = [dict(zip(columns, columns)), *rows]
    return ["  ".join(str(line.get(c, "")).rjust(w) for c, w in zip(columns, widths)) for line in lines]


def write_csv(path: Path, rows: list[dict], key: tuple[str, ...] = ()) -> None:
    """Writes the rows. With `key`, rows of an earlier file with the same columns stay, unless they were measured anew.

    Such a file has rows of several commits; every row names its own.
    """
    path.parent.mkdir(exist_ok=True, parents=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if key and path.exists():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            before = list(reader) if reader.fieldnames == columns else []
        name = lambda row: tuple(str(row.get(column, "")) for column in key)  # noqa: E731
        measured = {name(row) for row in rows}
        rows = [row for row in before if name(row) not in measured] + rows
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
