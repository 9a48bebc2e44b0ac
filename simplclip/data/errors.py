"""Errors of the data, and the counts of what was damaged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from simplclip.common.errors import UserError, visible


class ShardError(UserError, RuntimeError):
    """A shard or sidecar cannot be read or used; the message names it."""


class EmptyDataError(UserError, RuntimeError):
    """Nothing in the data is usable; the message says why."""


class BrokenSample(Exception):
    """A sample is broken: the reason under which it is counted, and a detail."""

    def __init__(self, reason: str, detail: object = "") -> None:
        """Keeps both arguments as attributes; the reason is a few words, e.g. "missing image"."""
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass
class Skipped:
    """Counts of broken samples by reason, and the first sample of each reason with a detail."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str, detail: object = "") -> None:
        """Counts one more sample under `reason`.

        name: of the sample or tar; with `detail`, cut to 500 characters, it becomes the reason's
        example if it is the first.
        """
        self.counts[reason] += 1
        if reason in self.examples:
            return
        text = f"{name}: {str(detail)[:500]}" if str(detail) else name
        self.examples[reason] = visible(text)  # one line, since the detail may quote a file

    def merge(self, other: Skipped) -> None:
        """Adds the counts of `other` to these in place; a reason that has an example keeps it."""
        self.counts += other.counts
        self.examples = other.examples | self.examples

    def take(self) -> Skipped:
        """Returns what was added since the last call, and empties this object."""
        taken = Skipped(self.counts, self.examples)
        self.counts, self.examples = Counter(), {}
        return taken

    def __str__(self) -> str:
        reasons = [
            f"{n} {reason} (first: {self.examples[reason]})"
            for reason, n in self.counts.most_common()
        ]
        total = f"{self.counts.total()} skipped"
        return f"{total}: {', '.join(reasons)}" if reasons else total
