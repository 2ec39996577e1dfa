"""What a person sees while a workload runs: notes, warnings, how far it has come.

Everything goes to standard error; standard output is left to results. On a terminal one line is
written again and again; elsewhere a line comes now and then.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from workloads.common.errors import printable

LIVE_PERIOD_SECONDS = 0.5
PLAIN_STAGE_PERIOD_SECONDS = 15.0
PLAIN_PROGRESS_PERIOD_SECONDS = 5.0
BAR_WIDTH = 30
CLEAR_LINE = "\r\033[K"
# An estimate takes this many pieces, and is told from this length on; advice comes with long ones.
ESTIMATE_PIECES = 3
ESTIMATE_SECONDS = 60.0
ADVICE_SECONDS = 600.0

# What is going on, the innermost last: it takes the place of the others in the line.
_shown: list[Progress] = []


def note(text: str) -> None:
    """Print one line of information; nobody may be there to read, which must not end the work."""
    begin = CLEAR_LINE if _shown and sys.stderr.isatty() else ""
    with suppress(OSError):
        print(begin + printable(text), file=sys.stderr, flush=True)


def loud_warning(text: str) -> None:
    """Print a warning that cannot be overlooked: what follows is not what the reader expects."""
    bar = "!" * 78
    note(f"{bar}\nWARNING: {text}\n{bar}")


class Progress:
    """Counts finished pieces of work, or the seconds of what has no end in sight."""

    def __init__(self, total: int | None, description: str, advice: str | None) -> None:
        self._total, self._description, self._advice = total, description, advice
        self._finished, self._detail = 0, ""
        self._begin_seconds = time.monotonic()

    def __str__(self) -> str:
        """Return the line that is shown."""
        if self._total is None:
            return f"{self._description}: {time.monotonic() - self._begin_seconds:.0f} s"
        share = self._finished / max(1, self._total)
        bar = "#" * round(BAR_WIDTH * share)
        line = f"{self._description} [{bar:<{BAR_WIDTH}}] {self._finished}/{self._total}"
        left = f", {_duration(self._whole_seconds() * (1 - share))} left" if self._finished else ""
        return f"{line} {self._detail}".rstrip() + left

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        """Report ``pieces`` more as finished; ``detail`` is shown next to the count."""
        self._finished += pieces
        self._detail = detail
        if self._finished == ESTIMATE_PIECES and self._advice is not None:
            seconds = self._whole_seconds()
            advice = f"; try {self._advice}" if seconds >= ADVICE_SECONDS else ""
            if seconds >= ESTIMATE_SECONDS:
                note(f"about {_duration(seconds)} on this CPU{advice}")

    def _whole_seconds(self) -> float:
        pieces = self._total or self._finished
        return (time.monotonic() - self._begin_seconds) / self._finished * pieces


@contextmanager
def progress(total: int | None, description: str, advice: str | None = None) -> Iterator[Progress]:
    """Show how far ``total`` pieces of work have come, and what time is left.

    ``advice`` are flags of a shorter job; given on a CPU, where a job may take hours, and then the
    time that it will take is told after a few pieces.
    """
    over = threading.Event()
    shower = threading.Thread(target=_show, args=(over, total is None), daemon=True)
    _shown.append(Progress(total, description, advice))
    if len(_shown) == 1:
        shower.start()
    try:
        yield _shown[-1]
    finally:
        over.set()
        if len(_shown) == 1:
            shower.join()
        _shown.pop()


def stage(text: str) -> AbstractContextManager[Progress]:
    """Show that something without an end in sight goes on: ``loading``, ``warming up``."""
    return progress(None, text)


def _show(over: threading.Event, is_stage: bool) -> None:
    is_live = sys.stderr.isatty()
    plain_seconds = PLAIN_STAGE_PERIOD_SECONDS if is_stage else PLAIN_PROGRESS_PERIOD_SECONDS
    while not over.wait(LIVE_PERIOD_SECONDS if is_live else plain_seconds):
        if is_live:
            line = printable(_shown[-1])[: shutil.get_terminal_size().columns - 1]
            print(CLEAR_LINE + line, end="", file=sys.stderr, flush=True)
        else:
            note(str(_shown[-1]))
    if is_live:
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """Return seconds, minutes or hours, as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
