"""Figures as they stand in the cells of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarking.analysis.clients import TAIL_PERCENTILES, ClientRow
from benchmarking.analysis.document import UNKNOWN
from benchmarking.analysis.groups import Group
from benchmarking.analysis.runs import CPU_DEMO
from benchmarking.metrics.estimates import Estimate
from benchmarking.metrics.number_text import duration, durations, significant


def number(value: float | None, decimals: int = 2, unit: str = "") -> str:
    """A number for a table cell, an en dash when it is unknown."""
    if value is None:
        return UNKNOWN
    if math.isinf(value):
        return significant(value)
    rounded = round(value, decimals) + 0.0  # no "-0"
    return f"{rounded:.{decimals}f}{' ' + unit if unit else ''}"


def spread(found: Estimate | None, decimals: int = 2) -> str:
    """An estimate for a table cell: `1.95 [1.90, 2.00]`, or the value alone from one repeat."""
    if found is None:
        return UNKNOWN
    if found.repeats < 2:
        return number(found.mean, decimals)
    mean, low, high = (number(value, decimals) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def joules(value: float | None) -> str:
    """Joules to three significant digits."""
    return UNKNOWN if value is None else significant(value)


def latency(row: ClientRow) -> str:
    """p50, p95 and p99 of the raw latencies; of too few the median and how many they are."""
    if row.latency is None:
        return UNKNOWN
    found = [row.latency[f"p{percent}"] for percent in TAIL_PERCENTILES]
    known = [value for value in found if value is not None]
    if len(known) == len(found):
        return durations(found)
    tails = [UNKNOWN] * (len(found) - len(known))
    return f"{' / '.join([durations(known), *tails])} (n = {row.responses + row.missed})"


def tail_slowdowns(row: ClientRow) -> str:
    """The same percentiles over those alone."""
    tails = [row.tail_slowdown[percent] for percent in TAIL_PERCENTILES]
    return UNKNOWN if all(tail is None for tail in tails) else " / ".join(map(number, tails))


def slo(row: ClientRow) -> str:
    """`98.5 % in 50.0 ms`."""
    if row.slo is None:
        return UNKNOWN
    return f"{row.slo.percent:.1f} % in {duration(row.slo.bound_ms)}"


def outcome(group: Group) -> str:
    """How the co-runs ended, and whether the mode could not be checked."""
    if group.outcome == "ok":
        return "ok, unverified" if group.is_unverified and group.mode != CPU_DEMO else "ok"
    return group.outcome


def activity(group: Group) -> str:
    """Activity in percent with its source: SM activity, else utilization, else the host CPU."""
    gpu = group.gpu
    if gpu["sm_activity_percent"] is not None:
        return f"{gpu['sm_activity_percent']:.0f} % SM"
    if gpu["utilization_gpu_percent"] is not None:
        return f"{gpu['utilization_gpu_percent']:.0f} % {gpu['utilization_source'] or ''}".strip()
    if gpu["host_cpu_percent"] is not None:
        return f"{gpu['host_cpu_percent']:.0f} % host CPU"
    return UNKNOWN


SCORE_HEADER = (
    "mode", "mix", "clients", "repeats", "outcome", "STP", "ANTT", "overhead %", "fairness",
    "success %", "avg job s", "activity",
)  # fmt: skip


def score_rows(groups: Sequence[Group]) -> list[list[str]]:
    """The scorecard's main columns, a row for each mode, mix and count of clients."""
    return [
        [
            group.mode_name,
            group.mix,
            str(group.clients),
            str(len(group.co_runs)),
            outcome(group),
            spread(group.stp),
            spread(group.antt),
            spread(group.overhead_percent, 0),
            spread(group.fairness),
            number(group.success_rate_percent, 0),
            number(group.average_duration_seconds, 1),
            activity(group),
        ]
        for group in groups
    ]
