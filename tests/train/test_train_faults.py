"""Faults at random moments of training; SIMPLCLIP_FAULTS=30 for the long proof, a sample without it."""

import itertools
import sys

import pytest
from faults import FAULTS, KINDS, Faults


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loader processes are found in /proc, tmpfs is Linux's")
def test_the_last_whole_step_is_there_or_the_reason_is_said(tmp_path):
    faults = Faults(tmp_path)
    try:
        for kind in itertools.islice(itertools.cycle(KINDS), FAULTS):
            faults.meet(kind)
    finally:
        faults.close()
        for outcome, count in sorted(faults.counts.items()):
            print(f"{count:3} {outcome}")
    assert sum(faults.counts.values()) == FAULTS
