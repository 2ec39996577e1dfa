"""How a run is asked to end: signals become a question that it asks itself."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP into a question, so that cleaning up is never cut short.

    `count` says how often somebody asked; from the second time on waiting politely ends. A Ctrl-C
    that comes from the terminal and once more from the script that started this program is one.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ONE_REQUEST_SECONDS = 1.0

    def __init__(self) -> None:
        """Start with nobody having asked."""
        self.count = 0
        self._last_seconds = -math.inf

    @property
    def requested(self) -> bool:
        """Whether somebody asked this run to end."""
        return self.count > 0

    def request(self) -> None:
        """Ask the run to end, as a signal does."""
        now = time.monotonic()
        if now - self._last_seconds >= self.ONE_REQUEST_SECONDS:
            self.count += 1
            self._last_seconds = now

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopSignal]:
        """Catch the signals inside the block; outside they do what they did before.

        One that is ignored stays so, as SIGHUP under nohup.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            self.request()

        caught = [one for one in self.SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, handle) for number in caught}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
