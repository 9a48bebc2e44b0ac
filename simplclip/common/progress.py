"""Lines of long commands, and their progress: rich's bar on a terminal, elsewhere a line from time
to time and at the end, as logs need it.
"""

from __future__ import annotations

import os
import re
import sys
import time

from rich import progress
from rich.console import Console
from rich.text import Text

from simplclip.common.errors import visible

WARNING = re.compile(r"warning\b|.* skipped: ")  # begins such a line
FIRST, LATER = 10.0, 60.0  # seconds between two lines, at the start and later
REDRAWN = 0.1  # seconds between two drawings of a bar


def duration(seconds: float) -> str:
    """Returns seconds as text: "7 s", "3:10" (minutes and seconds) or "1:03:10" (with hours)."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{seconds:.0f} s"


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
        now = time.monotonic()
        if now - self._last < min(max(FIRST, (now - self.began) / 10), self.at_most):
            return False
        self._last = now
        return True


class Progress:
    """Context that shows on stderr how much of `total` is done, how fast it goes and when it ends.

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
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self._earlier = done
        self._shown = shown and os.environ.get("RANK", "0") == "0"
        console = Console(stderr=True)
        self._has_bar = self._shown and console.is_interactive
        self._pace = Pace(REDRAWN if self._has_bar else LATER)
        # Drawn by `update` alone: a thread would be at work while workers fork.
        columns = progress.BarColumn(), progress.TextColumn("{task.description}", markup=False)
        self._bar = progress.Progress(
            *columns, console=console, auto_refresh=False, disable=not self._has_bar
        )
        self._task = self._bar.add_task(self._line(), total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._draw()
        self._bar.stop()
        if self._shown and not self._has_bar and kind is None and self._pace.seconds >= 1:
            taken = duration(self._pace.seconds)
            print(f"{self.title}: {self.done:,} {self.unit} in {taken}", file=sys.stderr)

    def update(self, count: int) -> None:
        """Adds `count` units to those done, and redraws the bar or prints a line if one is due."""
        self.done += count
        if self._shown and self._pace.due():
            self._draw()
            if not self._has_bar:
                print(self._line(), file=sys.stderr)

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self.done, description=self._line(), refresh=True)

    def _line(self) -> str:
        """Returns a line for a log: units done, of how many, the speed and the time left."""
        rate = (self.done - self._earlier) / max(self._pace.seconds, 1e-9)
        speed = f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s"
        if not self.total:
            return f"{self.title}: {self.done:,} {self.unit}, {speed}"
        left = duration(max(0, self.total - self.done) / rate) if rate else "?"
        share = f"{self.total:,} {self.unit} ({self.done / self.total:.0%})"
        return f"{self.title}: {self.done:,} of {share}, {speed}, {left} left"
