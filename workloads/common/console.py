"""What a person sees while a workload runs: notes, warnings, how far it has come."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from workloads.common.errors import printable

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
        if len(_stages) > 1:
            yield
        elif sys.stderr.isatty():
            with _live_line():
                yield
        else:
            with _plain_lines():
                yield
    finally:
        _stages.pop()


class _Innermost:
    """The stage that is going on, whenever it is formatted."""

    def __str__(self) -> str:
        return _stages[-1] if _stages else ""


@contextmanager
def _live_line() -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.fields[stage]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as line:
        line.add_task("", total=None, stage=_Innermost())
        yield


@contextmanager
def _plain_lines() -> Iterator[None]:
    over = threading.Event()
    begin_seconds = time.monotonic()

    def tell() -> None:
        while not over.wait(PLAIN_STAGE_PERIOD_SECONDS):
            note(f"{_Innermost()}: {time.monotonic() - begin_seconds:.0f} s")

    threading.Thread(target=tell, name="stage", daemon=True).start()
    try:
        yield
    finally:
        over.set()


class Progress:
    """Counts finished pieces of work; plain lines every few seconds, for logs and pipes."""

    def __init__(self, total: int, description: str, advice: str | None = None) -> None:
        """Count up to ``total``; ``advice`` are flags of a shorter job, for one that takes long."""
        self._total = total
        self._description = description
        self._advice = advice
        self._finished = 0
        self._begin_seconds = self._last_line_seconds = time.monotonic()

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        """Report ``pieces`` more as finished; ``detail`` is shown next to the count."""
        self._finished += pieces
        if self._finished == ESTIMATE_PIECES and self._advice is not None:
            self._estimate()
        self._show(pieces, detail)

    def _estimate(self) -> None:
        seconds = (time.monotonic() - self._begin_seconds) / self._finished * self._total
        if seconds >= ADVICE_SECONDS:
            note(f"about {duration(seconds)} on this CPU; try {self._advice}")
        elif seconds >= ESTIMATE_SECONDS:
            note(f"about {duration(seconds)} on this CPU")

    def _show(self, pieces: int, detail: str) -> None:
        now = time.monotonic()
        if now - self._last_line_seconds >= PLAIN_PROGRESS_PERIOD_SECONDS:
            self._last_line_seconds = now
            note(f"{self._description}: {self._finished}/{self._total} {detail}".rstrip())


class _Bar(Progress):
    """A bar with the time left, for terminals."""

    def __init__(self, rich_progress, *arguments: object) -> None:
        super().__init__(*arguments)
        self._rich = rich_progress
        self._task = rich_progress.add_task(self._description, total=self._total)

    def _show(self, pieces: int, detail: str) -> None:
        description = f"{self._description} {detail}".rstrip()
        self._rich.update(self._task, advance=pieces, description=description)


@contextmanager
def progress(total: int, description: str, advice: str | None = None) -> Iterator[Progress]:
    """Show how far ``total`` pieces of work have come: a bar on a terminal, plain lines elsewhere.

    Everything goes to standard error; standard output is left to results.

    Args:
        total: How many pieces there are.
        description: What is counted.
        advice: Flags of a shorter job; given on a CPU, where a job may take hours, and then the
            time that it will take is told after a few pieces.
    """
    if not sys.stderr.isatty():
        yield Progress(total, description, advice)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, total, description, advice)


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours, as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
