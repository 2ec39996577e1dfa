"""What each value of a sweep gave, read from its run by the rules of every report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking.analysis.clients import ClientRow, copies_by_label, worst_copy
from benchmarking.analysis.comparison import Comparison, compare
from benchmarking.analysis.export import finite
from benchmarking.analysis.groups import Group
from benchmarking.analysis.runs import RunView
from benchmarking.metrics.estimates import Estimate
from benchmarking.records import run_folder

OK, INTERRUPTED, NOT_RUN = "ok", "interrupted", "not run"


@dataclass(frozen=True)
class Tail:
    """p99 response time of one latency job, of copies the worst one's.

    `p99_ms` has the p99 of each repeat; `merged_ms` is that of all raw latencies together,
    `slowdown` the same over p99 alone, where that is known. Requests that were missed count as
    infinitely late; of too few responses there is no tail.
    """

    label: str
    p99_ms: Estimate
    merged_ms: float
    slowdown: float | None


@dataclass(frozen=True)
class Point:
    """One value of the knob: how its run ended, and its figures where it ended well."""

    value: str
    outcome: str
    run_id: str | None = None
    reason: str | None = None
    clients: int | None = None
    mode: str | None = None
    is_unverified: bool = False
    stp: Estimate | None = None
    antt: Estimate | None = None
    tails: tuple[Tail, ...] = ()

    def tail(self, label: str) -> Tail | None:
        """Return the p99 of the latency job called `label`."""
        return next((tail for tail in self.tails if tail.label == label), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; what is unknown or infinite is `None`."""
        return finite(dataclasses.asdict(self))


def read_point(value: str, folder: Path, baseline: Path | None, reason: str | None) -> Point:
    """Read what one value gave from its run's folder.

    `baseline` is the run that it took its baselines from, `reason` why the suite ended badly where
    it did.
    """
    if not (folder / run_folder.MANIFEST_FILE).is_file():
        if reason == INTERRUPTED:
            return Point(value, INTERRUPTED)
        return Point(value, "failed", reason=reason)
    view = _view(folder)
    references = [_view(baseline)] if baseline else []
    found = compare([view], references=references)
    group = _group(found)
    outcome = str(view.manifest.get("outcome"))
    if group is None or outcome != "complete":
        return Point(value, "failed" if outcome == "complete" else outcome, view.run_id, reason)
    return Point(
        value=value,
        outcome=group.outcome,
        run_id=view.run_id,
        reason=group.reason,
        clients=group.clients,
        mode=group.mode,
        is_unverified=group.is_unverified,
        stp=group.stp,
        antt=group.antt,
        tails=_tails(group.client_rows),
    )


def _view(folder: Path) -> RunView:
    run = run_folder.read_run(folder)
    return RunView.of(run, run.run_id)


def _group(found: Comparison) -> Group | None:
    groups = [group for section in found.sections for group in section.groups]
    return groups[-1] if groups else None


def _tails(rows: Sequence[ClientRow]) -> tuple[Tail, ...]:
    worst = [
        worst_copy(copies, lambda row: row.p99_ms and row.p99_ms.mean)
        for copies in copies_by_label(rows).values()
    ]
    return tuple(
        Tail(row.label, row.p99_ms, _merged_ms(row), row.tail_slowdown[99])
        for row in worst
        if row is not None
    )


def _merged_ms(row: ClientRow) -> float:
    return row.latency["p99"] if row.latency else math.inf  # not one was answered
