"""Pools of processes: how many, and how each one begins."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """Makes a process of a pool ignore Ctrl-C and, on Linux, end with its parent."""
    # Ctrl-C reaches the whole group; the pool ends when the parent has ended it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: it ends with its parent, even if that is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
