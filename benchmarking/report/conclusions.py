"""The decision as data: for the whole card and each job, which mode is best and how sure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.records.types import ClientRecord
from benchmarking.report import claims
from benchmarking.report.groups import (
    CoRun,
    Group,
    failed_requests,
    mean_slowdown,
    most_compared,
    percentile_estimate,
    plain,
)

ALONE = "alone"

Rows = Mapping[int, Mapping[str, Any]]


@dataclass
class _Subject:
    """What is concluded on: a figure of the whole card or of one job, under each mode."""

    groups: Sequence[Group]
    name: str
    figure: str
    is_higher_better: bool
    workload: str | None = None
    copies: int | None = None
    is_claim: bool = True
    percent: float | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    estimates: dict[str, Estimate | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def conclude(
    groups: Sequence[Group], rows: Rows, matters_percent: float, *, is_cpu_demo: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conclude on every mix at the count where its modes can be compared best.

    `rows` are the groups' rows by `id(group)`. All claims of a section are one family. Returns the
    conclusions, and of each pair's own mix the one on the work delivered by both.
    """
    subjects = [
        subject for together in most_compared(groups) for subject in _subjects(together, rows)
    ]
    claimed = [subject for subject in subjects if subject.is_claim]
    figures = [claims.Figure(subject.values, subject.is_higher_better) for subject in claimed]
    judged = dict(zip(map(id, claimed), claims.judge(figures, matters_percent), strict=True))
    found = [_conclusion(one, judged.get(id(one), []), is_cpu_demo) for one in subjects]
    pairs = [subject.groups[0].pair for subject in subjects]
    return (
        [one for one, pair in zip(found, pairs, strict=True) if pair is None],
        [{"jobs": pair, **one} for one, pair in zip(found, pairs, strict=True) if pair],
    )


# --- the figures under each mode --------------------------------------------------------------


def _subjects(groups: Sequence[Group], rows: Rows) -> list[_Subject]:
    """The whole card's figures, then each job's; a job is there if some mode has run it."""
    counted = [row["throughput_clients"] for row in (rows[id(group)] for group in groups)]
    found = [_whole_card(groups, rows)] if any(counted) else []
    if groups[0].pair:
        return found
    labels = dict.fromkeys(label for group in groups for label in group.labels())
    for label in labels:
        found.append(_job(groups, rows, label))
        tail = _tail(groups, label)
        found += [tail] if tail else []
    energy = _Subject(groups, claims.WHOLE_CARD, "energy_joules_per_work", False, is_claim=False)
    for group in groups:
        _take(energy, group, [one.joules_per_work() for one in group.good], None)
    return [*found, energy] if any(energy.estimates.values()) else found


def _whole_card(groups: Sequence[Group], rows: Rows) -> _Subject:
    subject = _Subject(groups, claims.WHOLE_CARD, "work", True)
    for group in groups:
        _take(subject, group, [one.summary.stp for one in group.good], rows[id(group)]["invalid"])
    alone = [1 / slowdown for slowdown in _alone_rounds(groups, _every_client)]
    subject.values[ALONE] = alone
    return subject


def _job(groups: Sequence[Group], rows: Rows, label: str) -> _Subject:
    """A job's slowdown, of copies their mean; of a service its median response time.

    A service does no more work on a faster card, and the mean of its answers tells nothing of the
    requests that failed.
    """
    members = _of_label(label)
    first = next(one for group in groups for one in members(group.co_runs[0]))
    copies = max(len(members(group.co_runs[0])) for group in groups)
    if scores.is_offered_rate(first.units):
        subject = _Subject(groups, label, "median_ms", False, first.workload, copies)
        for group in groups:
            _take(subject, group, [_median_ms(members(one)) for one in group.good], None)
        return subject
    subject = _Subject(groups, label, "slowdown", False, first.workload, copies)
    for group in groups:
        felt = [one["invalid"] for one in rows[id(group)]["client_rows"] if one["label"] == label]
        values = [mean_slowdown(one, members(one)) for one in group.good]
        _take(subject, group, values, next(filter(None, felt), None))
    subject.values[ALONE] = _alone_rounds(groups, members)
    return subject


def _tail(groups: Sequence[Group], label: str) -> _Subject | None:
    """The highest percentile that stands under every mode; of copies the worst one's."""
    members = _of_label(label)
    by_group = {
        group.first.variant: [
            [one for _, one in group.members(client.client) if one.status == "ok"]
            for client in members(group.co_runs[0])
        ]
        for group in groups
    }
    requests = [
        sum(len(one.latency_ms or ()) + failed_requests(one) for one in records)
        for copies in by_group.values()
        for records in copies
    ]
    percent = scores.highest_percentile(min(requests, default=0))
    if percent is None:
        return None
    subject = _Subject(groups, label, "tail_ms", False, is_claim=False, percent=percent)
    subject.copies = max(map(len, by_group.values()))
    for variant, copies in by_group.items():
        known = [percentile_estimate(records, percent) for records in copies]
        worst = None if None in known else max(known, key=lambda found: found.mean)
        subject.estimates[variant] = worst
        if worst is None:
            subject.reasons[variant] = "too many requests failed"
    return subject


def _take(
    subject: _Subject, group: Group, values: Sequence[float | None], invalid: str | None
) -> None:
    """Note the values of a figure under the group's mode, or why it has none."""
    variant = group.first.variant
    known = [value for value in values if value is not None]
    broken = next((one.record for one in group.co_runs if not one.is_ok), None)
    if broken:
        subject.reasons[variant] = f"{broken.outcome}: {broken.reason or 'no reason recorded'}"
    elif invalid:
        subject.reasons[variant] = invalid
    elif not known:
        subject.reasons[variant] = "no baseline of every job"
    else:
        subject.values[variant] = known
    subject.estimates[variant] = estimate(subject.values.get(variant, ()))


def _of_label(label: str) -> Callable[[CoRun], list[ClientRecord]]:
    return lambda co_run: [one for one in co_run.clients if one.label == label]


def _every_client(co_run: CoRun) -> list[ClientRecord]:
    return [one for one in co_run.clients if not scores.is_offered_rate(one.units)]


def _median_ms(members: Sequence[ClientRecord]) -> float | None:
    latencies = [ms for one in members for ms in one.latency_ms or ()]
    return scores.latency_percentile(latencies, 50, sum(map(failed_requests, members)))


def _alone_rounds(
    groups: Sequence[Group], members: Callable[[CoRun], list[ClientRecord]]
) -> list[float]:
    """The jobs alone in each round, over all rounds: what the baseline's own error is seen by."""
    co_run = groups[0].co_runs[0]
    rounds = [co_run.alone.slowdowns(one.job_key) for one in members(co_run)]
    fewest = min(map(len, rounds), default=0)
    return [statistics.fmean(found[number] for found in rounds) for number in range(fewest)]


# --- a conclusion as data ---------------------------------------------------------------------


def _conclusion(
    subject: _Subject, pairs: Sequence[dict[str, Any]], is_cpu_demo: bool
) -> dict[str, Any]:
    known = {name: found for name, found in subject.estimates.items() if found is not None}
    ranked = sorted(known, key=lambda name: known[name].mean, reverse=subject.is_higher_better)
    best = next(iter(ranked), None)
    verdict, tied, reason = None, [], None
    if subject.is_claim and len(known) < 2:
        verdict = claims.NOT_MEASURED
        reason = "without a GPU nothing is said of sharing modes" if is_cpu_demo else (
            "no other mode was measured" if known else next(iter(subject.reasons.values()), None)
        )  # fmt: skip
    elif subject.is_claim:
        verdict, tied = claims.verdict_of(best, ranked[1:], pairs)
    needed = [
        pair["smallest_shown_percent"]
        for pair in pairs
        if {pair["one"], pair["other"]} in [{best, name} for name in tied]
    ]
    runner_up = ranked[1] if len(ranked) > 1 else None
    first = subject.groups[0]
    return {
        "mix": first.first.manifest.mix,
        "clients": first.clients,
        "subject": subject.name,
        "workload": subject.workload,
        "copies": subject.copies,
        "figure": subject.figure,
        "percent": subject.percent,
        "better": "higher" if subject.is_higher_better else "lower",
        "is_claim": subject.is_claim,
        "modes": [
            {
                "variant": group.first.variant,
                "mode": group.first.mode,
                "settings": group.first.settings,
                "estimate": plain(subject.estimates.get(group.first.variant)),
                "reason": subject.reasons.get(group.first.variant),
                "is_best": group.first.variant == best,
                "is_tied": group.first.variant in tied,
            }
            for group in subject.groups
        ],
        "best": best,
        "verdict": verdict,
        "rounds": min((found.repeats for found in known.values()), default=0),
        "pairs": list(pairs),
        "runner_up": runner_up,
        "runner_up_percent": _over(known, best, runner_up) if runner_up else None,
        "smallest_shown_percent": max(filter(None, needed), default=None),
        "reason": reason,
        "run_ids": list(dict.fromkeys(name for group in subject.groups for name in group.run_ids)),
    }


def _over(known: Mapping[str, Estimate], best: str, runner_up: str) -> float | None:
    """By how much the best lies over the runner-up, in percent."""
    one, other = known[best].mean, known[runner_up].mean
    return None if math.isinf(one) or math.isinf(other) else scores.difference_percent(other, one)
