"""The same mode taken twice (A/A): how far apart two calls lie that differ in nothing.

A difference between two modes that is no larger than that is no difference between the modes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis.groups import Group
from benchmarking.analysis.runs import CoRun, latency_ms
from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, range_estimate

STP = "STP"
ANTT = "ANTT"
SLOWDOWN = "slowdown"
P99 = "p99 latency"
MEDIAN = "median latency"

# Said with every claim that no A/A stands behind.
NO_FLOOR = "no A/A was taken, so the noise floor is unknown"

_OF_CLIENT: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    SLOWDOWN: lambda record: record.get("slowdown"),
    P99: lambda record: latency_ms(record, scores.TAIL_PERCENT),
    MEDIAN: lambda record: latency_ms(record, 50),
}


@dataclass(frozen=True)
class SameTwice:
    """One figure of one group in each of its runs; `percent` is the highest over the lowest.

    `label` is the job's for a client's figure, and empty for STP and ANTT.
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
        for figure, name in ((STP, "stp"), (ANTT, "antt")):
            by_run = _by_run(group, lambda co_run, name=name: co_run.summary(name))
            found.append(SameTwice(group, figure, "", by_run))
        for row in group.client_rows:
            # What a job may be judged by, whichever of them the modes have in common.
            is_known = {SLOWDOWN: True, P99: row.p99_ms, MEDIAN: row.service or not row.slowdown}
            for figure in (figure for figure, known in is_known.items() if known):
                by_run = _by_run(group, functools.partial(_of_client, figure, row.client))
                found.append(SameTwice(group, figure, row.label, by_run))
    return [pair for pair in found if len(pair.by_run) >= 2 and min(pair.by_run) > 0]


def noise_floor(
    pairs: Sequence[SameTwice], mix: str, figure: str, label: str = ""
) -> SameTwice | None:
    """The pair of that mix and figure that lies farthest apart; `None` when none was taken."""
    return widest(
        pair for pair in pairs if (pair.group.mix, pair.figure, pair.label) == (mix, figure, label)
    )


def widest(pairs: Iterable[SameTwice]) -> SameTwice | None:
    """The pair that lies farthest apart; `None` without any."""
    return max(pairs, key=lambda pair: pair.percent, default=None)


def is_inside(one: float, other: float, floor: SameTwice | None) -> bool:
    """Whether two figures lie no farther apart than the same mode from itself."""
    low, high = sorted((one, other))
    return floor is not None and scores.difference_percent(low, high) <= floor.percent


def is_shown(one: Estimate, other: Estimate, floor: SameTwice | None) -> bool:
    """The claim rule: enough repeats each, spreads that lie apart, and more than the floor."""
    return one.shows_difference_from(other) and not is_inside(one.mean, other.mean, floor)


def _by_run(group: Group, value_of: Callable[[CoRun], float | None]) -> tuple[float, ...]:
    """The median over each run's co-runs, for the runs that have one."""
    medians = (
        range_estimate(value_of(co_run) for co_run in group.co_runs if co_run.run is run)
        for run in group.runs
    )
    return tuple(found.mean for found in medians if found is not None)


def _of_client(figure: str, client: int, co_run: CoRun) -> float | None:
    record = next((record for record in co_run.clients if record["client"] == client), {})
    return _OF_CLIENT[figure](record)
