"""Stops a run between two steps instead of in the middle of one."""

from __future__ import annotations

import os
import signal
import threading


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; the second one ends the process at once.

    Outside the main thread Python allows no handlers, so that signals are not handled.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._process = os.getpid()
        self._former: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if os.getpid() != self._process:
            # A forked loader process gets Ctrl-C too, but the last step needs it; SIGTERM ends it.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        # Not print(): a handler may run in the middle of one, and Python's buffered files are not reentrant.
        os.write(2, f"\n{self.requested}: finishing this step, then saving; a second signal stops at once\n".encode())
