"""What a person sees while a workload runs: notes, warnings, how far it has come."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from workloads.common.errors import printable

LIVE_STAGE_PERIOD_SECONDS = 0.5
PLAIN_STAGE_PERIOD_SECONDS = 15.0
PLAIN_PROGRESS_PERIOD_SECONDS = 5.0
# An estimate takes this many pieces, and is told from this length on; advice comes with long ones.
ESTIMATE_PIECES = 3
ESTIMATE_SECONDS = 60.0
ADVICE_SECONDS = 600.0

# What is going on, the innermost last.
_stages: list[str] = []


def note(text: str) -> None:
    """Print one line of information on standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def loud_warning(text: str) -> None:
    """Print a warning that cannot be overlooked: what follows is not what the reader expects."""
    bar = "!" * 78
    print(f"{bar}\nWARNING: {printable(text)}\n{bar}", file=sys.stderr, flush=True)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Show that something without an end in sight goes on: ``loading``, ``warming up``.

    A live line with the seconds so far on a terminal; elsewhere a plain line now and then. A stage
    inside of another takes its place in that one's line.
    """
    _stages.append(text)
    try:
        with nullcontext() if len(_stages) > 1 else _signs_of_life():
            yield
    finally:
        _stages.pop()


@contextmanager
def _signs_of_life() -> Iterator[None]:
    show, period_seconds = note, PLAIN_STAGE_PERIOD_SECONDS
    over = threading.Event()
    begin_seconds = time.monotonic()

    def tell() -> None:
        while not over.wait(period_seconds):
            show(f"{_stages[-1]}: {time.monotonic() - begin_seconds:.0f} s")

    with ExitStack() as live_line:
        if sys.stderr.isatty():
            from rich.console import Console

            status = live_line.enter_context(Console(stderr=True).status(_stages[-1]))
            show, period_seconds = status.update, LIVE_STAGE_PERIOD_SECONDS
        teller = threading.Thread(target=tell, name="stage", daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()


class Progress:
    """Counts finished pieces of work: on rich's bar, or in plain lines every few seconds."""

    def __init__(self, total: int, description: str, advice: str | None, bar: object) -> None:
        self._total = total
        self._description = description
        self._advice = advice
        self._finished = 0
        self._begin_seconds = self._last_line_seconds = time.monotonic()
        self._bar = bar
        self._task = bar.add_task(description, total=total) if bar else None

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        """Report ``pieces`` more as finished; ``detail`` is shown next to the count."""
        self._finished += pieces
        if self._finished == ESTIMATE_PIECES and self._advice is not None:
            self._estimate()
        now_seconds = time.monotonic()
        if self._bar:
            description = f"{self._description} {detail}".rstrip()
            self._bar.update(self._task, completed=self._finished, description=description)
        elif now_seconds - self._last_line_seconds >= PLAIN_PROGRESS_PERIOD_SECONDS:
            self._last_line_seconds = now_seconds
            note(f"{self._description}: {self._finished}/{self._total} {detail}".rstrip())

    def _estimate(self) -> None:
        seconds = (time.monotonic() - self._begin_seconds) / self._finished * self._total
        advice = f"; try {self._advice}" if seconds >= ADVICE_SECONDS else ""
        if seconds >= ESTIMATE_SECONDS:
            note(f"about {duration(seconds)} on this CPU{advice}")


@contextmanager
def progress(total: int, description: str, advice: str | None = None) -> Iterator[Progress]:
    """Show how far ``total`` pieces of work have come: a bar on a terminal, plain lines elsewhere.

    Everything goes to standard error; standard output is left to results. ``advice`` are flags of a
    shorter job; given on a CPU, where a job may take hours, and then the time that it will take is
    told after a few pieces.
    """
    if not sys.stderr.isatty():
        yield Progress(total, description, advice, bar=None)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Progress(total, description, advice, bar)


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
