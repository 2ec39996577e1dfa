"""The same mode taken twice (A/A): how far apart two calls lie that differ in nothing.

A difference between two modes that is no larger than that is no difference between the modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarking.analysis.groups import Group
from benchmarking.analysis.runs import CoRun
from benchmarking.metrics import scores
from benchmarking.metrics.estimates import range_estimate

STP = "STP"
P99 = "p99 latency"


@dataclass(frozen=True)
class SameTwice:
    """One figure of one group in each of its runs; `percent` is the highest over the lowest.

    `label` is the job's for a p99 latency, and empty for the STP.
    """

    group: Group
    figure: str
    label: str
    by_run: tuple[float, ...]

    @property
    def percent(self) -> float:
        """How much the highest lies over the lowest, in percent."""
        return scores.difference_percent(min(self.by_run), max(self.by_run))


def same_twice(groups: Iterable[Group]) -> list[SameTwice]:
    """Every figure of the groups that two or more runs took."""
    found = []
    for group in groups:
        if len(group.runs) < 2 or group.outcome != "ok":
            continue
        stp = _by_run(group, lambda co_run: co_run.summary("stp"))
        found.append(SameTwice(group, STP, "", stp))
        for row in group.client_rows:
            if row.p99_ms is not None:
                p99 = _by_run(group, lambda co_run, client=row.client: _p99(co_run, client))
                found.append(SameTwice(group, P99, row.label, p99))
    return [pair for pair in found if len(pair.by_run) >= 2 and min(pair.by_run) > 0]


def noise_floor(
    pairs: Sequence[SameTwice], mix: str, figure: str, label: str = ""
) -> SameTwice | None:
    """The pair of that mix and figure that lies farthest apart; `None` when none was taken."""
    fitting = [
        pair for pair in pairs if (pair.group.mix, pair.figure, pair.label) == (mix, figure, label)
    ]
    return max(fitting, key=lambda pair: pair.percent, default=None)


def _by_run(group: Group, value_of: Callable[[CoRun], float | None]) -> tuple[float, ...]:
    """The median over each run's co-runs, for the runs that have one."""
    medians = (
        range_estimate(value_of(co_run) for co_run in group.co_runs if co_run.run is run)
        for run in group.runs
    )
    return tuple(found.mean for found in medians if found is not None)


def _p99(co_run: CoRun, client: int) -> float | None:
    for record in co_run.clients:
        if record["client"] == client and record.get("latency_ms"):
            return scores.percentile(record["latency_ms"], 99)
    return None
