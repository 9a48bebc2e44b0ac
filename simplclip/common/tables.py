"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, numbers: bool = False) -> Table:
    """Returns a table without frames. numbers: align all columns but the first on the right."""
    made = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if numbers and place else "left")
    for row in rows:
        made.add_row(*row)
    return made
