"""Lines of long commands, and their progress: a bar on a terminal, elsewhere a line from time to
time and at the end, as logs need it.
"""

from __future__ import annotations

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
    if seconds < 60:
        return f"{seconds:.0f} s"
    return _clock(seconds).removeprefix("0")


def _clock(seconds: float) -> str:
    """Returns seconds as "03:10", or with hours "1:03:10"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def print_lines(text: str, console: Console | None = None) -> None:
    """Prints text with escapes in place of control characters, on a terminal warnings in yellow."""
    console = console or Console()
    for line in text.split("\n"):
        style = "yellow" if WARNING.match(line) else ""
        console.print(Text(visible(line), style), soft_wrap=True)


def _first_rank() -> bool:
    """Whether this process is the first rank."""
    # only commands that load `common.ranks`, and torch by it, have several
    ranks = sys.modules.get("simplclip.common.ranks")
    return ranks is None or ranks.first()


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
        self.title = title
        self.total = total
        self.done = done
        self.unit = unit
        self._shown = shown and _first_rank()
        self._earlier = done
        console = Console(stderr=True)
        self._has_bar = self._shown and sys.stderr.isatty() and not console.is_dumb_terminal
        self._pace = Pace(REDRAWN if self._has_bar else LATER)
        # Drawn by `update` alone: a thread would be at work while workers fork.
        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task(self._line(), total=total)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._draw()
        self._bar.stop()
        if self._has_bar or not self._shown or kind is not None or self._pace.seconds < 1:
            return
        taken = duration(self._pace.seconds)
        print(f"{self.title}: {self.done:,} {self.unit} in {taken}", file=sys.stderr, flush=True)

    def update(self, count: int) -> None:
        """Adds `count` units to those done, and redraws the bar or prints a line if one is due."""
        self.done += count
        if not (self._shown and self._pace.due()):
            return
        if self._has_bar:
            self._draw()
        else:
            print(self._line(), file=sys.stderr, flush=True)

    def _draw(self) -> None:
        self._bar.update(self._task, completed=self.done, description=self._line(), refresh=True)

    def _line(self) -> str:
        """Returns a line for a log: units done, of how many, the speed and the time left."""
        rate = (self.done - self._earlier) / max(self._pace.seconds, 1e-9)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"
        speed += f" {self.unit}/s"
        if self.total is None:
            return f"{self.title}: {self.done:,} {self.unit}, {speed}"
        share = self.done / self.total if self.total else 1.0
        left = _clock(max(0, self.total - self.done) / rate) if rate else "?"
        return (
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({share:.0%}), {speed}, "
            f"{left} left"
        )
