"""How a run is asked to end: by signals, and by the death of the driver script that started it."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from types import FrameType

# Set by the drivers to their own pid.
DRIVER_VARIABLE = "GPU_SHARING_DRIVER_PID"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
        """Catch the signals inside the block; outside they do what they did before."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.request()

        previous = {number: signal.signal(number, handle) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def end_with_driver(environment: Mapping[str, str]) -> None:
    """Ask the kernel for a SIGTERM when the driver script dies that started this process.

    Without one, or where the variable was only inherited, nothing is asked for. To be called once
    SIGTERM ends a run in an orderly way.
    """
    driver = environment.get(DRIVER_VARIABLE, "")
    if not driver.isdecimal() or os.getppid() != int(driver):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(driver):  # it died just before
        os.kill(os.getpid(), signal.SIGTERM)
