"""Broken samples, their counts by reason, and broken shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from simplclip.common.errors import UserError


class ShardError(UserError, RuntimeError):
    """A shard cannot be opened, or lacks the files that are needed; the message names it."""


class BrokenSample(Exception):
    """A sample is broken: `args` are the reason under which it is counted, and a detail."""


def printable(text: str) -> str:
    """A name from a tar may hold what no terminal takes, or obeys: half characters, escapes, line ends."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass
class Skipped:
    """Counts of broken samples by reason, and the first sample of each reason with a detail."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str, detail: object = "") -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, printable(f"{place}: {detail}" if str(detail) else place))

    def merge(self, other: Skipped) -> None:
        self.counts += other.counts
        self.examples = other.examples | self.examples

    def take(self) -> Skipped:
        """Returns and removes what was added since the last call."""
        taken = Skipped(self.counts, self.examples)
        self.counts, self.examples = Counter(), {}
        return taken

    def __str__(self) -> str:
        reasons = [f"{n} {reason} (first: {self.examples[reason]})" for reason, n in self.counts.most_common()]
        return f"{self.counts.total()} skipped" + (": " + ", ".join(reasons) if reasons else "")
