"""How many clients: where a ramp breaks, and from where on more gain nothing. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarking.metrics.number_text import duration
from benchmarking.metrics.scores import failed_requests, mean, percentile, slo_attainment_percent
from benchmarking.records.types import ClientRecord, CoRunRecord

SATURATION_FRACTION = 0.95

# Which status names the cause when several clients of one co-run failed: a neighbor that was
# killed or timed out is more often the consequence than the cause.
_FAILURES_BY_CAUSE = ("oom", "failed", "timeout", "killed")


def saturation_count(stp_by_clients: Mapping[int, float | None]) -> int | None:
    """First count of clients whose STP is under 95 % of the best STP at a smaller count.

    Counts with an unknown STP are passed over. `None` when no count saturates.
    """
    best = 0.0
    for clients, stp in sorted(stp_by_clients.items()):
        if stp is not None and stp < SATURATION_FRACTION * best:
            return clients
        best = max(best, stp or 0.0)
    return None


def sufficient_count(stp_by_clients: Mapping[int, float | None]) -> int | None:
    """Fewest clients that deliver 95 % of the best STP of all counts: more gain nothing.

    `None` when no count has an STP.
    """
    known = {clients: stp for clients, stp in stp_by_clients.items() if stp is not None}
    enough = SATURATION_FRACTION * max(known.values(), default=0.0)
    return min((n for n, stp in known.items() if stp >= enough), default=None)


def breaking_point(
    co_runs: Sequence[CoRunRecord],
    client_records: Sequence[ClientRecord] = (),
    *,
    max_slowdown: float | None = None,
    max_p99_ms: float | None = None,
) -> dict[str, Any]:
    """First count of clients at which a client failed, or a bound that was asked for was passed.

    `co_runs` are those of one ramp, `client_records` their clients, matched by `co_run`. Of several
    repeats at one count, one that fails is enough; a bound is held against the estimate of the
    count: a job's mean slowdown and its raw latencies, over copies and repeats. Invalid and
    interrupted co-runs, and those that lost the GPU, prove nothing either way: their counts are
    listed in `not_judged`, unless another repeat of that count was judged, and are not tried.

    Returns `{"clients": int | None, "criterion": "oom"|"failed"|"timeout"|"killed"|"slowdown"|
    "p99"|None, "detail": str | None, "broken_repeats": int, "judged_repeats": int,
    "last_good_clients": int | None, "highest_clients_tried": int | None,
    "not_judged": [int, ...]}`; `clients` is `None` when it was not reached.
    """
    judged: dict[int, list[CoRunRecord]] = {}
    for co_run in sorted(co_runs, key=lambda co_run: co_run.clients):
        repeats = judged.setdefault(co_run.clients, [])
        if says_something_of_the_load(co_run.outcome, co_run.stop_reason):
            repeats.append(co_run)
    last_good, not_judged, broken, repeats, reason = None, [], 0, [], None
    for clients, repeats in judged.items():
        members = {one.co_run: [r for r in client_records if r.co_run == one.co_run]
                   for one in repeats}  # fmt: skip
        failures = [_failure(one, members[one.co_run]) for one in repeats if one.outcome != "ok"]
        everyone = [record for found in members.values() for record in found]
        passed = _passed_bound(everyone, max_slowdown, max_p99_ms)
        if failures or passed:
            reason, broken = (failures[0], len(failures)) if failures else (passed, len(repeats))
            break
        if repeats:
            last_good = clients
        else:
            not_judged.append(clients)
    criterion, detail = reason or (None, None)
    return {
        "clients": clients if reason else None,
        "criterion": criterion,
        "detail": detail,
        "broken_repeats": broken,
        "judged_repeats": len(repeats) if reason else 0,
        "last_good_clients": last_good,
        "highest_clients_tried": max((n for n, repeats in judged.items() if repeats), default=None),
        "not_judged": not_judged,
    }


def says_something_of_the_load(outcome: str, stop_reason: Mapping[str, Any] | None) -> bool:
    """Whether a co-run proves that its clients work together, or that they do not.

    One that was invalid or interrupted, or lost the GPU, proves neither.
    """
    kind = (stop_reason or {}).get("kind")
    return outcome in ("ok", "failed", "timeout") and kind != "gpu_lost"


def _failure(co_run: CoRunRecord, members: Sequence[ClientRecord]) -> tuple[str, str | None]:
    """What made a co-run fail, and in words."""
    statuses = [record.status for record in members]
    cause = next((status for status in _FAILURES_BY_CAUSE if status in statuses), None)
    return cause or co_run.outcome, co_run.reason


def _passed_bound(
    records: Sequence[ClientRecord], max_slowdown: float | None, max_p99_ms: float | None
) -> tuple[str, str] | None:
    """Which bound some job's estimate passes, and in words; `None` when all meet them."""
    by_job: dict[str, list[ClientRecord]] = {}
    for record in records:
        by_job.setdefault(record.job_key, []).append(record)
    felt = [mean(record.slowdown for record in copies) for copies in by_job.values()]
    worst = max((slowdown for slowdown in felt if slowdown is not None), default=0.0)
    idle = [record.label for record in records if record.status == "ok" and not record.units]
    if max_slowdown is not None and idle:
        return "slowdown", f"{idle[0]} finished no unit of work in the window"
    if max_slowdown is not None and worst > max_slowdown:
        return "slowdown", f"slowdown {worst:.2f} passes the bound of {max_slowdown:g}"
    if max_p99_ms is None:
        return None
    for copies in by_job.values():
        latencies = [ms for record in copies for ms in record.latency_ms or ()]
        failed = sum(map(failed_requests, copies))
        share = slo_attainment_percent(latencies, max_p99_ms, failed)
        # What failed has no latency, so no percentile would show it.
        if failed and share is not None and share < 99:
            return "p99", (
                f"only {share:.1f} % of all requests were answered within the bound of "
                f"{duration(max_p99_ms)}"
            )
        p99_ms = percentile(latencies, 99) if latencies else 0.0
        if p99_ms > max_p99_ms:
            said = f"p99 latency {duration(p99_ms)} passes the bound of {duration(max_p99_ms)}"
            return "p99", said
    return None
