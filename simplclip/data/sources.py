"""Parts of the data: shards, with their weights."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from simplclip.data.broken import Skipped
from simplclip.data.shards import Sample, ShardError, read_shard
from simplclip.data.sidecars import Folders

RETRIES = (0.2, 1.0, 5.0)  # seconds to wait before a shard that could not be read is tried again


@dataclass(frozen=True)
class Part:
    """What one worker reads in order: a shard.

    weight: how often an epoch has each of its samples; of a fraction a random share of the samples is taken.
    """

    url: str
    weight: float = 1.0

    @property
    def name(self) -> str:
        return os.path.basename(self.url)


def read_part(part: Part, skipped: Skipped, *, ahead: bool = False, sidecars: Folders = ()) -> Iterator[Sample]:
    """The samples of a part. One that cannot be read is tried again, from where it failed, and then raises ShardError."""
    given = 0
    for wait in (*RETRIES, None):
        try:
            for sample in islice(read_shard(part.url, skipped, ahead=ahead, sidecars=sidecars), given, None):
                given += 1
                yield sample
            return
        except ShardError:
            if wait is None:
                raise
            time.sleep(wait)
