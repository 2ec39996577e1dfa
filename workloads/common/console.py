"""What a person sees while a workload runs: notes, warnings, progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_PROGRESS_PERIOD_SECONDS = 5.0


def note(text: str) -> None:
    """Print one line of information on standard error."""
    print(text, file=sys.stderr, flush=True)


def loud_warning(text: str) -> None:
    """Print a warning that cannot be overlooked: what follows is not what the reader expects."""
    bar = "!" * 78
    print(f"{bar}\nWARNING: {text}\n{bar}", file=sys.stderr, flush=True)


class Progress(Protocol):
    """Counts finished pieces of work."""

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        """Report ``pieces`` more as finished; ``detail`` is shown beside the count."""


class _PlainProgress:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, total: int, description: str) -> None:
        self._total = total
        self._description = description
        self._finished = 0
        self._last_line_seconds = time.monotonic()

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        self._finished += pieces
        now = time.monotonic()
        if now - self._last_line_seconds >= PLAIN_PROGRESS_PERIOD_SECONDS:
            self._last_line_seconds = now
            note(f"{self._description}: {self._finished}/{self._total} {detail}".rstrip())


class _RichProgress:
    def __init__(self, bar: object, task: object, description: str) -> None:
        self._bar = bar
        self._task = task
        self._description = description

    def advance(self, pieces: int = 1, detail: str = "") -> None:
        self._bar.update(
            self._task, advance=pieces, description=f"{self._description} {detail}".rstrip()
        )


@contextmanager
def progress(total: int, description: str) -> Iterator[Progress]:
    """Show how far ``total`` pieces of work have come: a bar on a terminal, plain lines elsewhere.

    Everything goes to standard error; standard output is left to results.
    """
    if not sys.stderr.isatty():
        yield _PlainProgress(total, description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichBar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with RichBar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _RichProgress(bar, bar.add_task(description, total=total), description)
