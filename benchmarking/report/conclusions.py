"""The decision as data: for the whole card and each job, which mode is best and how sure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarking.metrics import scores
from benchmarking.metrics.estimates import Estimate, estimate
from benchmarking.records.types import ClientRecord
from benchmarking.report import claims
from benchmarking.report.groups import (
    CoRun,
    Group,
    mean_slowdown,
    most_compared,
    percentile_estimate,
    plain,
)
from benchmarking.report.wording import listed

ALONE = "alone"

Members = Callable[[CoRun], list[ClientRecord]]


@dataclass
class _Subject:
    """What is concluded on: a figure of the whole card or of one job, by variant of the mode."""

    groups: Sequence[Group]
    name: str
    figure: str
    is_claim: bool = True
    workload: str | None = None
    copies: int | None = None
    percent: float | None = None
    values: dict[str, Sequence[float]] = field(default_factory=dict)
    estimates: dict[str, Estimate | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def is_higher_better(self) -> bool:
        return self.figure == "work"

    def take(
        self, value: Callable[[CoRun], float | None], invalid: Callable[[Group], str | None]
    ) -> _Subject:
        """Note the figure's values over rounds under each mode, or why it has none."""
        for group in self.groups:
            variant, broken = group.first.variant, group.broken
            known = [found for found in map(value, group.good) if found is not None]
            if broken:
                reason = f"{broken.outcome}: {broken.reason or 'no reason recorded'}"
            else:
                unknown = "" if known else "no baseline for every job"
                if group.idle and len(known) < len(group.good):
                    unknown = f"{listed(group.idle)} finished no unit of work in the window"
                reason = invalid(group) or unknown
            if reason:
                self.reasons[variant] = reason
            else:
                self.values[variant] = known
            self.estimates[variant] = estimate(self.values.get(variant, ()))
        return self


def conclude(
    groups: Sequence[Group], matters_percent: float, error_percent: float, *, is_cpu_demo: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conclude on every mix at the count where its modes can be compared best.

    All claims of a section are one family. Returns the conclusions, and of each pair's own mix the
    one on the work delivered by both.
    """
    subjects = [subject for together in most_compared(groups) for subject in _subjects(together)]
    claimed = [subject for subject in subjects if subject.is_claim]
    figures = [claims.Figure(subject.values, subject.is_higher_better) for subject in claimed]
    pairs_of_each = claims.judge(figures, matters_percent, error_percent)
    judged = dict(zip(map(id, claimed), pairs_of_each, strict=True))
    single, pairs = [], []
    for subject in subjects:
        found = _conclusion(subject, judged.get(id(subject), []), is_cpu_demo)
        if subject.groups[0].pair:
            pairs.append({"jobs": subject.groups[0].pair, **found})
        else:
            single.append(found)
    return single, pairs


# --- the figures under each mode --------------------------------------------------------------


def _subjects(groups: Sequence[Group]) -> Iterable[_Subject]:
    """The whole card's figures, then each job's; a job is there if some mode has run it."""
    counted = [group.row["throughput_clients"] for group in groups]
    if any(counted) or all(one is None for one in counted):  # unknown where all have failed
        whole = _Subject(groups, claims.WHOLE_CARD, "work")
        whole.take(lambda one: one.summary.stp, lambda group: group.row["invalid"])
        alone = _alone_rounds(groups, _throughput_clients)
        whole.values[ALONE] = [1 / slowdown for slowdown in alone]
        yield whole
    if groups[0].pair:
        return
    for label in dict.fromkeys(client.label for group in groups for client in group.members):
        yield _job(groups, label)
        tail = _tail(groups, label)
        if tail:
            yield tail
    energy = _Subject(groups, claims.WHOLE_CARD, "energy_joules_per_work", is_claim=False)
    energy.take(CoRun.joules_per_work, lambda group: group.row["invalid"])
    if any(energy.estimates.values()):
        yield energy


def _job(groups: Sequence[Group], label: str) -> _Subject:
    """A job's slowdown, of copies their mean; of a service its median response time.

    A service does no more work on a faster card, and the mean of its answers tells nothing of the
    requests that failed.
    """

    def invalid(group: Group) -> str | None:
        rows = (row for row in group.row["client_rows"] if row["label"] == label)
        return next((row["invalid"] for row in rows if row["invalid"]), None)

    members = _of_label(label)
    first = next(one for group in groups for one in members(group.co_runs[0]))
    is_service = scores.is_offered_rate(first.units)
    subject = _Subject(groups, label, "median_ms" if is_service else "slowdown")
    subject.workload = first.workload
    subject.copies = max(len(members(group.co_runs[0])) for group in groups)
    if is_service:
        return subject.take(lambda one: _median_ms(members(one)), lambda group: None)
    subject.take(lambda one: mean_slowdown(members(one)), invalid)
    subject.values[ALONE] = _alone_rounds(groups, members)
    return subject


def _tail(groups: Sequence[Group], label: str) -> _Subject | None:
    """The highest percentile that stands under every mode; of copies the worst one's."""
    by_variant = {
        group.first.variant: [
            [one for _, one in group.of_client(client.client) if one.status == "ok"]
            for client in group.members
            if client.label == label
        ]
        for group in groups
        if not group.broken
    }
    requests = [
        sum(len(one.latency_ms or ()) + scores.failed_requests(one) for one in records)
        for copies in by_variant.values()
        for records in copies
    ]
    percent = scores.highest_percentile(min(requests, default=0))
    if percent is None:
        return None
    subject = _Subject(groups, label, "tail_ms", is_claim=False, percent=percent)
    subject.reasons = {one.first.variant: one.broken.outcome for one in groups if one.broken}
    subject.copies = max(map(len, by_variant.values()))
    for variant, copies in by_variant.items():
        known = [percentile_estimate(records, percent) for records in copies]
        found = [one for one in known if one is not None]
        is_whole = len(found) == len(known)
        worst = max(found, key=lambda one: one.mean, default=None)
        subject.estimates[variant] = worst if is_whole else None
        if not is_whole:
            subject.reasons[variant] = "too many requests failed"
    return subject


def _of_label(label: str) -> Members:
    return lambda co_run: [one for one in co_run.clients if one.label == label]


def _throughput_clients(co_run: CoRun) -> list[ClientRecord]:
    return [one for one in co_run.clients if not scores.is_offered_rate(one.units)]


def _median_ms(members: Sequence[ClientRecord]) -> float | None:
    latencies = [ms for one in members for ms in one.latency_ms or ()]
    return scores.latency_percentile(latencies, 50, sum(map(scores.failed_requests, members)))


def _alone_rounds(groups: Sequence[Group], members: Members) -> list[float]:
    """The jobs alone in each round, over all rounds: what the baseline's own error is seen by."""
    co_run = groups[0].co_runs[0]
    baselines = [co_run.alone.get(one.job_key) for one in members(co_run)]
    rounds = [baseline.own_slowdowns() if baseline else [] for baseline in baselines]
    return [statistics.fmean(of_round) for of_round in zip(*rounds, strict=False)]


# --- a conclusion as data ---------------------------------------------------------------------


def _conclusion(
    subject: _Subject, pairs: Sequence[Mapping[str, Any]], is_cpu_demo: bool
) -> dict[str, Any]:
    known = {name: found for name, found in subject.estimates.items() if found is not None}
    ranked = sorted(known, key=lambda name: known[name].mean, reverse=subject.is_higher_better)
    best, runner_up = (*ranked, None, None)[:2]
    verdict: str | None = None
    tied: Sequence[str] = ()
    reason = None
    if subject.is_claim and best and runner_up:
        verdict, tied = claims.verdict_of(best, ranked[1:], pairs)
    elif subject.is_claim:
        verdict = claims.NOT_MEASURED
        reason = next(iter(subject.reasons.values()), None)
        if is_cpu_demo:
            reason = "without a GPU nothing is said of sharing modes"
        elif known:
            is_only = len(subject.groups) == 1
            reason = "no other mode can be compared" if is_only else "no other mode has figures"
    needed = [
        pair["smallest_shown_percent"]
        for pair in pairs
        if {pair["one"], pair["other"]} in [{best, name} for name in tied]
    ]
    first = subject.groups[0]
    return {
        "mix": first.mix,
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
                "variant": variant,
                "mode": group.first.mode,
                "settings": group.first.settings,
                "estimate": plain(subject.estimates.get(variant)),
                "reason": subject.reasons.get(variant),
                "is_best": variant == best,
                "is_tied": variant in tied,
            }
            for variant, group in ((group.first.variant, group) for group in subject.groups)
        ],
        "best": best,
        "verdict": verdict,
        "rounds": min((found.repeats for found in known.values()), default=0),
        "pairs": list(pairs),
        "runner_up": runner_up,
        "runner_up_percent": _over(known[best], known[runner_up]) if best and runner_up else None,
        "smallest_shown_percent": max(filter(None, needed), default=None),
        "reason": reason,
        "run_ids": list(dict.fromkeys(name for group in subject.groups for name in group.run_ids)),
    }


def _over(best: Estimate, runner_up: Estimate) -> float | None:
    """By how much the best lies over the runner-up, in percent."""
    means = runner_up.mean, best.mean
    return None if math.inf in means else scores.difference_percent(*means)
