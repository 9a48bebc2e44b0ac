"""Whether what one run holds out was trained on by another run, told by names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from simplclip.data.errors import BrokenSample
from simplclip.data.find_sources import Address, sources_of
from simplclip.data.read_tars import read_texts
from simplclip.data.samples import Sample, captions_of, is_held_out, picture_of, record_of

MOST_BYTES = 1 << 34  # of a run's tars whose names are read; that takes seconds


class Overlap(NamedTuple):
    """Samples that a run holds out, and how many of these another run has trained on."""

    held_out: int
    trained: int


def overlap(division: Mapping[str, Any], other: Mapping[str, Any]) -> Overlap | None:
    """Returns how many samples that `division` holds out were trained on in `other`, or None.

    Samples are the same if their images have the same paths in their collections; where `pack` has
    not written these, if the keys and the first captions are the same. Both are training data with
    a held-out share, as `data.held_out` takes them. None if tars are streams or have more than
    MOST_BYTES.
    """
    if dict(division) == dict(other):  # nothing needs to be read
        return Overlap(0, 0)
    held_out, trained = _names(division, True), _names(other, False)
    if held_out is None or trained is None:
        return None
    return Overlap(len(held_out), len(held_out & trained))


def _names(division: Mapping[str, Any], held_out: bool) -> set[str] | None:
    """Returns the names of the samples of one side, held out or not; None as `overlap`."""
    sources = {source.url: source for source in sources_of(division["shards"])}
    if any(isinstance(url, Address) for url in sources):
        return None
    if sum(map(os.path.getsize, sources)) > MOST_BYTES:
        return None
    names = set()
    for source in sources.values():
        for sample in read_texts(source, division["sidecars"]):
            side = is_held_out(sample, division["hold_out"], division["hold_out_by"])
            if side == held_out and (name := _name(sample)):
                names.add(name)
    return names


def _name(sample: Sample) -> str | None:
    """Returns what names a sample in copies of its collection; None for a broken one."""
    try:
        record = record_of(sample)
        return picture_of(record) or f"{sample['__key__']}: {captions_of(sample, record)[0]}"
    except BrokenSample:
        return None
