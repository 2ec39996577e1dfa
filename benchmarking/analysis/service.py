"""An inference service among the clients: what was offered to it, and what it answered in time.

Its requests come at a fixed rate, so a busy neighbor shows as latency and not as less work. It is
judged by its mean and p99 latency against those alone, and by its goodput: the requests a second
that were answered within the bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarking.analysis.runs import failed_requests, window_seconds
from benchmarking.metrics import scores

Record = Mapping[str, Any]


@dataclass(frozen=True)
class ServiceFigures:
    """Requests of a service in the windows of all repeats; unknown figures are `None`.

    `missed` failed, or were past the bound without an answer. `late_percent` is the share that its
    own load generator sent late; `limit` says so in a sentence where that limits the figures.
    """

    offered_per_second: float | None
    answered: int
    missed: int
    goodput_per_second: float | None
    bound_ms: float | None
    late_percent: float | None
    limit: str | None


def service_figures(records: Sequence[Record], slo_ms: float | None) -> ServiceFigures | None:
    """Put the repeats of one client together; `None` where it is no service.

    `slo_ms` is a bound that was given for the comparison; without one the service's own counts.
    """
    if not records or not all(scores.is_offered_rate(record["units"]) for record in records):
        return None
    figures = [record.get("figures") or {} for record in records]
    bound_ms = slo_ms or bound_of(records)
    late = [f["late_by_generator_percent"] for f in figures if f.get("late_by_generator_percent")]
    return ServiceFigures(
        offered_per_second=_first(figures, "request_rate"),
        answered=sum(len(record.get("latency_ms") or []) for record in records),
        missed=sum(map(failed_requests, records)),
        goodput_per_second=bound_ms
        and scores.goodput_per_second(
            [ms for record in records for ms in record["latency_ms"] or []],
            bound_ms,
            [window_seconds(record) for record in records],
        ),
        bound_ms=bound_ms,
        late_percent=max(late, default=None),
        limit=_first(figures, "generator_limited_reason"),
    )


def bound_of(records: Sequence[Record]) -> float | None:
    """The bound in ms that a service was run with, where it tells one."""
    return _first([record.get("figures") or {} for record in records], "slo_ms")


def _first(figures: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((found[name] for found in figures if found.get(name) is not None), None)
