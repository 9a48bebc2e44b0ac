"""Lines of long commands, and their progress: rich's bar, in logs a line from time to time."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta

from rich import progress
from rich.console import Console
from rich.text import Text

from simplclip.common.errors import visible

WARNING = re.compile(r"warning\b|.* skipped: ")  # begins such a line
FIRST, LATER = 10.0, 60.0  # seconds between two lines, at the start and later
REDRAWN = 0.1  # seconds between two drawings of a bar


def duration(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds: "0:03:10", "1:03:10"."""
    return str(timedelta(seconds=int(seconds)))


def print_lines(text: str, console: Console | None = None) -> None:
    """Prints text with escapes in place of control characters, on a terminal warnings in yellow."""
    console = console or Console()
    for line in text.split("\n"):
        style = "yellow" if WARNING.match(line) else ""
        console.print(Text(visible(line), style), soft_wrap=True)


class Pace:
    """Times at which a log gets a line: FIRST seconds after the start, later less often.

    at_most: largest number of seconds between two lines.
    """

    def __init__(self, at_most: float = LATER) -> None:
        self.at_most = at_most
        self.began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def due(self) -> bool:
        """Whether it is time for a line; if so, the time until the next one begins."""
        seconds = min(max(FIRST, self.seconds / 10), self.at_most)
        if time.monotonic() - self._last < seconds:
            return False
        self._last = time.monotonic()
        return True


class Progress:
    """Context that shows on stderr how much of `total` is done, since when and when it ends.

    done: what an earlier run has done. unit: plural noun of what is counted. Ranks other than the
    first never show anything.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        done: int = 0,
        *,
        unit: str = "samples",
        shown: bool = True,
    ) -> None:
        console = Console(stderr=True)
        shown = shown and os.environ.get("RANK", "0") == "0"
        self._has_lines = shown and not console.is_interactive
        self._pace = Pace(LATER if self._has_lines else REDRAWN)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(20),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            auto_refresh=False,  # by a thread, which would be at work while workers fork
            disable=not shown or self._has_lines,
        )
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, count: int) -> None:
        """Adds `count` units to those done, and redraws the bar or prints a line if one is due."""
        self._bar.update(self._task, advance=count)
        if self._pace.due():
            self._bar.refresh()
            if self._has_lines:
                self._bar.print(self._bar.get_renderable())
