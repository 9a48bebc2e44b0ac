"""Signals that end a run after a whole step: a context that notes them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console

from simplclip.common import ranks
from simplclip.common.errors import UserError


class Interrupted(UserError):
    """The end of a run by a signal, after a whole step whose state is saved."""


class Stopped(Exception):
    """An evaluation that gives way to a signal."""


class StopSignals:
    """Context in which a signal or a closed pipe only sets `reason`; Ctrl-C after it ends all.

    Outside the main thread Python allows no handlers for SIGINT, SIGTERM and SIGHUP. If the reader
    of the console's output is gone (`| head`), all further output is dropped.
    """

    def __init__(self, console: Console) -> None:
        """Sets no handlers yet; entering the context does."""
        self.console = console
        self.reason: str | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                # nohup, and a shell's background job, ignore signals
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._handle)
        self.console.on_broken_pipe = self._redirect_to_null  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self.console.on_broken_pipe
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def agree_to_stop(self) -> bool:
        """Whether any rank has noted a stop; sets `reason` on all. All have to call it."""
        stopped = any(ranks.all_gather(self.reason is not None))
        if stopped and self.reason is None:
            self.reason = "signal to another rank"
        return stopped

    def check(self) -> None:
        """Raises Stopped if a stop is noted. Several ranks, which would wait, go on."""
        if self.reason is not None and ranks.count() == 1:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Notes a signal in `reason` and, on the first rank, says so on the standard error."""
        if os.getpid() != self._process:  # a loader process, which the last step needs
            return
        several = ranks.count() > 1  # torchrun repeats the signals that it gets
        if self.reason and not several:
            # one event may send the others twice: a closed terminal, `timeout`
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.reason = signal.Signals(number).name
        if not ranks.first():
            return
        message = f"\n{self.reason}: finishing this step, then saving"
        if not several:
            message += "; Ctrl-C then stops at once"
        # Not print(): a handler may interrupt a print, and Python's buffered files are not
        # reentrant.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"{message}\n".encode())

    def _redirect_to_null(self) -> None:
        """Drops all further output, in place of a BrokenPipeError that rich would raise."""
        self.reason = self.reason or "closed pipe"
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.console.file.fileno())
