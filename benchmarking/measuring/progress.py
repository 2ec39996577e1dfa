"""How far a run is, told while it goes on."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any


class Progress:
    """Tells how far a run is, on standard error, with the time since the start.

    On a terminal the stage at work has a live line with its seconds left.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._start_seconds = time.monotonic()
        self._live: Any = None

    def say(self, text: str) -> None:
        """Print one line; a run goes on where nobody can read it any more."""
        line = f"[{time.monotonic() - self._start_seconds:7.1f} s] {text}"
        with contextlib.suppress(OSError):
            if self._live is not None:
                self._live.console.print(line, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, text: str, seconds: float | None) -> Iterator[None]:
        """Say that a stage of about so many seconds begins, and show it until it is over."""
        self.say(f"{text} (about {seconds:.0f} s)" if seconds else text)
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        begin_seconds = time.monotonic()

        def left() -> str:
            spent = time.monotonic() - begin_seconds
            remaining = (seconds or 0.0) - spent
            told = f"about {remaining:.0f} s left" if remaining > 0 else f"{spent:.0f} s"
            return f"  … {text}: {told}"

        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        live = Live(console=console, get_renderable=left, transient=True, refresh_per_second=2)
        with contextlib.suppress(OSError):
            live.start()
        self._live = live
        try:
            yield
        finally:
            self._live = None
            with contextlib.suppress(OSError):
                live.stop()
