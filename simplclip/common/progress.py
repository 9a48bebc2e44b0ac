"""Progress of long commands: a bar on a terminal, elsewhere a line from time to time and at the end, as logs need it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from simplclip.common import ranks

Item = TypeVar("Item")

FIRST, LATER = 10.0, 60.0  # seconds between two lines, at the start and later


def duration(seconds: float) -> str:
    """ "7 s", or minutes and seconds, "3:10"; with hours "1:03:10"."""
    return f"{seconds:.0f} s" if seconds < 60 else tqdm.format_interval(seconds).lstrip("0")


def _has_terminal() -> bool:
    """Whether errors go to a terminal; one without columns, as containers have them, would show no bar."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return True


class Pace:
    """When a log gets another line: 10 seconds after the start, later less often, but at least once a minute.

    at_most: most seconds between two lines.
    """

    def __init__(self, at_most: float = LATER) -> None:
        self.at_most = at_most
        self.began = self._said = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._said < min(max(FIRST, (now - self.began) / 10), self.at_most):
            return False
        self._said = now
        return True


class Progress:
    """Context that shows how much of `total` is done, how fast it goes and when it ends; `update` may come from any thread.

    Args:
        title: what is going on.
        total: how much there is; None if it is not known.
        done: how much of it an earlier run has done.
        unit: what is counted.
        shown: False shows nothing, as do ranks other than the first.
    """

    def __init__(
        self, title: str, total: int | None = None, done: int = 0, *, unit: str = "samples", shown: bool = True
    ) -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        terminal, shown = _has_terminal(), shown and ranks.first()
        self._lines, self._earlier = shown and not terminal, done
        self._pace, self._lock = Pace(), threading.Lock()
        hidden = not (shown and terminal)
        self._bar = tqdm(total=total, initial=done, desc=title, unit=f" {unit}", disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bar.close()
        if self._lines and kind is None and self._pace.seconds >= 1:
            print(f"{self.title}: {self.done:,} {self.unit} in {duration(self._pace.seconds)}", file=sys.stderr, flush=True)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each of which is counted when it is done."""
        with self:
            for item in items:
                yield item
                self.update()

    def update(self, count: int = 1) -> None:
        with self._lock:
            self.done += count
            self._bar.update(count)
            if self._lines and self._pace.due():
                print(self.line(self._pace.seconds), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """What is said after so many seconds."""
        rate = (self.done - self._earlier) / max(seconds, 1e-9)
        shown = f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"
        if self.total is None:
            return f"{self.title}: {self.done:,} {self.unit}, {shown}"
        share = self.done / self.total if self.total else 1.0
        left = tqdm.format_interval(max(0, self.total - self.done) / rate) if rate else "?"
        return f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({share:.0%}), {shown}, {left} left"
